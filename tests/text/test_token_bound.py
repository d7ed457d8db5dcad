"""That a bound on the number of tokens holds for whatever tokenizer and text, and is of use for real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tpworker.text.token_bound import TokenBound
from tpworker.text.tokenizer import Tokenizer as OurTokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog " * 3,
    "-------- 12345 67890 1111111 ======== caf\u00e9 na\u00efve e\u0301\u0301 \u4e2d\u6587\u4e2d \U0001f600",
    "        indented\n\n\n\n    more\t\tand more          ",
    "<|end|>  <|end|><|long special token|>",
]


def byte_level(*before: Any, normalizer: Any = None, added: tuple[AddedToken, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 5, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


def bytes_alone(*merges: str, normalizer: Any = None, added: tuple[AddedToken, ...] = ()) -> Tokenizer:
    """A token a byte, and these: each two tokens, with a space between them. So all other bytes weigh 1."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(a, b) for a, b in map(str.split, merges)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(added))
    return tokenizer


def byte_fallback(*parts: Any, before: Any = None, missing: int = 0, **options: Any) -> Tokenizer:
    """As Llama 2 and Gemma have it: pieces of words that begin with U+2581, bytes for what is in no token."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256 - missing)} | {"<unk>": 256}
    words = ["\u2581", "t", "h", "e", "-", "1", "\u2581t", "he", "\u2581the", "--", "----", "\u2581\u2581"]
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(words)}
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("-", "-"), ("--", "--"), ("\u2581", "\u2581")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, **options)
    tokenizer = Tokenizer(model)
    if parts:
        tokenizer.normalizer = normalizers.Sequence(list(parts))
    if before is not None:
        tokenizer.pre_tokenizer = before
    return tokenizer


def special(content: str, **options: Any) -> AddedToken:
    return AddedToken(content, special=True, **{"normalized": False, **options})


SPACES = normalizers.Replace(" ", "\u2581")
PROVED: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "special": lambda: byte_level(added=(special("<|end|>"), special("<|long special token|>"))),
    "normalized": lambda: byte_level(added=(special("  the  ", normalized=True),)),
    "stripping": lambda: byte_level(added=(special("<|end|>", lstrip=True, rstrip=True),)),
    "nfc": lambda: byte_level(normalizer=normalizers.NFC(), added=(special("<|end|>"),)),
    "nfkc": lambda: byte_level(normalizer=normalizers.NFKC()),
    "nfd": lambda: byte_level(normalizer=normalizers.NFD()),
    "added": lambda: bytes_alone(added=(special("1" * 30), special("<|end|>"))),
    "nothing but stripping": lambda: bytes_alone(added=(special("<|end|>", rstrip=True),)),
    "joined marks": lambda: bytes_alone(
        "\u00c3 \u00a9", "\u00c3\u00a9 \u00c3\u00a9", normalizer=normalizers.NFC()
    ),
    "split": lambda: byte_level(pre_tokenizers.Split(Regex(r"\s+"), "isolated")),
    "llama": lambda: byte_fallback(normalizers.Prepend("\u2581"), SPACES),
    "gemma": lambda: byte_fallback(SPACES, before=pre_tokenizers.Split(" ", "merged_with_previous")),
    "metaspace": lambda: byte_fallback(before=pre_tokenizers.Metaspace()),
    "a byte is missing": lambda: byte_fallback(SPACES, missing=1),
    "unknown ones are fused": lambda: Tokenizer(
        models.BPE({"?": 0, "a": 1, "-": 2, "a\u00e9": 3}, [], unk_token="?", fuse_unk=True)
    ),
    "unknown ones are dropped": lambda: Tokenizer(models.BPE({"a": 0, "1": 1, "11": 2}, [("1", "1")])),
    "whole words": lambda: byte_fallback(SPACES, ignore_merges=True),
}
NOT_PROVED: dict[str, Callable[[], Tokenizer]] = {
    "removed": lambda: byte_level(pre_tokenizers.Split(" ", "removed")),
    "whitespace": lambda: byte_level(pre_tokenizers.Whitespace()),
    "strip": lambda: byte_level(normalizer=normalizers.Strip()),
    "accents": lambda: byte_level(normalizer=normalizers.StripAccents()),
    "replace": lambda: byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
    "metaspace": lambda: byte_level(pre_tokenizers.Metaspace()),
    "normalized": lambda: byte_level(
        normalizer=normalizers.NFKC(), added=(special("aaaaaaaa", normalized=True),)
    ),
    "sequence": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.Sequence([normalizers.Strip()])])
    ),
    "suffix": lambda: byte_fallback(SPACES, end_of_word_suffix="</w>"),
    "words": lambda: Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")),
    "pieces": lambda: Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
    "unigram": lambda: Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
}

_runs = st.tuples(
    st.sampled_from([*" \t\n-=1ae\u0301\u0327\u00e9\u2581\u212a\u4e2d\U0001f600"]), st.integers(1, 40)
).map(lambda run: run[0] * run[1])
_texts = st.lists(
    st.one_of(_runs, st.text(max_size=8), st.sampled_from(["<|end|>", "<|long special token|>", "the "])),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("name", PROVED)
def test_no_text_has_fewer_tokens_than_the_bound(name: str) -> None:
    tokenizer = PROVED[name]()
    bound = TokenBound(tokenizer)
    assert bound.is_known

    @settings(max_examples=300, deadline=None)
    @given(text=_texts)
    @example(text="e\u0301" * 50)
    @example(text="   <|end|>    " * 20)
    @example(text=" " * 300)
    @example(text="-" * 300 + "1" * 300)
    @example(text="\u4e2d\u6587" * 50)
    @example(text="  the  " * 30)
    @example(text="\u00e9" * 100)
    @example(text="\x04\x06" * 100)
    def holds(text: str) -> None:
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert bound.at_least(text) <= num_tokens
        assert min(num_tokens, 5) >= min(bound.at_least(text, 5), 5)

    holds()


@pytest.mark.parametrize("name", NOT_PROVED)
def test_where_nothing_is_proved_nothing_is_told(name: str) -> None:
    bound = TokenBound(NOT_PROVED[name]())
    assert not bound.is_known
    assert bound.at_least("1" * 1000) == 0


def test_digits_are_told_exactly_and_letters_at_a_fraction() -> None:
    bound = TokenBound(PROVED["digits"]())
    assert bound.at_least("7" * 100_000) == 100_000 - 1  # rounded down
    assert bound.at_least("7" * 1_000_000, enough=8192) < 1_000_000, "no more is counted than needed"
    assert bound.at_least("7" * 1_000_000, enough=8192) >= 8192
    assert bound.at_least("\ud800" * 1000) == 0


def test_the_default_models_tokenizer(real_model: Path) -> None:
    tokenizer = OurTokenizer.load(real_model)
    assert tokenizer.at_least("7" * 1_000_000, 8192) >= 8192
    assert tokenizer.at_least("It was the best of times, it was the worst of times. " * 20_000, 8192) >= 8192
    assert tokenizer.at_least("\u4e2d\u6587" * 100_000, 8192) >= 8192
    text = "The quick brown fox jumps over the lazy dog.\n" * 100
    assert 0 < tokenizer.at_least(text) <= len(tokenizer.encode(text))
