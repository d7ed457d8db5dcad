"""What a function's schema says of its parameters, as far as a format needs to know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_DEEPEST = 16  # references and unions within each other
_NAMES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}

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


def branches(schema: Any, root: Schema, depth: int = 0) -> Iterator[Schema]:
    """The alternatives of a schema, each without alternatives on its top level."""
    schema = resolved(schema, root)
    union = schema.get("anyOf") or schema.get("oneOf")
    if not isinstance(union, list) or depth == _DEEPEST:
        yield schema
        return
    for branch in union:
        yield from branches(branch, root, depth + 1)


def types_of(schema: Any, root: Schema) -> frozenset[str]:
    """The JSON types that a value may have; empty: it may be anything."""
    types: set[str] = set()
    for branch in branches(schema, root):
        found = _types(branch, root)
        if not found:
            return frozenset()
        types |= found
    return frozenset(types)


def _types(branch: Schema, root: Schema) -> set[str]:
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
    if isinstance(parts, list):
        return next((set(found) for part in parts if (found := types_of(part, root))), set())
    return {"object"} if "properties" in branch else set()
