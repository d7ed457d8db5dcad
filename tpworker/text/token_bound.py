"""How many tokens a text has at least, told from its characters alone: what is far too long is not tokenised.

Each symbol (a byte for byte-level BPE, else a character) weighs 1 / (length of the longest token that it
occurs in). So the symbols of one token weigh 1 at most together, and a text has as many tokens as its symbols
weigh, or more. A digit weighs 1 where digits are tokens of their own; a space little, for there are tokens
of many.

That holds where every symbol that weighs something gets into a token, once. Symbols that may be dropped, or
of which one unknown token may stand for many, weigh nothing; of a tokenizer that may drop or replace others
before it looks for tokens, nothing is told.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_CHUNK = 1 << 16  # symbols that are counted without letting other threads run
_SPACE, _METASPACE = " ", "\u2581"

#: Normalisers that leave ASCII alone, and at most join an ASCII character with a mark behind it.
_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
#: Pre-tokenizers that cut, and lose nothing.
_CUTTING = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"}


class TokenBound:
    """A lower bound on the number of tokens that a tokenizer makes of a text.

    Args:
        backend: of the tokenizers library.
    """

    def __init__(self, backend: Any) -> None:
        self._weights: dict[int | str, float] = {}
        self._unknown = 0.0  # of a symbol in no token
        self._has_forms = False
        self._is_bytes = False
        self.is_known = self._learn(backend)
        """Whether anything can be told."""

    def at_least(self, text: str, enough: float = float("inf")) -> int:
        """A number of tokens that the text has at least, without those that are added around it.

        Args:
            enough: what is beyond need not be counted.
        """
        if not self.is_known:
            return 0
        num_joined = 0
        if self._has_forms and not text.isascii():
            ascii_text = text.encode("ascii", "ignore")
            # Each of the others may be a mark that takes one ASCII character with it.
            num_joined, enough = len(text) - len(ascii_text), float("inf")
            text = ascii_text.decode()
        try:
            symbols: bytes | str = text.encode() if self._is_bytes else text.replace(_SPACE, _METASPACE)
        except UnicodeEncodeError:
            return 0  # half a surrogate pair: the tokenizer says so
        total = 0.0
        for start in range(0, len(symbols), _CHUNK):
            counts: Mapping[Any, int] = Counter(symbols[start : start + _CHUNK])
            total += sum(self._weights.get(symbol, self._unknown) * n for symbol, n in counts.items())
            if total > enough + 1:
                break
        total -= num_joined * max(self._weights.values(), default=0.0)
        return max(0, int(total * (1 - 1e-9)))  # rounding must not add one

    def _learn(self, backend: Any) -> bool:
        """Find the weights. False: there are none that can be proved."""
        model = backend.model
        normalizers, pre_tokenizers = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
        if type(model).__name__ != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix:
            return False
        if not all(_loses_nothing(part) for part in pre_tokenizers):
            return False
        cuts = [part["type"] for part in pre_tokenizers]
        others = [part for part in normalizers if part["type"] not in _UNICODE_FORMS]
        self._has_forms = len(others) < len(normalizers)
        self._is_bytes = "ByteLevel" in cuts
        if self._is_bytes and (others or "Metaspace" in cuts or cuts.count("ByteLevel") > 1):
            return False  # the bytes are not those of the text
        if not all(_only_for_spaces(part) for part in others):
            return False
        added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
        if self._has_forms and any(token.normalized for token in added):
            return False  # they would be found in what the normaliser makes of other characters
        vocabulary = backend.get_vocab(with_added_tokens=False)
        tokens: list[Any]  # of bytes, or of characters
        if self._is_bytes:
            alphabet = _bytes_of_char()
            tokens = [_as_bytes(token, alphabet) for token in vocabulary]
            written = [token.content.encode() for token in added]
        else:
            tokens = [token.replace(_SPACE, _METASPACE) for token in vocabulary.keys() - _BYTE_TOKENS]
            written = [token.content.replace(_SPACE, _METASPACE) for token in added]
        longest: dict[int | str, int] = {}
        for token in sorted([*tokens, *written], key=len):
            longest.update(dict.fromkeys(token, len(token)))
        self._weights = {symbol: 1 / length for symbol, length in longest.items()}
        if not self._is_bytes and model.byte_fallback and vocabulary.keys() >= _BYTE_TOKENS:
            # One token for each byte, unless there are some that stand for several.
            is_single = not any("<0x" in token for token in vocabulary.keys() - _BYTE_TOKENS)
            self._unknown = 1.0 if is_single else 0.0
        if self._unknown == 0.0:
            # What is no token alone is dropped, or one token stands for however many of it.
            single = {token[0] for token in tokens if len(token) == 1}
            self._weights = {symbol: self._weights[symbol] for symbol in single}
        if any(token.lstrip or token.rstrip for token in added):
            self._forget_spaces()
        return True

    def _forget_spaces(self) -> None:
        """There is a token that takes all spaces beside it along, of whatever kind."""
        self._unknown = 0.0
        for symbol in self._weights:
            char = chr(symbol) if isinstance(symbol, int) else symbol
            if char.isspace() or char == _METASPACE or not char.isascii():
                self._weights[symbol] = 0.0


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normaliser or pre-tokenizer as the parts that it is a sequence of."""
    return [] if component is None else list(_flat(json.loads(component.__getstate__())))


def _flat(state: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if state["type"] != "Sequence":
        yield state
    for part in state.get("normalizers", state.get("pretokenizers", ())):
        yield from _flat(part)


def _loses_nothing(pre_tokenizer: Mapping[str, Any]) -> bool:
    if pre_tokenizer["type"] == "Metaspace" and pre_tokenizer.get("replacement") != _METASPACE:
        return False
    return pre_tokenizer["type"] in _CUTTING and pre_tokenizer.get("behavior") != "Removed"


def _only_for_spaces(normalizer: Mapping[str, Any]) -> bool:
    """Whether it writes something for each space, or before the text, and no more."""
    if normalizer["type"] == "Prepend":
        return True
    is_replace = normalizer["type"] == "Replace" and normalizer.get("content") == _METASPACE
    return is_replace and normalizer.get("pattern") == {"String": _SPACE}


def _bytes_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are their own bytes, U+0100… are the others in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _as_bytes(token: str, alphabet: Mapping[str, int]) -> bytes:
    """Empty if it holds what no byte is written as: then no text gets it."""
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:
        return b""
