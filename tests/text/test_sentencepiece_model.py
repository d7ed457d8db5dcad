"""tokenizer.model alone: what SentencePiece makes of a text, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer
from tokenizers import Tokenizer as Backend

from tests.text.sentencepiece_files import (
    AS_IT_IS,
    CONTROL,
    GEMMA,
    LLAMA,
    NORMAL,
    USER_DEFINED,
    encode,
    field,
    gemma,
    llama,
    model,
    vocabulary,
)
from tpworker.errors import ModelError
from tpworker.text import sentencepiece_model
from tpworker.text.sentencepiece_model import read_model
from tpworker.text.tokenizer import Tokenizer

NO_BYTES = "llama without bytes"
FILES = {"llama": llama(), NO_BYTES: llama(has_bytes=False), "gemma": gemma()}
TEXTS = st.text(
    st.sampled_from("helowrd  \na▁中文🙂xyz") | st.characters(codec="utf-8"), max_size=24
) | st.builds(
    "".join,
    st.lists(
        st.sampled_from(["hello", " low", "lower", "    ", "\n\n", "<mask>", "中", "aaaaa"]), max_size=8
    ),
)


def load(folder: Path, data: bytes, config: dict[str, Any] | None = None) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(data)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: load(tmp_path_factory.mktemp("tokenizer"), data) for name, data in FILES.items()}


@settings(deadline=None, max_examples=300)
@given(name=st.sampled_from(sorted(FILES)), text=TEXTS)
def test_pieces_are_sentencepieces(tokenizers: dict[str, Tokenizer], name: str, text: str) -> None:
    special = GEMMA if name == "gemma" else LLAMA
    pieces = vocabulary(special, has_bytes=name != NO_BYTES)
    if name == "gemma":
        pieces = [piece for piece in pieces if piece[0] not in ("▁▁", "\n") or piece[2] == USER_DEFINED]
    for token, kind in special:
        if kind != USER_DEFINED:
            text = text.replace(token, "")  # its name means the token, here
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [pieces[token_id][0] for token_id in ids] == encode(pieces, text, adds_space=name != "gemma")
    if name != NO_BYTES:
        assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("name", FILES)
def test_its_json_is_what_was_read(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """The bytes of each token included, as grammars need them."""
    tokenizer = tokenizers[name]
    backend = Backend.from_str(tokenizer.to_json())
    reader = LLTokenizer(tokenizer.to_json(), n_vocab=backend.get_vocab_size(), eos_token=tokenizer.eos_id)
    for text in ("hello", "hello lower world", "low    aaaa", *(["\n", "é中"] if name != NO_BYTES else [])):
        ids = tokenizer.encode(text)
        assert backend.encode(text).ids == ids
        said = reader.decode_bytes(tokenizer.encode(text, add_special_tokens=False)).decode()
        assert said == (text if name == "gemma" else f" {text}")  # which the decoder of a whole text strips


def test_what_is_added_around_a_text(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, llama())
    low = tokenizer.encode("low", add_special_tokens=False)
    assert tokenizer.encode("low") == [1, *low]
    assert tokenizer.eos_id == 2
    both = load(tmp_path, llama(), {"add_eos_token": True, "tokenizer_class": "LlamaTokenizer"})
    assert both.encode("low") == [1, *low, 2]
    neither = load(tmp_path, llama(), {"add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"})
    assert neither.encode("low") == low
    bos = {"__type": "AddedToken", "content": "</s>", "normalized": False}
    named = load(tmp_path, llama(), {"bos_token": bos, "eos_token": "<s>"})
    assert named.encode("low") == [2, *low]
    assert named.eos_id == 1


def test_names_of_special_tokens_are_those_tokens(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, llama())
    low = tokenizer.encode("low", add_special_tokens=False)
    assert tokenizer.encode("low</s>low", add_special_tokens=False) == [*low, 2, *low]
    assert tokenizer.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tokenizer.decode([1, *low, 2]) == "low"


def test_a_gemma_begins_with_its_own_token(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, gemma(), {"tokenizer_class": "GemmaTokenizer"})
    assert tokenizer.encode("") == [2]
    assert tokenizer.eos_id == 1


def test_tokens_that_were_added_later(tmp_path: Path) -> None:
    """As Phi-3 has them: in tokenizer_config.json, behind the model's pieces."""
    count = len(read_pieces(tmp_path, llama()))
    later = {"content": "<|end|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    added = {str(count): later | {"single_word": False}}
    tokenizer = load(tmp_path, llama(), {"added_tokens_decoder": added, "eos_token": "<|end|>"})
    assert tokenizer.encode("<|end|>", add_special_tokens=False) == [count]
    assert tokenizer.eos_id == count


def read_pieces(folder: Path, data: bytes) -> Any:
    (folder / "tokenizer.model").write_bytes(data)
    return read_model(folder / "tokenizer.model").pieces


def test_the_chat_template_is_read(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load(tmp_path, llama()).has_chat_template


def test_tokenizer_json_counts_more(tmp_path: Path) -> None:
    load(tmp_path, llama())
    sentencepiece_model.build(read_model(tmp_path / "tokenizer.model")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    assert Tokenizer.load(tmp_path).encode("low", add_special_tokens=False)


PIECES = vocabulary(LLAMA)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (model(PIECES, {3: 1}, AS_IT_IS), "and its model_type say otherwise"),
        (
            model(PIECES, {3: 2}, AS_IT_IS | {2: b"x", 4: 1}),
            "precompiled_charsmap and remove_extra_whitespaces say",
        ),
        (model(PIECES, {3: 2}, AS_IT_IS | {5: 0}), "its escape_whitespaces say"),
        (model(PIECES, {3: 2, 24: 1}, AS_IT_IS), "its treat_whitespace_as_suffix say"),
        (model([*PIECES, ("<mask>", 0.0, USER_DEFINED)], {3: 2}, AS_IT_IS), "its user-defined symbols"),
        (model([*PIECES, ("low", 0.0, NORMAL)], {3: 2}, AS_IT_IS), "or two are alike"),
        (
            model([*PIECES, ("x" * 257, 0.0, NORMAL)], {3: 2}, AS_IT_IS),
            "a piece has more than 256 characters",
        ),
        (model([*PIECES, ("q", float("nan"), NORMAL)], {3: 2}, AS_IT_IS), "or no score"),
        (b"\n", "is not a SentencePiece model, or is cut off"),
        (llama()[:-9], "is not a SentencePiece model, or is cut off"),
        (field(1, 3), "is not a SentencePiece model, or is cut off"),
        (b"\n" + b"\xff" * 12, "is not a SentencePiece model, or is cut off"),
        (field(1, field(1, b"\xff")), "is not a SentencePiece model, or is cut off"),
        (field(1, b"")[:-1] + b"\x02\x0b", "is not a SentencePiece model, or is cut off"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_model(path)
    line = str(caught.value)
    assert words in line
    assert line.startswith(str(path))
    assert line.isprintable()


def test_a_class_that_may_add_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"tokenizer_class='Ernie4_5_Tokenizer': .*: fetch the model's tokenizer.js"
    ):
        load(tmp_path, llama(), {"tokenizer_class": "Ernie4_5_Tokenizer"})


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece_model, "MAX_BYTES", 1000)
    with pytest.raises(ModelError, match="has more than 1000 bytes, the limit"):
        load(tmp_path, llama())


SMALL = model([("<unk>", 0.0, 2), ("a", -1.0, NORMAL), ("<s>", 0.0, CONTROL)], {3: 2}, AS_IT_IS)


@settings(deadline=None, max_examples=300)
@given(start=st.integers(0, len(SMALL)), length=st.integers(0, 12), new=st.binary(max_size=12))
def test_whatever_bytes_come_are_read_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, start: int, length: int, new: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "tokenizer.model"
    path.write_bytes(SMALL[:start] + new + SMALL[start + length :])
    try:
        line = f"{len(read_model(path).pieces)} pieces"
    except ModelError as error:
        line = str(error)
    assert line.isprintable()
    assert len(line) < 600


@pytest.mark.parametrize("adds_space", [True, False])
def test_against_the_library(tmp_path: Path, adds_space: bool) -> None:
    """Where it is installed; it is no dependency."""
    library = pytest.importorskip("sentencepiece")
    corpus = Path(__file__).parents[2] / "README.md"
    library.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=900,
        model_type="bpe",
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=adds_space,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=[] if adds_space else ["▁▁", "▁▁▁▁", "\n", "<mask>"],
        minloglevel=2,
    )
    processor = library.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer.load(tmp_path)
    text, draw = corpus.read_text(), random.Random(1)
    for _ in range(500):
        start = draw.randrange(len(text))
        piece = text[start : start + draw.randrange(120)] + " " * draw.randrange(9)
        ids = processor.encode(piece)
        assert tokenizer.encode(piece, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == processor.decode(ids)
