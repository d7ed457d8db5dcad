"""JSON schemas as they stand in a grammar: without what says nothing and would be refused all the same, and
with white space that comes to an end."""

from __future__ import annotations

import json
from typing import Any

from tpworker.grammar.schemas import compact, mapped

ANY_OBJECT = '{"type":"object"}'
SPACE = r"[ \t\r\n]{0,64}"
"""Between two parts of a JSON text: a new line and fifteen levels of four spaces."""
_SAY_NOTHING = (("uniqueItems", False), ("unevaluatedProperties", True), ("unevaluatedItems", True))
_FORMATS = (
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid",
)  # fmt: skip
"""Those that llguidance holds to. Others say nothing: to JSON Schema a format that is not known is a note."""
_LEAST, _NEXT = -(1 << 63), -(1 << 63) + 1024


def as_llguidance_takes_it(schema: Any) -> Any:
    """A schema as `supported`, in which white space comes to an end.

    How much of it stands between two parts is bounded, unless the schema says it: a model that has begun with
    it may else never go on.
    """
    schema = supported(schema)
    if schema is True:
        schema = {}
    return {"x-guidance": {"whitespace_pattern": SPACE}, **schema} if isinstance(schema, dict) else schema


def supported(schema: Any) -> Any:
    """A schema without the keywords that llguidance refuses and that say nothing as they are here.

    The least 64-bit integer is no bound that it takes: the next float stands in its place.
    """

    def without(one: dict[str, Any]) -> dict[str, Any]:
        kept = {
            key: value
            for key, value in one.items()
            if (key, value) not in _SAY_NOTHING and not (key == "format" and _is_note(value))
        }
        return kept | {key: _NEXT for key in ("minimum", "exclusiveMinimum") if kept.get(key) == _LEAST}

    return mapped(schema, without)


def _is_note(value: Any) -> bool:
    return isinstance(value, str) and value not in _FORMATS


def as_held(schema: str) -> str:
    """A schema's text, as it stands in a grammar."""
    return compact(as_llguidance_takes_it(json.loads(schema)))
