"""An argument that is written between two marks, without the quotes of a string, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from tpworker.parsing.reader import SPACE, Marks, Reader, Reading, Sink
from tpworker.parsing.schemas import type_of

_CONTAINERS = frozenset({"object", "array"})
_WORDS = {"true": "boolean", "false": "boolean", "null": "null", "none": "null"}
"""Also as Python writes them, which some templates do."""


def read_value(reader: Reader, sink: Sink, types: frozenset[str], end: Marks) -> Reading[bool]:
    """Takes a value and the mark behind it, and hands it on as JSON.

    Strings, objects and arrays go on as they come; anything else is short, and goes on once it is whole.

    Args:
        types: the JSON types that it may have by its schema; empty: any.

    Returns:
        Whether the mark came.
    """
    if types == {"string"}:
        sink('"')
        is_whole = bool((yield from reader.through(end, partial(_quote, sink), is_mark_sure=True)))
        sink('"' if is_whole else "")
        return is_whole
    if types and types <= _CONTAINERS:
        yield from reader.run(SPACE)
        character = yield from reader.peek()
        if character and character in "{[":
            return bool((yield from reader.through(end, sink, is_mark_sure=True)))
    parts: list[str] = []
    is_whole = bool((yield from reader.through(end, parts.append)))
    if is_whole:
        sink(as_json("".join(parts), types))
    return is_whole


def as_json(text: str, types: frozenset[str]) -> str:
    """What a value says, as JSON: what it is already, if its type may be that; else a string.

    Args:
        types: those that its schema allows; empty: all.
    """
    bare = text.strip()
    try:
        value = json.loads(bare, parse_constant=_no_number)
    except (ValueError, RecursionError):
        word = bare.lower()
        if word in _WORDS and (not types or _WORDS[word] in types):
            return "null" if word == "none" else word
        return json.dumps(text, ensure_ascii=False)
    if "string" in types and (isinstance(value, str) or not types & set(_types(value))):
        return json.dumps(text, ensure_ascii=False)
    return bare


def _types(value: Any) -> Iterator[str]:
    yield type_of(value)
    if type(value) is int:  # a truth is one of Python's integers, and none of JSON's numbers
        yield "number"
    elif isinstance(value, float) and value.is_integer():
        yield "integer"


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _quote(sink: Sink, text: str) -> None:
    """Hands on text as it is within a string."""
    sink(json.dumps(text, ensure_ascii=False)[1:-1])
