"""What an output is held to: a JSON schema, a regular expression, some choices, a grammar.

Part of `SamplingParams`. Validated once, then frozen. How it becomes a grammar: tpworker.grammar.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from tpworker.errors import InvalidRequest, one_line, shown
from tpworker.values import is_utf8, plain

PARAMETER = "structured_outputs"
KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")

MAX_SCHEMA = 1 << 18  # characters, as compact JSON
MAX_SCHEMA_DEPTH = 100  # objects and lists within each other
MAX_REGEX = 1 << 15  # characters
MAX_GRAMMAR_TEXT = 1 << 17  # characters
MAX_STRINGS = 10_000
MAX_STRINGS_TOTAL = 1 << 17  # characters
MAX_MARK = 256  # characters


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """What the model says before that what is held: as it thinks between two marks.

    A mark may be a special token, an added one, or text of several tokens.

    Args:
        start, end: the marks, e.g. `<think>` and `</think>`.
        is_open: the prompt ends with the first one, or behind it. Else the output may begin with it, or not.

    Raises:
        InvalidRequest: a mark is no string, or an empty one.
    """

    start: str
    end: str
    is_open: bool = False

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            mark = getattr(self, name)
            ok = isinstance(mark, str) and 0 < len(mark) <= MAX_MARK and is_utf8(mark)
            _check(ok, f"behind.{name}", mark, f"a string of 1 to {MAX_MARK} characters, in UTF-8")
        object.__setattr__(self, "is_open", plain(self.is_open))
        _check(isinstance(self.is_open, bool), "behind.is_open", self.is_open, "true or false")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What an output is held to. Exactly one of the first six is given.

    Raises:
        InvalidRequest: none is given, or several; one is of the wrong type, too large, or no JSON.
            Whether a schema, an expression or a grammar is right is found when it is compiled.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as a mapping or as text; kept as compact text. Objects have their properties in the
    order in which the schema names them; white space is free, as in any JSON."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """All of the output matches it. In the syntax of Rust's regex: no look-around, no references."""
    choice: Sequence[str] = field(default=())
    """The output is one of these."""
    grammar: str | None = None
    """In Lark's syntax, as llguidance has it (its first rule is `start`), or GBNF's (`root ::= …`)."""
    structural_tag: str | Mapping[str, Any] | None = None
    """Text with tagged parts, each held to a schema; as a mapping or as JSON text; kept as compact text."""
    behind: Thinking | None = None
    """It is what comes behind the model's thinking that is held to it."""

    def __post_init__(self) -> None:
        settle = object.__setattr__
        settle(self, "json_object", False if self.json_object is None else plain(self.json_object))
        _check(isinstance(self.json_object, bool), "json_object", self.json_object, "true, or left out")
        settle(self, "choice", self._strings())
        given = self.kinds
        if len(given) != 1:
            found = ", ".join(given) or "none of them"
            raise InvalidRequest(
                f"{PARAMETER} has {found}: give exactly one of {', '.join(KINDS)}", PARAMETER
            )
        for name in ("json", "structural_tag"):
            settle(self, name, _json_text(name, getattr(self, name)))
        for name, limit in (("regex", MAX_REGEX), ("grammar", MAX_GRAMMAR_TEXT)):
            text = getattr(self, name)
            ok = text is None or (isinstance(text, str) and 0 < len(text) <= limit and is_utf8(text))
            _check(ok, name, text, f"a string of 1 to {limit} characters, in UTF-8")
        settle(self, "behind", _thinking(self.behind))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are given: one, once this is made."""
        return tuple(kind for kind in KINDS if getattr(self, kind) not in (None, False, ()))

    def _strings(self) -> tuple[str, ...]:
        choice = () if self.choice is None else self.choice
        limit = f"1 to {MAX_STRINGS} strings, none of them empty, with {MAX_STRINGS_TOTAL} characters at most"
        is_listed = hasattr(choice, "__iter__") and not isinstance(choice, (str, bytes, Mapping))
        _check(is_listed, "choice", choice, limit)
        is_left_out = isinstance(choice, tuple) and not choice
        choice = tuple(choice)
        ok = all(isinstance(s, str) and s and is_utf8(s) for s in choice)
        _check(ok and (is_left_out or 0 < len(choice) <= MAX_STRINGS), "choice", choice, limit)
        _check(sum(map(len, choice)) <= MAX_STRINGS_TOTAL, "choice", choice, limit)
        return tuple(dict.fromkeys(map(str, choice)))  # each once


def structured_outputs(value: StructuredOutputs | Mapping[str, Any] | None) -> StructuredOutputs | None:
    """What a user gives as structured outputs; a mapping of its fields becomes one.

    Raises:
        InvalidRequest: it is neither, or a field has another name.
    """
    if value is None or isinstance(value, StructuredOutputs):
        return value
    if not isinstance(value, Mapping):
        raise InvalidRequest(
            f"{PARAMETER}={shown(value)}: must be a StructuredOutputs, or a mapping with one of "
            f"{', '.join(KINDS)}",
            PARAMETER,
        )
    _check_names(PARAMETER, value, [one.name for one in fields(StructuredOutputs)])
    return StructuredOutputs(**value)


def _thinking(value: Any) -> Thinking | None:
    if value is None or isinstance(value, Thinking):
        return value
    limit = "a Thinking(start=…, end=…), a mapping with those, or left out"
    _check(isinstance(value, Mapping), "behind", value, limit)
    _check_names(f"{PARAMETER}.behind", value, [one.name for one in fields(Thinking)])
    _check({"start", "end"} <= set(value), "behind", value, limit)
    return Thinking(**value)


def _check_names(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise InvalidRequest(
                f"{what} has {shown(name)}, which is not known: its fields are {', '.join(known)}", PARAMETER
            )


def _check(ok: bool, name: str, value: object, limit: str) -> None:
    if not ok:
        raise InvalidRequest(f"{PARAMETER}.{name}={shown(value)}: must be {limit}", PARAMETER)


def _json_text(name: str, value: object) -> str | None:
    """A JSON object as compact text, its keys in their order.

    Raises:
        InvalidRequest: it is no JSON object, or too large.
    """
    if value is None:
        return None
    limit = f"a JSON object, as a mapping or as text, of {MAX_SCHEMA} characters at most"
    if isinstance(value, str):
        _check(len(value) <= 2 * MAX_SCHEMA, name, value, limit)
        try:
            value = json.loads(value)
        except RecursionError:
            raise _too_deep(name) from None
        except ValueError as error:
            raise InvalidRequest(f"{PARAMETER}.{name} is not valid JSON: {error}", PARAMETER) from None
    _check(isinstance(value, Mapping), name, value, limit)
    plain_value = _PlainJson(name).of(value, name, 1)
    text = json.dumps(plain_value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    _check(len(text) <= MAX_SCHEMA, name, value, f"{limit}; it has {len(text)}")
    return text


class _PlainJson:
    """Makes values of JSON of what a user gives: dicts, lists, strings, finite numbers, booleans, None."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._num_values = 0

    def of(self, value: Any, path: str, depth: int) -> Any:
        """Raises InvalidRequest, which says where there is what JSON cannot have."""
        self._num_values += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise _too_deep(self._name)
        if self._num_values > MAX_SCHEMA:  # a value that is held many times over is written as often
            raise InvalidRequest(
                f"{PARAMETER}.{self._name} has more than {MAX_SCHEMA} values, the limit: make it smaller",
                PARAMETER,
            )
        if isinstance(value, str):
            self._check(is_utf8(value), path, value)
            return str(value)
        if isinstance(value, Mapping):
            for key in value:
                self._check(isinstance(key, str) and is_utf8(key), f"a key of {path}", key)
            return {str(key): self.of(one, f"{path}.{key}"[:200], depth + 1) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(one, f"{path}[{i}]"[:200], depth + 1) for i, one in enumerate(value)]
        value = plain(value)
        if value is None or isinstance(value, bool):
            return value
        self._check(isinstance(value, (int, float)), path, value)
        try:
            self._check(math.isfinite(value), path, value)
        except OverflowError:
            self._check(False, path, value)
        return value

    def _check(self, ok: bool, path: str, value: object) -> None:
        if not ok:
            raise InvalidRequest(
                f"{PARAMETER}: {one_line(path, 200)} is {shown(value)}, and must be a value that JSON has: a "
                "string in UTF-8, a finite number, a boolean, null, a list or an object",
                PARAMETER,
            )


def _too_deep(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"{PARAMETER}.{name} nests objects and lists deeper than {MAX_SCHEMA_DEPTH} levels, the limit: "
        "name its parts in $defs, and refer to them by $ref",
        PARAMETER,
    )
