"""Schemas that outputs are held to, of which kinds they are, and who judges what came: jsonschema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

SUITE = Path(__file__).resolve().parents[2] / "tests/grammar/schemas.json"
FORMATS = ("ipv4", "ipv6", "email", "uuid")
"""That are checked. Of dates and times Python knows fewer than RFC 3339 has: no year 0, no leap second."""

KINDS: dict[str, frozenset[str]] = {
    "enums": frozenset({"enum", "const"}),
    "unions": frozenset({"anyOf", "oneOf", "allOf"}),
    "patterns and formats": frozenset({"pattern", "patternProperties", "format"}),
    "bounds": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength"}
    ),
    "arrays": frozenset({"items", "prefixItems"}),
    "refs": frozenset({"$ref"}),
}
"""By name, the keywords of which it has one. A schema may be of several kinds, see `Entry.kinds`."""
NESTED, RECURSIVE, PLAIN = "nested objects", "recursion", "others"
ALL_KINDS = (*KINDS, NESTED, RECURSIVE, PLAIN)


@dataclass(frozen=True, slots=True)
class Entry:
    """A schema of the suite."""

    name: str
    schema: dict[str, Any]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Some of `ALL_KINDS`, at least one."""
        parts = list(_parts(self.schema))
        keywords = {keyword for part in parts for keyword in part}
        found = [kind for kind, of_kind in KINDS.items() if of_kind & keywords]
        if any(isinstance(part.get("type"), list) for part in parts) and "unions" not in found:
            found.append("unions")
        if any("properties" in inner for part in parts if "properties" in part for inner in _below(part)):
            found.append(NESTED)
        if self._is_recursive():
            found.append(RECURSIVE)
        return tuple(found) or (PLAIN,)

    @property
    def prompt(self) -> str:
        """Asks for such a value."""
        text = json.dumps(self.schema, ensure_ascii=False, separators=(",", ":"))
        return f"JSON schema ({self.name}):\n{text}\n\nAn example of a value that fits this schema:\n"

    def why_invalid(self, text: str) -> str:
        """What is wrong with a whole output; '': nothing."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"no JSON: {error}"
        make = jsonschema.validators.validator_for(self.schema, jsonschema.Draft202012Validator)
        judge = make(self.schema, format_checker=jsonschema.FormatChecker(FORMATS))
        return "; ".join(f"{error.json_path}: {error.message}" for error in judge.iter_errors(value))

    def _is_recursive(self) -> bool:
        """Whether a part of it refers, by way of others or not, to one that it is in."""

        def comes_back(part: object, above: frozenset[str]) -> bool:
            return any(
                reference in above or comes_back(self._part(reference), above | {reference})
                for reference in (one["$ref"] for one in _parts(part) if isinstance(one.get("$ref"), str))
            )

        root = {key: value for key, value in self.schema.items() if key not in ("$defs", "definitions")}
        return comes_back(root, frozenset({"#"}))

    def _part(self, reference: str) -> Any:
        part: Any = self.schema
        for key in reference.removeprefix("#").split("/")[1:]:
            part = part[key]
        return part


def read_suite(file: Path) -> list[Entry]:
    """Of a JSON file: a list of objects with `name` and `schema`.

    Raises:
        ValueError: it is something else, or a name comes twice.
    """
    try:
        entries = [Entry(one["name"], one["schema"]) for one in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no list of objects with name and schema: {error!r}") from None
    if not entries or len({entry.name for entry in entries}) < len(entries):
        raise ValueError(f"{file} has no schema, or two of one name")
    return entries


def kinds_of(entries: Sequence[Entry]) -> dict[str, set[str]]:
    """By kind, the names of the schemas that are of it; none is empty."""
    of_kind = {kind: {entry.name for entry in entries if kind in entry.kinds} for kind in ALL_KINDS}
    return {kind: names for kind, names in of_kind.items() if names}


def _parts(schema: object) -> Iterator[dict[str, Any]]:
    """All objects of a schema, itself first."""
    if isinstance(schema, dict):
        yield schema
    yield from _below(schema)


def _below(schema: object) -> Iterator[dict[str, Any]]:
    values = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for value in values:
        yield from _parts(value)
