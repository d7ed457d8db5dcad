"""Arguments between tags, strings without quotes, held to a function's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tpworker.errors import InvalidRequest, shown
from tpworker.parsing.lark import ANY, Lark, arguments_schema
from tpworker.parsing.schemas import (
    JSON_TYPES,
    Schema,
    branches,
    properties_of,
    resolved,
    type_of,
    types_of,
)

_NOTES = {"type", "title", "description", "default", "examples"}
_FIRST = {"object": r"\{", "array": r"\[", "integer": r"\-0-9", "number": r"\-0-9"}
"""How JSON of these types begins. Nothing else that is a value of a tag does: llguidance chooses by it."""
_BOUNDS = ("pattern", "minLength", "maxLength")
KEY = re.compile(r"[^<>\n]+")
"""The name of a parameter, between its tags."""
_ANCHOR = re.compile(r"(?<!\\)(?:\\\\)*\$\Z")


def arguments_grammar(
    lark: Lark,
    parameters: Schema,
    *,
    before_key: str,
    before_value: str,
    before_end: str,
    end: str,
    behind: str,
) -> str:
    """An expression for the arguments of a call: parameters in the schema's order, at least those required.

    Strings are held to enum, const, pattern and their lengths, not to format, which JSON Schema takes for a
    note. Where parameters are not named there are any. Alternatives between whole sets of parameters, which
    OpenAI's API does not know, are not held.

    Args:
        before_key, before_value: what is written before a key and between it and its value.
        before_end: what is written between a value and its end, where the value is not free text.
        end: the mark behind a value.
        behind: what is written behind that.
    """
    schema = arguments_schema(parameters)
    named = properties_of(schema)
    required = resolved(schema, schema).get("required")
    required = required if isinstance(required, list) else []
    parts = []
    for name, value in named.items():
        if not KEY.fullmatch(name):
            raise InvalidRequest(
                f"tools: a parameter is named {shown(name)}: in the model's format names have one character "
                "at least, and no <, > or line break: rename it",
                "tools",
            )
        value = _value(lark, value, schema, before_end, end)
        key = f"{lark.text(before_key)} {lark.characters(name)} {lark.text(before_value)}"
        part = f"{key} {value} {lark.text(behind)}"
        parts.append(lark.rule("argument", part) + ("" if name in required else "?"))
    others = resolved(schema, schema).get("additionalProperties", True)
    if not named and others is not False:
        value = _value(lark, others, schema, before_end, end)
        key = f"{lark.text(before_key)} /{KEY.pattern}/ {lark.text(before_value)}"
        parts.append(lark.rule("argument", f"{key} {value} {lark.text(behind)}") + "*")
    return " ".join(parts)


def _value(lark: Lark, schema: Any, root: Schema, before_end: str, end: str) -> str:
    """An expression for a value and its mark, as a rule."""
    kinds = [kind for branch in branches(schema, root) for kind in _kinds(branch, root)]
    _check_types(kinds)
    literals = [text for kind in kinds for text in _literals(kind)]
    texts = [kind for kind in kinds if "const" not in kind and kind.get("type", "string") == "string"]
    is_free = any(_is_free(kind) for kind in texts)
    # What the parser takes for JSON of such a type must be of its schema.
    structured = [kind for kind in kinds if kind.get("type") in _FIRST and "const" not in kind]
    structured = [kind for kind in structured if not (is_free and _NOTES.issuperset(kind))]
    ways = [
        f"{lark.json({**kind, **_definitions(root)})} {lark.text(before_end + end)}" for kind in structured
    ]
    if is_free:
        ways.append(lark.until(end, " & ".join(_outside(structured)) or ANY))
    else:
        ways += [f"{lark.characters(text)} {lark.text(before_end + end)}" for text in literals]
        ways += [
            lark.until(end, " & ".join([*_bounds(kind), *_outside(structured)]), before_end) for kind in texts
        ]
    return lark.rule("value", " | ".join(ways))


def _check_types(kinds: Sequence[Schema]) -> None:
    """Raises InvalidRequest where there can be no value. Of text llguidance is told no type to refuse."""
    wrong = [kind["type"] for kind in kinds if "type" in kind and kind["type"] not in JSON_TYPES]
    if wrong or not kinds:
        why = f"type={shown(wrong[0])}" if wrong else "it allows no value"
        raise InvalidRequest(
            f"tools: in the schema of a parameter: {why}; a type should be one of {', '.join(JSON_TYPES)}, "
            "or a list of them, and an enum have a value",
            "tools",
        )


def _kinds(branch: Schema, root: Schema) -> Iterator[Schema]:
    """A branch of a schema, once for each of its types, and once for each of its values if they are given."""
    merged: dict[str, Any] = dict(branch)
    parts = branch.get("allOf")
    for part in parts if isinstance(parts, list) else ():
        merged = {**resolved(part, root), **merged}
    values = [merged["const"]] if "const" in merged else merged.get("enum")
    types = types_of(branch, root)
    if isinstance(values, list):
        for value in values:
            name = type_of(value)
            if not types or name in types or (name == "integer" and "number" in types):
                yield {"type": name, "const": value}
    elif not types:
        yield merged
    elif types == {"string"}:
        merged.pop("allOf", None)
        yield {**merged, "type": "string"}
    else:
        for name in sorted(types):
            yield {**branch, "type": name}


def _literals(kind: Schema) -> list[str]:
    """What is written of a kind of which there are few: strings without quotes."""
    if "const" in kind:
        value = kind["const"]
        return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
    return {"null": ["null"], "boolean": ["true", "false"]}.get(kind.get("type", ""), [])


def _is_free(kind: Schema) -> bool:
    """Any text is of it."""
    return not any(name in kind for name in _BOUNDS)


def _outside(structured: list[Schema]) -> list[str]:
    """Text that does not begin as JSON of these, as terminals."""
    characters = "".join(sorted({_FIRST[kind["type"]] for kind in structured}))
    return [rf"/([^\s{characters}](.|\n)*)?/"] if characters else []


def _definitions(root: Schema) -> dict[str, Any]:
    return {name: root[name] for name in ("$defs", "definitions") if name in root}


def _bounds(kind: Schema) -> list[str]:
    """Text that is not free, as terminals that all hold."""
    shortest, longest = kind.get("minLength", 0), kind.get("maxLength", "")
    pattern = [_searched(str(kind["pattern"]))] if "pattern" in kind else []
    return [rf"/(.|\n){{{shortest},{longest}}}/", *pattern]


def _searched(pattern: str) -> str:
    """A regular expression for text in which a pattern is found, as JSON Schema has it, in Lark."""
    body = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", r"\n")
    before = r"(.|\n)*"
    behind = r"(.|\n)*"
    if body.startswith("^"):
        body, before = body[1:], ""
    if _ANCHOR.search(body):
        body, behind = body[:-1], ""
    return f"/{before}({body}){behind}/"
