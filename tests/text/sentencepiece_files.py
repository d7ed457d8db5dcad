"""SentencePiece models written by hand, and what SentencePiece makes of a text with them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BYTES = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
WORDS = ("hello", "low", "lower", "world", "aaaa", "▁▁▁▁", "▁hello", "▁low", "\n\n", "中文")


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def field(number: int, value: Any) -> bytes:
    """A field of a protocol buffer: an integer, a float, or bytes."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def vocabulary(special: Sequence[tuple[str, int]], *, has_bytes: bool = True) -> list[tuple[str, float, int]]:
    """Special pieces, bytes, and all beginnings of words and their characters, the shortest first."""
    beginnings = {word[:end] for word in WORDS for end in range(2, len(word) + 1)}
    characters = sorted({character for word in WORDS[:-1] for character in word} | set("▁xyz"))
    fixed = [*special, *(BYTES if has_bytes else [])]
    merged = sorted(beginnings, key=lambda text: (len(text), text))
    return (
        [(text, 0.0, kind) for text, kind in fixed]
        + [(text, -float(number), NORMAL) for number, text in enumerate(merged)]
        + [(text, -1000.0 - number, NORMAL) for number, text in enumerate(characters)]
    )


def model(
    pieces: Sequence[tuple[str, float, int]], trainer: dict[int, Any], normalizer: dict[int, Any]
) -> bytes:
    """A tokenizer.model: see `Fields` of the reader for what the numbers mean."""
    data = b""
    for text, score, kind in pieces:
        data += field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
    data += field(2, b"".join(field(number, value) for number, value in trainer.items()))
    return data + field(3, b"".join(field(number, value) for number, value in normalizer.items()))


LLAMA = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
GEMMA = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN)]
GEMMA += [("▁▁", USER_DEFINED), ("\n", USER_DEFINED), ("<mask>", USER_DEFINED)]
AS_IT_IS = {1: b"identity", 4: 0}


def llama(**changes: Any) -> bytes:
    """As Llama 2's: a space before the text."""
    has_bytes = changes.pop("has_bytes", True)
    return model(vocabulary(LLAMA, has_bytes=has_bytes), {3: 2, 35: int(has_bytes)}, AS_IT_IS)


def gemma() -> bytes:
    """As Gemma's: no space before the text, and symbols that are never cut."""
    pieces = [
        piece for piece in vocabulary(GEMMA) if piece[0] not in ("▁▁", "\n") or piece[2] == USER_DEFINED
    ]
    return model(pieces, {3: 2, 35: 1, 40: 3, 41: 2, 42: 1}, AS_IT_IS | {3: 0})


def encode(pieces: Sequence[tuple[str, float, int]], text: str, *, adds_space: bool) -> list[str]:
    """Byte-pair encoding as SentencePiece has it: of all neighbours that make a piece, the best is joined, of
    equal ones the first."""
    text = ("▁" if adds_space and text else "") + text.replace(" ", "▁")
    symbols = sorted((piece[0] for piece in pieces if piece[2] == USER_DEFINED), key=len, reverse=True)
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    parts: list[str] = []
    place = 0
    while place < len(text):
        symbol = next((symbol for symbol in symbols if text.startswith(symbol, place)), text[place])
        parts.append(symbol)
        place += len(symbol)
    while True:
        joined = [
            (scores[left + right], -number)
            for number, (left, right) in enumerate(pairwise(parts))
            if left + right in scores and left not in symbols and right not in symbols
        ]
        if not joined:
            break
        number = -max(joined)[1]
        parts[number : number + 2] = [parts[number] + parts[number + 1]]
    known = {piece[0] for piece in pieces}
    out: list[str] = []
    for part in parts:
        if part in known:
            out.append(part)
        elif "<0x00>" in known:
            out += [f"<0x{byte:02X}>" for byte in part.encode()]
        elif not out or out[-1] != "<unk>":
            out.append("<unk>")
    return out
