"""How a tokenizer's decoder makes text of tokens, and how to do that token by token, at a bounded cost.

A decoder is a row of stages: the tokens, as strings, go through all of them and are joined. From the first
stage that fuses (Fuse, ByteLevel) on there is one string. So a decoder is taken apart there:

    tokens ──► head: stages that look at tokens ──► text ──► tail: stages that look at the whole text

What a stage of the head makes of a token depends on little else, see `Rule`; the tail's are text filters
with a state (`Filter`), as is the clean-up of spaces that transformers does for some tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import Any

from tokenizers import Tokenizer as Backend

from tpworker.errors import InvalidRequest
from tpworker.text.panics import panics_are

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANY_TOKEN = "a"
"""Stands before a token that is not the first: decoders treat the first of all in their own way."""
_BY_TOKEN = frozenset({"Replace", "Strip", "Metaspace", "WordPiece"})
_BY_PAIR = frozenset({"BPEDecoder", "CTC"})

CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""What transformers replaces in a text, in this order, where clean_up_tokenization_spaces is set."""


class Rule(Enum):
    """On what the text of a token depends."""

    TOKEN = auto()
    """On itself, and on whether it is the first: Replace, Strip, Metaspace, WordPiece, no decoder at all;
    also ByteLevel and ByteFallback, where it may be bytes and not characters."""
    PAIR = auto()
    """On the token before it too: CTC drops repetitions, BPEDecoder ends a word only before another one."""
    WINDOW = auto()
    """Nobody knows: stages in an order, or of a kind, about which nothing can be said."""


class Decoding:
    """A tokenizer's decoder, taken apart.

    Args:
        decoder: of the tokenizers library, or None.
        clean_up: whether transformers' clean-up of spaces comes after it.
    """

    def __init__(self, decoder: Any, clean_up: bool = False) -> None:
        self._whole = decoder
        self._clean_up = clean_up
        stages = _stages(decoder)
        kinds = [stage["type"] for stage in stages]
        fuses = next((i for i, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")), len(kinds))
        head = kinds[:fuses]
        self._tail = stages[fuses + 1 :]
        self._is_byte_level = kinds[fuses : fuses + 1] == ["ByteLevel"]
        self._is_byte_fallback = head[-1:] == ["ByteFallback"]
        if self._is_byte_fallback:
            head.pop()
        self.rule = self._rule_of(head) if all(map(_has_filter, self._tail)) else Rule.WINDOW
        self.strips_left = any(stage.get("start") for stage in self._tail)
        """Whether a stage takes something from the text's beginning."""
        self._head = _decoder_of(stages[: len(head)]) if head else None
        self._is_joined = not stages  # no decoder: spaces between the tokens
        self._bytes_of_char = _bytes_of_char() if self._is_byte_level else {}

        self.first_is_special = self._head is not None or self._is_joined
        """Whether the first token of all may be another text than behind others."""

    def _rule_of(self, head: Sequence[str]) -> Rule:
        if _BY_TOKEN.issuperset(head):
            return Rule.TOKEN
        is_by_pair = (_BY_TOKEN | _BY_PAIR).issuperset(head) and sum(kind in _BY_PAIR for kind in head) == 1
        return (
            Rule.PAIR if is_by_pair and not (self._is_byte_level or self._is_byte_fallback) else Rule.WINDOW
        )

    def piece(self, token: str, is_first: bool = False) -> str | bytes:
        """With Rule.TOKEN: what a token adds to the text; bytes where it is not whole characters."""
        if self._is_byte_fallback and (match := _BYTE_TOKEN.fullmatch(self._local(token, is_first))):
            return _text_if_whole(bytes([int(match[1], 16)]))
        text = self._local(token, is_first)
        if not self._is_byte_level:
            return text
        try:
            return _text_if_whole(bytes([self._bytes_of_char[char] for char in text]))
        except KeyError:  # an added token is written as it is
            return text

    def _local(self, token: str, is_first: bool) -> str:
        if self._head is None:
            return f" {token}" if self._is_joined and not is_first else token
        return self._behind([] if is_first else [_ANY_TOKEN], token)

    def _behind(self, before: list[str], token: str) -> str:
        """What the head makes of a token behind others."""
        assert self._head is not None
        with panics_are(no_text):
            text: str = self._head.decode([*before, token])
            return text.removeprefix(self._head.decode(before)) if before else text

    def pair(self, previous: str | None, token: str) -> str:
        """With Rule.PAIR: what a token adds behind another one; behind none, if that is None."""
        return self._behind([] if previous is None else [_ANY_TOKEN, previous], token)

    def decode(self, tokens: list[str]) -> str:
        """The text of tokens, but for the clean-up: what the library says."""
        with panics_are(no_text):
            text: str = self._whole.decode(tokens)
        return text

    def clean_up(self, text: str) -> str:
        """What transformers makes of the text that the library decodes."""
        for old, new in CLEANUP if self._clean_up else ():
            text = text.replace(old, new)
        return text

    def filters(self, is_first: bool) -> list[Filter]:
        """The stages behind the head, and the clean-up, for a new text, or one that goes on."""
        tail = [] if self.rule is Rule.WINDOW else self._tail
        found = [made for stage in tail for made in _filters_of(stage, is_first)]
        return found + [Replace(old, new) for old, new in (CLEANUP if self._clean_up else ())]


class Window:
    """Text by Rule.WINDOW: the last tokens are decoded again with each new one.

    It is what the library decodes for the first `MAX_TOKENS`. After them it is what these tokens add
    behind the `NUM_KEPT` before them, which no decoder that is known makes a difference to. What the library
    takes back is not taken back here; half a character waits, as long as the window does.
    """

    MAX_TOKENS = 32
    NUM_KEPT = 8

    def __init__(self, decode: Callable[[list[str]], str], before: Sequence[str]) -> None:
        self._decode = decode
        self._tokens = list(before[-self.NUM_KEPT :])
        self._shown = decode(self._tokens) if self._tokens else ""

    def push(self, token: str) -> str:
        """What a token adds, as far as it is sure."""
        if len(self._tokens) >= self.MAX_TOKENS:
            late = self.finish()
            self._tokens = self._tokens[-self.NUM_KEPT :]
            self._shown = self._decode(self._tokens)
        else:
            late = ""
        self._tokens.append(token)
        return late + self._show(self._decode(self._tokens).rstrip("\ufffd"))

    def finish(self) -> str:
        """What waited."""
        return self._show(self._decode(self._tokens)) if self._tokens else ""

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            self._shown = text
        return new


class Replace:
    """Replaces a string by another one, from left to right, in a text that comes in parts."""

    is_done = False

    def __init__(self, old: str, new: str) -> None:
        self._old = old
        self._new = new
        self._held = ""

    def feed(self, text: str) -> str:
        *done, rest = (self._held + text).split(self._old)
        num_held = next(
            n for n in range(min(len(self._old) - 1, len(rest)), -1, -1) if rest.endswith(self._old[:n])
        )
        self._held = rest[len(rest) - num_held :]
        return self._new.join([*done, rest[: len(rest) - num_held]])

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class StripLeft:
    """Takes up to so many equal characters from a text's beginning."""

    def __init__(self, char: str, count: int) -> None:
        self._char = char
        self._count = count
        self.is_done = not count

    def feed(self, text: str) -> str:
        while text and self._count and text[0] == self._char:
            text = text[1:]
            self._count -= 1
        self.is_done = self.is_done or bool(text) or not self._count
        if text:
            self._count = 0
        return text

    def finish(self) -> str:
        return ""


class StripRight:
    """Takes up to so many equal characters from a text's end: they wait for what comes behind them."""

    is_done = False

    def __init__(self, char: str, count: int) -> None:
        self._char = char
        self._count = count
        self._held = ""

    def feed(self, text: str) -> str:
        text = self._held + text
        num_held = min(self._count, len(text) - len(text.rstrip(self._char)))
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        return ""


Filter = Replace | StripLeft | StripRight


def _has_filter(stage: Mapping[str, Any]) -> bool:
    if stage["type"] == "Replace":
        return bool(stage["pattern"].get("String"))  # a regular expression may look at any part of the text
    return stage["type"] in ("Strip", "Fuse")


def _filters_of(stage: Mapping[str, Any], is_first: bool) -> Iterator[Filter]:
    if stage["type"] == "Replace":
        yield Replace(stage["pattern"]["String"], stage["content"])
    elif stage["type"] == "Strip":
        if is_first and stage["start"]:
            yield StripLeft(stage["content"], stage["start"])
        if stage["stop"]:
            yield StripRight(stage["content"], stage["stop"])


def no_text(what: str) -> InvalidRequest:
    """Of what its library says."""
    return InvalidRequest(
        f"the model's tokenizer has no text for these tokens, its decoder fails on them: {what}. Token ids "
        "can be had all the same (detokenize=False)"
    )


def _stages(decoder: Any) -> list[dict[str, Any]]:
    """A decoder's stages, those of sequences one by one."""
    if decoder is None:
        return []
    try:
        state: dict[str, Any] = json.loads(decoder.__getstate__())
    except Exception:  # one that is written in Python has no state to show
        return [{"type": "unknown"}]

    def flat(stage: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if stage["type"] != "Sequence":
            yield stage
        for part in stage.get("decoders", ()):
            yield from flat(part)

    return list(flat(state))


def _decoder_of(stages: Sequence[Mapping[str, Any]]) -> Any:
    """The library's decoder of some stages; it makes one only together with a tokenizer."""
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    description = {
        "version": "1.0",
        "model": model,
        "decoder": {"type": "Sequence", "decoders": list(stages)},
    }
    return Backend.from_str(json.dumps(description)).decoder


def _bytes_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are their own bytes, U+0100… are the others in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _text_if_whole(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
