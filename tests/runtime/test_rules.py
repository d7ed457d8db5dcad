"""What a request asks of its logits: defaults, bounds, messages, and words as a real tokenizer cuts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import VOCAB_SIZE
from tpworker.errors import InvalidRequest
from tpworker.ipc.arrays import pack_float32, pack_int32, unpack_int32
from tpworker.ipc.messages import MAX_BARRED, MAX_BARRED_LENGTH, LogitRules, Sampling, Submit
from tpworker.ipc.wire import decode, encode
from tpworker.runtime.admission import resolve_sampling
from tpworker.runtime.rules import Encode, resolve_rules
from tpworker.sampling_params import MAX_BAD_WORDS, SamplingParams
from tpworker.text.tokenizer import Tokenizer


class Spec:
    vocab_size = VOCAB_SIZE
    eos_ids = (2, 3)
    generation_defaults: dict[str, float] = {}  # noqa: RUF012


spec: Any = Spec()


def rules_of(encode: Encode | None = None, **params: Any) -> LogitRules | None:
    return resolve_rules(SamplingParams(**params), spec, encode)


def letters(text: str) -> Sequence[int]:
    """A token a character; a space before a letter belongs to it, and capitals have none."""
    return [200] * text.startswith(" ") + [100 + ord(char) - ord("a") for char in text if char.islower()]


def words_of(rules: LogitRules | None) -> list[list[int]]:
    assert rules is not None
    return [unpack_int32(word).tolist() for word in rules.barred]


def refused(parameter: str, words: str, encode: Encode | None = letters, **params: Any) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        resolve_sampling(SamplingParams(**params), spec, 9, 0, encode)
    assert caught.value.parameter == parameter


# ------------------------------------------------------------------------------- none, and defaults


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"repetition_penalty": 1},
        {"presence_penalty": 0, "frequency_penalty": -0.0, "repetition_penalty": 1.0},
        {"logit_bias": {}, "bad_words": []},
        {"logit_bias": {5: 0.0, 7: 0}},
        {"temperature": 0.0, "min_p": 0.5, "logprobs": 3},
    ],
)
def test_what_asks_for_nothing_has_no_rules(params: dict[str, Any]) -> None:
    """So that no step looks."""
    assert rules_of(**params) is None


def test_the_models_repetition_penalty_counts_where_the_request_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Spec, "generation_defaults", {"repetition_penalty": 1.1, "min_p": 0.2})
    assert rules_of() == LogitRules(1.1, 0.0, 0.0, b"", b"", None, ())
    assert rules_of(repetition_penalty=1.0) is None
    assert rules_of(repetition_penalty=1.5, presence_penalty=0.5) == LogitRules(
        1.5, 0.5, 0.0, b"", b"", None, ()
    )
    assert resolve_sampling(SamplingParams(), spec, 9, 0).min_p == 0.2
    assert resolve_sampling(SamplingParams(min_p=0), spec, 9, 0).min_p == 0.0


def test_all_of_it_crosses_to_the_processes() -> None:
    """At its bounds, in types that msgpack takes, and as it was."""
    params = SamplingParams(
        repetition_penalty=100, presence_penalty=-2, frequency_penalty=2, min_p=1,
        logit_bias={7: -100, 0: 100, VOCAB_SIZE - 1: 0.25}, allowed_token_ids=[0, VOCAB_SIZE - 1, 0],
        bad_words=["a", "ab"], logprobs=20, prompt_logprobs=0,
    )  # fmt: skip
    sampling = resolve_sampling(params, spec, 9, 0, letters)
    assert sampling.rules == LogitRules(
        100.0, -2.0, 2.0, pack_int32([0, 7, VOCAB_SIZE - 1]), pack_float32([100.0, -100.0, 0.25]),
        pack_int32([0, VOCAB_SIZE - 1, 0]),
        tuple(map(pack_int32, ([100], [200, 100], [100, 101], [200, 100, 101]))),
    )  # fmt: skip
    assert (sampling.min_p, sampling.num_logprobs, sampling.num_prompt_logprobs) == (1.0, 20, 0)
    submit = Submit(0, 1, pack_int32([5]), 0, sampling)
    assert decode(encode(submit)) == submit


def test_bias_is_exact_in_float32_as_it_arrives() -> None:
    rules = rules_of(logit_bias={5: 0.1})
    assert rules is not None
    assert rules.bias == pack_float32([0.1])


# -------------------------------------------------------------------------------------- the vocabulary


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids"])
@pytest.mark.parametrize("token", [VOCAB_SIZE, 2**31, 2**70])
def test_tokens_outside_the_vocabulary_are_refused(name: str, token: int) -> None:
    given: Any = {token: 1.0, 5: 1.0} if name == "logit_bias" else [5, token]
    refused(name, f"{name} holds {token}; the model's vocabulary has 0 to {VOCAB_SIZE - 1}", **{name: given})


def test_the_last_token_is_inside() -> None:
    rules = rules_of(logit_bias={VOCAB_SIZE - 1: 1}, allowed_token_ids=[VOCAB_SIZE - 1])
    assert rules is not None
    assert rules.allowed_ids == rules.bias_ids == pack_int32([VOCAB_SIZE - 1])


def test_a_bias_of_nothing_outside_the_vocabulary_changes_nothing() -> None:
    assert rules_of(logit_bias={VOCAB_SIZE: 0}) is None


# ------------------------------------------------------------------------------------------- words


def test_words_are_barred_at_the_beginning_and_behind_a_space() -> None:
    assert words_of(rules_of(letters, bad_words="ab")) == [[100, 101], [200, 100, 101]]
    assert words_of(rules_of(letters, bad_words=[" ab"])) == [[200, 100, 101]], "there it stands already"
    assert words_of(rules_of(letters, bad_words=["ab", "ab"])) == [[100, 101], [200, 100, 101]]


def test_the_longest_word_and_one_more_token() -> None:
    longest = "a" * (MAX_BARRED_LENGTH - 1)
    assert [len(word) for word in words_of(rules_of(letters, bad_words=[longest]))] == [15, 16]
    words = f"bad_words: '{longest}a' has 17 tokens; the limit is 16 a word: give a shorter part of it"
    refused("bad_words", words, bad_words=[longest + "a"])


def test_as_many_words_as_there_may_be_and_one_more() -> None:
    """Words of one token do not count: they are a mask."""
    alphabet = "abcdefghijklmnop"
    several = [first + second for first in alphabet for second in alphabet][: MAX_BARRED // 2]
    rules = rules_of(letters, bad_words=several)
    assert len(words_of(rules)) == MAX_BARRED
    single = lambda text: [ord(text[-1])] if len(text) < 3 and text[-1] != "z" else letters(text)  # noqa: E731
    many = [chr(code) for code in range(32, 122)] * 10
    assert len(words_of(rules_of(single, bad_words=many))) == 90
    refused(
        "bad_words",
        f"{MAX_BARRED + 2} sequences of several tokens, at the beginning of a text and behind a space; the "
        f"limit is {MAX_BARRED}: give fewer words",
        bad_words=[*several, "zz"],
    )
    refused("bad_words", f"at most {MAX_BAD_WORDS} strings", bad_words=["a"] * (MAX_BAD_WORDS + 1))


def test_words_without_a_tokenizer_or_without_tokens_are_refused() -> None:
    refused("bad_words", "this model has no tokenizer", None, bad_words=["a"])
    refused("bad_words", "'A' has no tokens: leave it out", bad_words=["a", "A"])


# ------------------------------------------------------------------------------- nothing left to choose


def test_something_must_be_left_to_choose() -> None:
    single = lambda text: [100 + ord(text.strip()) - ord("a")]  # noqa: E731
    refused(
        "bad_words", "bars every one of allowed_token_ids", single,
        allowed_token_ids=[100, 101], bad_words=["a", "b"],
    )  # fmt: skip
    assert rules_of(single, allowed_token_ids=[100, 101], bad_words=["a"]) is not None
    assert rules_of(letters, allowed_token_ids=[100, 101], bad_words=["ab"]) is not None


@pytest.mark.parametrize(
    ("params", "is_left"),
    [
        ({"allowed_token_ids": [2, 3], "min_tokens": 1}, False),
        ({"allowed_token_ids": [2, 3], "min_tokens": 0}, True),
        ({"allowed_token_ids": [2, 3], "min_tokens": 1, "ignore_eos": True}, True),
        ({"allowed_token_ids": [2, 7], "min_tokens": 1}, True),
        ({"allowed_token_ids": [2, 7], "min_tokens": 1, "stop_token_ids": [7]}, False),
        ({"allowed_token_ids": [2, 100], "min_tokens": 1, "bad_words": ["a"]}, False),
        ({"allowed_token_ids": [2, 100], "min_tokens": 0, "bad_words": ["a"]}, True),
    ],
)
def test_also_where_min_tokens_forbids_an_end(params: dict[str, Any], is_left: bool) -> None:
    single = lambda text: [100 + ord(text.strip()) - ord("a")]  # noqa: E731
    if is_left:
        assert isinstance(resolve_sampling(SamplingParams(**params), spec, 9, 0, single), Sampling)
    else:
        refused("allowed_token_ids", "min_tokens=1 forbids", single, **params)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"allowed_token_ids": [100], "bad_words": ["aa"]}, "allowed_token_ids is the last token of one of"),
        ({"allowed_token_ids": [100, 101], "bad_words": ["ba", "ab"]}, "allow a token that ends none"),
        ({"allowed_token_ids": [200, 101], "bad_words": ["ab"]}, None),
        ({"allowed_token_ids": [100, 101], "bad_words": ["aa"]}, None),
        ({"allowed_token_ids": [100, 2], "bad_words": ["aa"]}, None),
        ({"allowed_token_ids": [100, 2], "bad_words": ["aa"], "min_tokens": 3}, "that min_tokens=3 forbids"),
        ({"allowed_token_ids": [100, 2], "bad_words": ["aa"], "min_tokens": 3, "ignore_eos": True}, None),
    ],
)
def test_also_behind_the_beginning_of_a_word(params: dict[str, Any], words: str | None) -> None:
    """Otherwise a step would find every token barred, and choose one that is not allowed."""
    if words is None:
        assert isinstance(resolve_sampling(SamplingParams(**params), spec, 9, 0, letters), Sampling)
    else:
        refused("bad_words", words, **params)


# ----------------------------------------------------------------------------------- a real tokenizer


@pytest.fixture(scope="module")
def tokenizer(real_model: Path) -> Tokenizer:
    return Tokenizer.load(real_model)


@pytest.fixture
def plain(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("word", "texts"),
    [
        ("the", ["the", " the"]),
        (" the", [" the"]),
        ("New York", ["New York", " New York"]),
        ("don't", ["don't", " don't"]),
        ("größer", ["größer", " größer"]),
        ("日本", ["日本", " 日本"]),
        ("\n", ["\n"]),
        (" ", [" "]),
        ("\nThe", ["\nThe"]),
        ("<|im_end|>", ["<|im_end|>", " <|im_end|>"]),
    ],
)
def test_words_are_cut_as_texts_are(
    tokenizer: Tokenizer, plain: Callable[[str], list[int]], word: str, texts: list[str]
) -> None:
    """Without special tokens around them; each variant decodes to itself."""
    barred = words_of(rules_of_real(plain, word))
    assert barred == [plain(text) for text in texts]
    if "<|" not in word:  # special tokens are no text
        assert [tokenizer.decode(tokens) for tokens in barred] == texts


def rules_of_real(plain: Callable[[str], list[int]], *words: str) -> LogitRules | None:
    class Real(Spec):
        vocab_size = 49152

    real: Any = Real()
    return resolve_rules(SamplingParams(bad_words=words), real, plain)


def test_the_longest_words_of_a_real_tokenizer(plain: Callable[[str], list[int]]) -> None:
    """A character of three tokens each: refused by tokens, not by characters."""
    with pytest.raises(InvalidRequest, match=r"has 2\d tokens; the limit is 16 a word"):
        rules_of_real(plain, "𓀀" * 7)
