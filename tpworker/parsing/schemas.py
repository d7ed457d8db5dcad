"""What a function's schema says of its parameters, as far as a format needs to know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_DEEPEST = 16  # references, one to the next, and sets of parts within each other
_MOST = 256  # alternatives whose types are looked at
_NAMES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
JSON_TYPES = tuple(_NAMES.values())

Schema = Mapping[str, Any]


def type_of(value: Any) -> str:
    """The JSON type of a value that `json.loads` gave."""
    return _NAMES[type(value)]


def properties_of(schema: Schema) -> dict[str, Any]:
    """The parameters that it names, each with its schema."""
    properties = resolved(schema, schema).get("properties")
    return dict(properties) if isinstance(properties, Mapping) else {}


def property_of(schema: Schema, name: str) -> Any:
    """The schema of a parameter; an empty one where it says nothing."""
    found = properties_of(schema).get(name)
    if found is None:
        found = resolved(schema, schema).get("additionalProperties")
    return found if isinstance(found, Mapping) else {}


def resolved(schema: Any, root: Schema) -> Schema:
    """A schema, or what it refers to within the root. References to elsewhere say nothing."""
    for _ in range(_DEEPEST):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = root if reference.startswith("#") else {}
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(key, {}) if isinstance(schema, Mapping) else {}
    return {}


def branches(schema: Any, root: Schema) -> Iterator[Schema]:
    """The alternatives of a schema, each once, and without alternatives on its top level. One that is within
    itself is none of its own."""
    seen: dict[int, Schema] = {}
    waiting = [schema]
    while waiting:
        schema = resolved(waiting.pop(), root)
        if id(schema) in seen:
            continue
        seen[id(schema)] = schema
        union = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(union, list):
            waiting += reversed(union)
        else:
            yield schema


def types_of(schema: Any, root: Schema) -> frozenset[str]:
    """The JSON types that a value may have; empty: it may be anything, or there is too much to tell."""
    return _types_of(schema, root, {}, 0)


_Known = dict[int, tuple[Schema, frozenset[str]]]
"""By its id a schema without alternatives, and its types; of one that is within itself, none."""


def _types_of(schema: Any, root: Schema, known: _Known, depth: int) -> frozenset[str]:
    types: frozenset[str] = frozenset()
    for count, branch in enumerate(branches(schema, root)):
        if id(branch) not in known:
            known[id(branch)] = branch, frozenset()
            known[id(branch)] = branch, frozenset(_types(branch, root, known, depth))
        found = known[id(branch)][1]
        if not found or count == _MOST:
            return frozenset()
        types |= found
    return types


def _types(branch: Schema, root: Schema, known: _Known, depth: int) -> set[str]:
    given = branch.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {name for name in given if isinstance(name, str)}
    if isinstance(branch.get("enum"), list):
        return {type_of(value) for value in branch["enum"]}
    if "const" in branch:
        return {type_of(branch["const"])}
    parts = branch.get("allOf")
    if isinstance(parts, list) and depth < _DEEPEST:
        of_parts = (_types_of(part, root, known, depth + 1) for part in parts)
        return next((set(found) for found in of_parts if found), set())
    return {"object"} if "properties" in branch else set()
