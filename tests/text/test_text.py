"""Incremental text against the tokenizers library itself: byte-level and SentencePiece-like vocabularies."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tpworker.errors import InvalidRequest, ModelError
from tpworker.text.stream import TextStream
from tpworker.text.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Grüße aus München",
    "你好，世界",
    "👩‍👩‍👧 🇩🇪 e\u0301",
    "हिन्दी",
] * 3
ROOT = Path(__file__).parents[2]
SPECIAL = ["<|im_start|>", "<|im_end|>"]
DEFAULT_MODEL = Path("~/.cache/tpworker/models/SmolLM2-135M-Instruct").expanduser()

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
hard_text = st.text(st.sampled_from("ab 你好é\u0301👩\u200d👧🇩🇪\n<ก\u0e33"), max_size=40)
texts = any_text | hard_text


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def sentencepiece(prepend: bool) -> Backend:
    """Llama 2's kind: ▁ for spaces (and one in front), a token for each byte, the first space stripped."""
    pieces = ["▁", "▁the", "▁quick", "the", "a", "b", "▁a", "你", "é", "\n", "<", "▁▁"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {p: 256 + i for i, p in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "the"), ("▁", "▁")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if prepend else [replace])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prepend else parts)
    return backend


def wrap(backend: Backend) -> Tokenizer:
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    backend.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


BYTE_LEVEL = wrap(byte_level())
LLAMA2 = wrap(sentencepiece(prepend=True))
GEMMA = wrap(sentencepiece(prepend=False))
TOKENIZERS = {"byte level": BYTE_LEVEL, "llama 2": LLAMA2, "gemma": GEMMA}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def stream_text(stream: TextStream, chunks: Sequence[Sequence[int]]) -> str:
    return "".join([stream.push(chunk).text for chunk in chunks]) + stream.finish()


def cut(ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    """The ids in chunks that end at the given places (modulo the length)."""
    places = sorted({0, len(ids), *(place % (len(ids) + 1) for place in cuts)})
    return [ids[start:end] for start, end in pairwise(places)]


# ---------------------------------------------------------------------------- characters


@each_tokenizer
@given(text=texts, cuts=st.lists(st.integers(0, 200), max_size=8))
@example(text="👩‍👩‍👧 e\u0301 你好", cuts=list(range(100)))
def test_any_text_comes_back_in_any_chunking(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert stream_text(TextStream(tokenizer), cut(ids, cuts)) == text
    # Llama 2 puts a space in front of each text; what continues a prompt keeps it.
    expected = " " + text if tokenizer is LLAMA2 and text else text
    prompt = tokenizer.encode("a", add_special_tokens=False)
    assert stream_text(TextStream(tokenizer, prompt=prompt), cut(ids, cuts)) == expected


@each_tokenizer
@given(text=texts)
def test_what_was_shown_is_never_taken_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream, shown = TextStream(tokenizer), ""
    for token_id in ids:
        delta = stream.push([token_id])
        assert "\ufffd" not in delta.text or "\ufffd" in text
        shown += delta.text
        assert text.startswith(shown)


@given(ids=st.lists(st.integers(0, 332) | st.integers(128, 256), max_size=40))
def test_bytes_that_are_no_text_come_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    assert stream_text(TextStream(BYTE_LEVEL), [[i] for i in ids]) == BYTE_LEVEL.decode(ids)


@given(data=st.lists(st.integers(0, 255), max_size=20))
def test_byte_tokens_that_are_no_text_become_replacement_characters(data: list[int]) -> None:
    # The library gives one for each byte of the run, whole characters in it too: not known while it lasts.
    assert stream_text(TextStream(GEMMA), [[byte] for byte in data]) == bytes(data).decode(errors="replace")


def test_half_a_character_is_held_back_until_it_is_whole_or_the_end() -> None:
    first, *rest = BYTE_LEVEL.encode("𝄞")  # not in the corpus: four tokens of one byte
    assert len(rest) == 3
    stream = TextStream(BYTE_LEVEL)
    assert [stream.push([i]).text for i in (first, *rest)] == ["", "", "", "𝄞"]
    stream = TextStream(BYTE_LEVEL)
    assert stream.push([first, rest[0]]).text == ""
    assert stream.finish() == "\ufffd"


def test_the_space_before_a_word_stays_behind_a_prompt() -> None:
    ids = LLAMA2.encode("the quick", add_special_tokens=False)
    assert LLAMA2.decode(ids) == stream_text(TextStream(LLAMA2), [ids]) == "the quick"
    special = [LLAMA2.special[name] for name in SPECIAL]
    assert stream_text(TextStream(LLAMA2, prompt=[*ids, *special]), [ids]) == " the quick"
    assert stream_text(TextStream(LLAMA2, prompt=special), [ids]) == "the quick"


@each_tokenizer
def test_special_and_hidden_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    start, end = (tokenizer.encode(name, add_special_tokens=False)[-1] for name in SPECIAL)
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "ab")
    assert stream_text(TextStream(tokenizer), [[start, b, end, b]]) == "bb"
    text = stream_text(TextStream(tokenizer, hidden_ids=[a]), [[b, a, b]])
    assert text == "bb"


@each_tokenizer
def test_a_special_token_inside_a_character_does_not_break_it(tokenizer: Tokenizer) -> None:
    end = tokenizer.encode(SPECIAL[1], add_special_tokens=False)[-1]
    first, *rest = tokenizer.encode("𝄞", add_special_tokens=False)
    assert stream_text(TextStream(tokenizer), [[first, end], rest]).strip() == "𝄞"


@each_tokenizer
def test_added_tokens_that_are_not_special_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<tool call>", add_special_tokens=False)
    assert stream_text(TextStream(tokenizer), [ids]).strip() == "<tool call>"


@each_tokenizer
def test_ids_beyond_the_tokenizer_are_no_text(tokenizer: Tokenizer) -> None:
    assert stream_text(TextStream(tokenizer), [[100_000]]) == ""


def test_the_cost_of_a_token_does_not_grow_with_the_output() -> None:
    half = BYTE_LEVEL.encode("𝄞")[0]
    stream, calls = TextStream(BYTE_LEVEL), []
    for _ in range(2000):
        stream.push([half])
        calls.append(len(stream._detokenizer._tail))  # all that a push depends on, besides its tokens
    assert max(calls) <= 3


# -------------------------------------------------------------------------- stop strings


def expected_with_stops(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """By definition: the first place where a stop string is complete, and the longest that is so there."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


stop_lists = st.lists(st.text("ab你", min_size=1, max_size=4), min_size=1, max_size=4)


@given(text=st.text("ab你 ", max_size=30), stops=stop_lists, cuts=st.lists(st.integers(0, 200), max_size=10))
@example(text="aabaabaaab", stops=["aabaaa"], cuts=[])
@example(text="aaab", stops=["aab"], cuts=[1, 2, 3])
def test_a_stop_string_cuts_at_its_position(text: str, stops: list[str], cuts: list[int]) -> None:
    stream, shown, stopped = TextStream(BYTE_LEVEL, stops), "", None
    expected, expected_stop = expected_with_stops(text, stops)
    for chunk in cut(BYTE_LEVEL.encode(text), cuts):
        delta = stream.push(chunk)
        shown += delta.text
        assert expected.startswith(shown), "shown before it was sure"
        stopped = stopped or delta.stopped
    shown += stream.finish()
    assert (shown, stopped) == (expected, expected_stop)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(text: str, stops: list[str]) -> None:
    stream, shown, read = TextStream(BYTE_LEVEL, stops), "", ""
    for token_id in BYTE_LEVEL.encode(text):
        delta = stream.push([token_id])
        shown += delta.text
        read += BYTE_LEVEL.decode([token_id])
        if delta.stopped is not None:
            break
        held = read.removeprefix(shown)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_counts_the_tokens_up_to_its_end_and_ends_the_stream() -> None:
    ids = [BYTE_LEVEL.encode(letter)[0] for letter in "xyEND"]
    stream = TextStream(BYTE_LEVEL, ["END"])
    assert stream.push(ids[:3]) == ("xy", None, 3)
    assert stream.push([*ids[3:], ids[0], ids[1]]) == ("", "END", 2)
    assert stream.push(ids) == ("", None, 0)
    assert stream.finish() == ""


def test_what_might_have_begun_a_stop_string_is_shown_at_the_end() -> None:
    stream = TextStream(BYTE_LEVEL, ["END"])
    assert stream.push(BYTE_LEVEL.encode("the EN")).text == "the "
    assert stream.finish() == "EN"
    assert stream.finish() == ""


def test_a_stop_string_may_lie_inside_one_token_and_in_split_characters() -> None:
    assert stream_text(TextStream(BYTE_LEVEL, ["𝄞"]), [[i] for i in BYTE_LEVEL.encode("a𝄞b")]) == "a"
    (token_id,) = BYTE_LEVEL.encode(" the")
    assert TextStream(BYTE_LEVEL, ["h"]).push([token_id]) == (" t", "h", 1)


END, START = "<|im_end|>", "<|im_start|>"


def special(name: str) -> int:
    return BYTE_LEVEL.special[name]


@pytest.mark.parametrize(
    ("stop", "before"),
    [
        (END, "ab"),
        ("b" + END, "a"),
        ("ab" + END, ""),
        (END + "\n", "ab"),
        (END + START, "ab"),
        ("b" + END + "\n" + START, "a"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_special_tokens_name_in_a_stop_string_is_that_token(stop: str, before: str, at_once: bool) -> None:
    ids = [*BYTE_LEVEL.encode("ab"), special(END)]
    ids += [special(START), *BYTE_LEVEL.encode("\n")] if stop == END + START else BYTE_LEVEL.encode("\n")
    ids += [special(START), *BYTE_LEVEL.encode("cd")]
    stream, shown = TextStream(BYTE_LEVEL, [stop, "cd"]), []
    for chunk in [ids] if at_once else [[i] for i in ids]:
        shown.append(stream.push(chunk))
    assert "".join(delta.text for delta in shown) + stream.finish() == before
    assert [delta.stopped for delta in shown if delta.stopped] == [stop]


def test_a_special_token_that_no_stop_string_names_is_nothing() -> None:
    ids = [*BYTE_LEVEL.encode("ab"), special(START), *BYTE_LEVEL.encode("cd")]
    assert TextStream(BYTE_LEVEL, ["bc", END]).push(ids) == ("a", "bc", len(ids) - 1)
    assert TextStream(BYTE_LEVEL, ["b" + END, "|"]).push(ids).stopped is None


def test_the_characters_of_a_special_tokens_name_are_a_stop_string_too() -> None:
    spelled = [i for char in "a" + END for i in BYTE_LEVEL.encode(char)]
    assert BYTE_LEVEL.decode(spelled) == "a" + END
    assert TextStream(BYTE_LEVEL, [END]).push(spelled) == ("a", END, len(spelled))


def test_half_a_character_before_a_special_token_that_ends_it_is_shown() -> None:
    first = BYTE_LEVEL.encode("𝄞")[0]
    stream = TextStream(BYTE_LEVEL, [END, "a?"])
    assert stream.push([*BYTE_LEVEL.encode("a"), first, special(END)]) == ("a\ufffd", END, 3)


def test_a_hidden_token_may_be_one_that_ends_it() -> None:
    stream = TextStream(BYTE_LEVEL, [END], hidden_ids=[special(END)])
    assert stream.push([*BYTE_LEVEL.encode("ab"), special(END)]) == ("ab", END, 3)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("stop", "skip_special_tokens", "text"),
    [
        ("b", True, "ab"),
        (END, True, "abc"),
        ("c" + END, True, "abc"),
        (END + "\n", True, "abc\n"),
        (END, False, "abc" + END),
        ("c<|im", False, "abc<|im"),
        ("b", False, "ab"),
        ("\nd", False, f"abc{END}\nd"),
    ],
)
def test_the_stop_string_may_be_part_of_the_text(
    stop: str, skip_special_tokens: bool, text: str, at_once: bool
) -> None:
    ids = [*BYTE_LEVEL.encode("abc"), special(END), *BYTE_LEVEL.encode("\nd e")]
    options: Any = {"skip_special_tokens": skip_special_tokens}
    for include, expected in ((True, text), (False, text[: text.rindex(stop)] if stop in text else None)):
        stream = TextStream(BYTE_LEVEL, [stop, "zzz"], include_stop=include, **options)
        shown = [stream.push(chunk) for chunk in ([ids] if at_once else [[i] for i in ids])]
        assert [delta.stopped for delta in shown if delta.stopped] == [stop]
        if expected is not None:
            assert "".join(delta.text for delta in shown) + stream.finish() == expected


def test_special_tokens_may_be_text_behind_a_prompt_too() -> None:
    prompt = [special(START), *BYTE_LEVEL.encode("a")]
    stream = TextStream(BYTE_LEVEL, prompt=prompt, skip_special_tokens=False, hidden_ids=[special(END)])
    assert stream_text(stream, [[special(START)], BYTE_LEVEL.encode("b"), [special(END)]]) == f"{START}b"
    assert TextStream(BYTE_LEVEL).push([special(START)]).text == ""  # the pieces are not shared


@pytest.mark.parametrize("stop", [(), (END,), (START + "x",)])
def test_some_special_tokens_may_be_text(stop: Sequence[str]) -> None:
    """Others are none, while the characters of their names are: a model may write about them."""
    spelt = [*BYTE_LEVEL.encode(END[:1]), *BYTE_LEVEL.encode(END[1:])]
    assert special(END) not in spelt
    ids = [special(START), *spelt, *BYTE_LEVEL.encode("é"), special(END), *BYTE_LEVEL.encode("b")]
    shown = stop[:1] != (END,)  # which stands for its characters, too
    for cut_ids in ([ids], [[i] for i in ids]):
        stream = TextStream(BYTE_LEVEL, stop, shown_special_tokens=[START, "no such"])
        assert stream_text(stream, cut_ids) == (f"{START}{END}éb" if shown else START)
    stream = TextStream(BYTE_LEVEL, [END], shown_special_tokens=[START])
    assert stream.push([special(START), special(END)]) == (START, END, 2)


@pytest.mark.parametrize(
    ("min_tokens", "text", "stopped"),
    [
        (0, "", "ab"),
        (1, "", "ab"),  # complete with the second token
        (2, "ababx", "a\nb"),
        (3, "ababx", "a\nb"),
        (8, "ababxa\nb", END),
        (9, "ababxa\nbc", None),
    ],
)
@given(cuts=st.lists(st.integers(0, 200), max_size=8))
def test_nothing_stops_within_min_tokens(
    min_tokens: int, text: str, stopped: str | None, cuts: list[int]
) -> None:
    ids = [BYTE_LEVEL.encode(char)[0] for char in "ababxa\nb"] + [special(END), *BYTE_LEVEL.encode("c")]
    stops = ["ab"] if min_tokens < 2 else ["a\nb", END]
    stream = TextStream(BYTE_LEVEL, stops, min_tokens=min_tokens)
    deltas = [stream.push(chunk) for chunk in cut(ids, cuts)]
    assert "".join(delta.text for delta in deltas) + stream.finish() == text
    assert [delta.stopped for delta in deltas if delta.stopped] == [stopped][: stopped is not None]


def test_a_stop_string_may_begin_within_min_tokens_and_end_behind_them() -> None:
    ids = [BYTE_LEVEL.encode(char)[0] for char in "ENDEND"]
    assert TextStream(BYTE_LEVEL, ["END"], min_tokens=4).push(ids) == ("END", "END", 6)
    stream = TextStream(BYTE_LEVEL, ["aab"], min_tokens=3)  # of what was passed over, the end may begin one
    assert stream.push([BYTE_LEVEL.encode(char)[0] for char in "aabaab"]) == ("aab", "aab", 6)


# ----------------------------------------------------------------------------- tokenizer


def test_special_tokens_of_a_text_can_be_left_out(tmp_path: Path) -> None:
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    plain = tokenizer.encode("the fox", add_special_tokens=False)
    assert tokenizer.encode("the fox") == [bos, *plain]
    assert tokenizer.decode([bos, *plain]) == "the fox"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    assert len(Tokenizer.load(tmp_path).encode("zzzzzzzzzz")) == 10


def test_half_of_a_surrogate_pair_is_refused_by_position() -> None:
    with pytest.raises(InvalidRequest, match=r"U\+D83D at position 2"):
        BYTE_LEVEL.encode("ab\ud83d")


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_missing_or_broken_tokenizer_is_a_model_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer"):
        Tokenizer.load(tmp_path)


def test_threads_share_a_tokenizer() -> None:
    text = "the quick 你好 𝄞 " * 50
    expected, failures = BYTE_LEVEL.encode(text), []

    def work() -> None:
        for _ in range(20):
            ids = BYTE_LEVEL.encode(text)
            if ids != expected or stream_text(TextStream(BYTE_LEVEL), [ids]) != text:
                failures.append(ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ------------------------------------------------------------------------- chat template

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content + '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if mood is defined %}[{{ mood }}]{% endif %}{% endif %}"
)


def chatting() -> Tokenizer:
    backend = byte_level()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE))


def test_the_chat_template_is_rendered_up_to_the_answer() -> None:
    tokenizer = chatting()
    assert tokenizer.has_chat_template
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], mood="calm")
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[calm]"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (TEMPLATE, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell, "),
        ("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", "[Hi][Well,"),
        (
            "{% for m in messages %}{{ m.content }}{% for p in m.content %}{% endfor %}!{% endfor %}",
            "Hi!Well, ",
        ),
    ],
)
@pytest.mark.parametrize("last", ["Well, ", [{"type": "text", "text": "Well, "}]])
def test_the_last_message_can_be_continued(template: str, text: str, last: Any) -> None:
    """As transformers does it."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": last}]
    backend = byte_level()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    with closing(Tokenizer(fast)) as tokenizer:
        assert tokenizer.apply_chat_template(messages, continue_final_message=True) == text
    if isinstance(last, str):
        assert fast.apply_chat_template(messages, tokenize=False, continue_final_message=True) == text


@pytest.mark.parametrize(
    ("template", "content", "words"),
    [
        (TEMPLATE, "", "has no text to continue"),
        (TEMPLATE, [], "has no text to continue"),
        (TEMPLATE, None, "has no text to continue"),
        ("{{ messages[0].content }}", "x", "does not show the last message's text"),
    ],
)
def test_what_cannot_be_continued_is_the_clients_fault(template: str, content: Any, words: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), chat_template=template)
    with closing(Tokenizer(fast)) as tokenizer, pytest.raises(InvalidRequest, match=words):
        tokenizer.apply_chat_template(messages, continue_final_message=True)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "tool", "content": "x"}], "no tools here"),
        ([{"role": "user"}], "content"),
        ([], "chat template refuses"),
    ],
)
def test_messages_that_the_template_refuses_are_the_clients_fault(messages: list[Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        chatting().apply_chat_template(messages)
    assert caught.value.parameter == "messages"


def test_a_model_without_a_template_points_to_completions() -> None:
    assert not BYTE_LEVEL.has_chat_template
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        BYTE_LEVEL.apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("template", [5, {"default": 5}, ["a"]])
def test_a_template_that_is_no_string_is_broken(template: Any) -> None:
    """And not a prompt without the user's words."""
    tokenizer = chatting()
    tokenizer._fast.chat_template = template
    with pytest.raises(InvalidRequest, match=r"template is broken: it is .*must be a string"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


# ------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    if not (DEFAULT_MODEL / "tokenizer.json").is_file():
        pytest.skip(f"the default model is not at {DEFAULT_MODEL}: scripts/setup gets it")
    return Tokenizer.load(DEFAULT_MODEL)


@settings(max_examples=50)
@given(text=texts)
def test_the_default_model_streams_what_the_library_decodes(smollm: Tokenizer, text: str) -> None:
    ids = smollm.encode(text, add_special_tokens=False)
    # Not always the text: this vocabulary has no token for bytes that begin characters of no script.
    assert stream_text(TextStream(smollm), [[i] for i in ids]) == smollm.decode(ids)


def test_the_default_models_vocabulary_decodes_as_the_library_does(smollm: Tokenizer) -> None:
    for token_id in range(smollm._backend.get_vocab_size()):
        assert stream_text(TextStream(smollm), [[token_id]]) == smollm.decode([token_id])


# ------------------------------------------------------------------------------- imports


def test_text_needs_neither_torch_nor_the_http_server(tmp_path: Path) -> None:
    BYTE_LEVEL._fast.save_pretrained(tmp_path)
    program = (
        "import sys; from pathlib import Path; import tpworker.text.stream\n"
        "from tpworker.text.tokenizer import Tokenizer\n"
        "assert 'transformers' not in sys.modules, 'imported before it was needed'\n"
        f"Tokenizer.load(Path({str(tmp_path)!r})).encode('hi')\n"
        "unwanted = 'torch', 'fastapi', 'uvicorn', 'starlette', 'prometheus_client'\n"
        "print([name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ------------------------------------------------------------------------------- all of it


@each_tokenizer
@settings(deadline=None, max_examples=50)
@given(text=texts)
def test_its_json_is_all_of_it(tokenizer: Tokenizer, text: str) -> None:
    again = Backend.from_str(tokenizer.to_json())
    assert again.encode(text).ids == tokenizer.encode(text)
    assert again.truncation is None
    ids = tokenizer.encode(text + SPECIAL[0] + "<tool call>")
    assert again.decode(ids) == tokenizer.decode(ids)
    added = {token.content: i for i, token in again.get_added_tokens_decoder().items()}
    assert tokenizer.added == added
    assert {*SPECIAL, "<tool call>"} <= set(added)


def test_what_is_written_in_python_has_no_json() -> None:
    tokenizer = wrap(byte_level())
    tokenizer._backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())
    with pytest.raises(ModelError, match=r"cannot be written as a tokenizer\.json: .*[Cc]ustom"):
        tokenizer.to_json()
