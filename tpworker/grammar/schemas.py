"""JSON schemas as trees: which values within a schema are schemas, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

_ONE = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames",
    "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def parts(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly within a schema, each behind the JSON pointer to it from there."""
    for key, value in schema.items():
        if key in _ONE and isinstance(value, (dict, bool)):
            yield f"/{key}", value
        elif key in _LISTS and isinstance(value, list):
            yield from ((f"/{key}/{i}", one) for i, one in enumerate(value))
        elif key in _NAMED and isinstance(value, dict):
            yield from ((f"/{key}/{_escaped(name)}", one) for name, one in value.items())


def pointed_at(schema: Any, pointer: str) -> Any:
    """What is at a JSON pointer; None: nothing."""
    value = schema
    for token in pointer.split("/")[1:]:
        token = token.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and token in value:
            value = value[token]
        elif isinstance(value, list) and token.isdecimal() and int(token) < len(value):
            value = value[int(token)]
        else:
            return None
    return value


def mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A schema in which `change` has been made to each schema within it, and to itself."""
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in change(schema).items():
        if key in _NAMED and isinstance(value, dict):
            made[key] = {name: mapped(one, change) for name, one in value.items()}
        elif key in _LISTS and isinstance(value, list):
            made[key] = [mapped(one, change) for one in value]
        elif key in _ONE:
            made[key] = mapped(value, change)
        else:
            made[key] = value
    return made


def with_refs(schema: Any, change: Callable[[str], str]) -> Any:
    """A schema whose references, and those of the schemas within it, are changed."""

    def changed(one: dict[str, Any]) -> dict[str, Any]:
        ref = one.get("$ref")
        return {**one, "$ref": change(ref)} if isinstance(ref, str) else one

    return mapped(schema, changed)


def compact(schema: Any) -> str:
    """A schema's text."""
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
