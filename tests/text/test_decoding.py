"""Text token by token against the tokenizers library and transformers, for every kind of decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tests.text.test_text import cut, stream_text
from tpworker.errors import InvalidRequest
from tpworker.text.decoding import Replace, Rule, StripRight, Window
from tpworker.text.stream import TextStream
from tpworker.text.tokenizer import Tokenizer

WORDS = [
    "[UNK]",
    "</s>",
    "e4",
    "e5",
    "Nf3",
    "Nc6",
    "a",
    "b",
    ".",
    "'",
    "s",
    "n't",
    "'re",
    "!",
    " ",
    "  ",
    "not",
]
PIECES = [
    "a",
    "b",
    "▁",
    "▁the",
    "th▁e",
    "▁▁",
    "é",
    " ",
    "##ing",
    "##b",
    "lo",
    "w</w>",
    "er</w>",
    "|",
    "<pad>",
    ".",
]


def word_level(decoder: Any, words: Sequence[str], clean_up: bool = False) -> Tokenizer:
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("[UNK]", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=clean_up))


def sequence(*stages: Any) -> Any:
    return decoders.Sequence(list(stages))


LLAMA2 = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
DECODERS: dict[str, tuple[Any, Rule]] = {
    "none": (None, Rule.TOKEN),
    "WordPiece": (decoders.WordPiece(), Rule.TOKEN),
    "WordPiece without cleanup": (decoders.WordPiece(cleanup=False), Rule.TOKEN),
    "Metaspace": (decoders.Metaspace(), Rule.TOKEN),
    "Metaspace never": (decoders.Metaspace(prepend_scheme="never"), Rule.TOKEN),
    "ByteLevel": (decoders.ByteLevel(), Rule.TOKEN),
    "Replace": (sequence(decoders.Replace("▁", " "), decoders.Replace("th", "s")), Rule.TOKEN),
    "Replace by token": (decoders.Replace(Regex("[ab]+$"), "_"), Rule.TOKEN),
    "Llama 2": (sequence(*LLAMA2), Rule.TOKEN),
    "Gemma": (sequence(*LLAMA2[:3]), Rule.TOKEN),
    "BPEDecoder": (decoders.BPEDecoder(suffix="</w>"), Rule.PAIR),
    "CTC": (decoders.CTC(), Rule.PAIR),
    "CTC without cleanup": (decoders.CTC(cleanup=False), Rule.PAIR),
    "CTC, Replace": (sequence(decoders.CTC(), decoders.Replace("a", "  ")), Rule.PAIR),
    "BPEDecoder, WordPiece": (sequence(decoders.BPEDecoder("</w>"), decoders.WordPiece()), Rule.PAIR),
    "text replaced": (
        sequence(decoders.Fuse(), decoders.Replace("lob", "X"), decoders.Replace("aa", "a")),
        Rule.TOKEN,
    ),
    "text stripped": (sequence(decoders.Fuse(), decoders.Strip("a", 2, 0)), Rule.TOKEN),
    "bytes replaced": (sequence(decoders.ByteLevel(), decoders.Replace("aa", "b")), Rule.TOKEN),
    "pairs, then text": (
        sequence(decoders.BPEDecoder("</w>"), decoders.Fuse(), decoders.Replace("w lo", "!")),
        Rule.PAIR,
    ),
    "text, then words": (sequence(decoders.Fuse(), decoders.Metaspace(prepend_scheme="never")), Rule.WINDOW),
    "bytes, then words": (sequence(decoders.ByteFallback(), decoders.Metaspace()), Rule.WINDOW),
}
TOKENIZERS = {
    **{
        f"{name}, cleaned up" if clean_up else name: word_level(decoder, words, clean_up)
        for name, (decoder, _) in DECODERS.items()
        for clean_up in (False, True)
        for words in [["[UNK]", "</s>", *PIECES] if decoder is not None else WORDS]
    },
    "words": word_level(decoders.WordPiece(), WORDS),
    "words, cleaned up": word_level(decoders.WordPiece(cleanup=False), WORDS, clean_up=True),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())

token_ids = st.lists(st.integers(0, 18), max_size=14)  # special ones, and ids beyond the vocabulary too


@each_tokenizer
@given(ids=token_ids, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_any_output_is_what_is_decoded(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    expected = tokenizer.decode(ids)
    assert expected == tokenizer._fast.decode(ids, skip_special_tokens=True)
    assert stream_text(TextStream(tokenizer), [[i] for i in ids]) == expected
    assert stream_text(TextStream(tokenizer), cut(ids, cuts)) == expected


@each_tokenizer
@given(ids=token_ids, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_special_tokens_that_are_shown_are_what_the_library_decodes(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    expected = tokenizer._fast.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected
    assert stream_text(TextStream(tokenizer, skip_special_tokens=False), cut(ids, cuts)) == expected


@each_tokenizer
@given(prompt=token_ids, ids=token_ids)
def test_behind_a_prompt_it_is_what_the_output_adds(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int]
) -> None:
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    text = stream_text(TextStream(tokenizer, prompt=prompt), [[i] for i in ids])
    # Where the end of the prompt is another text because of what comes behind it, that is not said.
    assert whole.endswith(text) or not whole.startswith(before)


@each_tokenizer
@given(ids=token_ids)
def test_nothing_that_is_sure_is_held_back_for_long(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream, shown = TextStream(tokenizer), ""
    for count, token_id in enumerate(ids, start=1):
        shown += stream.push([token_id]).text
        assert len(tokenizer.decode(ids[:count]).rstrip(" a")) - len(shown) <= 10  # one for each filter


@pytest.mark.parametrize(("decoder", "rule"), DECODERS.values(), ids=DECODERS.keys())
def test_which_rule_holds(decoder: Any, rule: Rule) -> None:
    assert word_level(decoder, PIECES).decoding.rule is rule


def test_words_without_a_decoder_keep_their_spaces() -> None:
    words = {"[UNK]": 0, "</s>": 1, "e4": 2, "e5": 3, "Nf3": 4, "Nc6": 5}
    tokenizer = word_level(None, list(words))
    assert stream_text(TextStream(tokenizer), [[2], [3], [4], [5], [1]]) == "e4 e5 Nf3 Nc6"
    assert stream_text(TextStream(tokenizer, prompt=[2, 3]), [[4], [5]]) == " Nf3 Nc6"


def test_the_suffix_of_words_is_a_space_between_them() -> None:
    tokenizer = word_level(decoders.BPEDecoder(suffix="</w>"), ["lo", "w", "e", "r</w>", "w</w>"])
    assert stream_text(TextStream(tokenizer), [[0], [1], [2], [3], [0], [4]]) == "lower low"
    assert stream_text(TextStream(tokenizer, prompt=[0, 1, 2, 3]), [[0], [4]]) == " low"
    assert stream_text(TextStream(tokenizer, prompt=[0, 1, 2]), [[3], [0], [4]]) == "r low"


def test_spaces_are_cleaned_up_where_transformers_does_it() -> None:
    ids = [2, 8, 7, 9, 10, 13]  # e4 . b ' s !
    assert stream_text(TextStream(TOKENIZERS["none, cleaned up"]), [[i] for i in ids]) == "e4. b's!"
    assert stream_text(TextStream(TOKENIZERS["none"]), [[i] for i in ids]) == "e4 . b ' s !"
    backend = Backend(models.BPE(vocab={"a": 0, " .": 1}, merges=[]))
    backend.decoder = decoders.Fuse()
    bpe = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True))
    assert stream_text(TextStream(bpe), [[0], [1]]) == bpe._fast.decode([0, 1]) == "a ."


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_cost_of_a_token_does_not_grow_with_the_output(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    longest = 0

    def spy(decode: Any) -> Any:
        def counting(tokens: list[str]) -> Any:
            nonlocal longest
            longest = max(longest, len(tokens))
            return decode(tokens)

        return counting

    stream = TextStream(tokenizer)
    if stream._detokenizer._window is not None:
        stream._detokenizer._window._decode = spy(stream._detokenizer._window._decode)
    ids = [2, 3, 5, 9, 10, 14] * 200
    held = 0
    for token_id in ids:
        stream.push([token_id])
        for stage in stream._detokenizer._filters:
            held = max(held, len(getattr(stage, "_held", "")))
    assert longest <= Window.MAX_TOKENS
    assert held <= 3


@given(
    text=st.text("ab ", max_size=30),
    old=st.text("ab ", min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_a_string_is_replaced_as_str_does_it(text: str, old: str, cuts: list[int]) -> None:
    stage = Replace(old, "X")
    assert "".join(stage.feed(str(part)) for part in cut(text, cuts)) + stage.finish() == text.replace(
        old, "X"
    )  # type: ignore[arg-type]


@given(
    text=st.text("ab", max_size=30), count=st.integers(1, 3), cuts=st.lists(st.integers(0, 200), max_size=8)
)
def test_the_end_of_a_text_is_stripped_as_the_library_does_it(text: str, count: int, cuts: list[int]) -> None:
    stage = StripRight("a", count)
    stripped = "".join(stage.feed(str(part)) for part in cut(text, cuts)) + stage.finish()  # type: ignore[arg-type]
    if len(text) >= count:  # it cannot do shorter ones
        assert stripped == decoders.Strip("a", 0, count).decode([text])


def test_a_decoder_that_panics_fails_the_request_alone() -> None:
    """The library's Strip takes a text for longer than it is; a panic of Rust is no Exception in Python."""
    strip = sequence(decoders.Strip(".", 1, 1), decoders.ByteFallback(), decoders.Fuse())
    tokenizer = word_level(strip, WORDS)
    e4, dot, b = (WORDS.index(word) for word in ("e4", ".", "b"))
    with pytest.raises(InvalidRequest, match=r"its decoder fails on them: .*detokenize=False"):
        TextStream(tokenizer).push([e4, dot])
    with pytest.raises(InvalidRequest, match="its decoder fails"):
        tokenizer.decode([dot])
    assert TextStream(tokenizer).push([e4, b]).text == "e4b"
