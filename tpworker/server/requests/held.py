"""What an output is held to: each way in which clients say it, and which of them it was.

response_format                    OpenAI's
structured_outputs                 vLLM's; before it guided_json, guided_regex, guided_choice, guided_grammar
json_schema, regex, ebnf           SGLang's
grammar, json_schema               llama.cpp's

Whatever is wrong with it, is told by the name that the client gave it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema, model_validator

from tpworker.errors import InvalidRequest, shown
from tpworker.server.ignored import ignore
from tpworker.server.requests.fields import Body, bounds
from tpworker.structured_outputs import (
    KINDS,
    MAX_GRAMMAR_TEXT,
    MAX_REGEX,
    MAX_STRINGS,
    PARAMETER,
    StructuredOutputs,
    Thinking,
)

_OBJECT: dict[str, Any] = {"type": "object"}
_SCHEMA: dict[str, Any] = {"anyOf": [_OBJECT, {"type": "string"}]}
_TYPES = ("text", "json_object", "json_schema", "structural_tag")
_FORMAT = {
    "title": "Response format",
    "anyOf": [
        {"type": "object", "properties": {"type": {"const": "text"}}, "required": ["type"]},
        {
            "type": "object",
            "properties": {"type": {"const": "json_object"}, "schema": _OBJECT},
            "required": ["type"],
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string"},
                        "description": {"type": "string"},
                        "schema": _OBJECT,
                        "strict": {"type": "boolean"},
                    },
                    "required": ["schema"],
                },
            },
            "required": ["type", "json_schema"],
        },
        {"type": "object", "properties": {"type": {"const": "structural_tag"}}, "required": ["type"]},
        {"type": "null"},
    ],
}
_HELD_TO = {
    "title": "Structured outputs",
    "anyOf": [
        {
            "type": "object",
            "minProperties": 1,
            "properties": {
                "json": _SCHEMA,
                "json_object": {"const": True},
                "regex": {"type": "string", "minLength": 1},
                "choice": {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                "grammar": {"type": "string", "minLength": 1},
                "structural_tag": _SCHEMA,
            },
        },
        {"type": "null"},
    ],
}


_NAMES = re.compile(rf"{PARAMETER}(\.({'|'.join(KINDS)})\b)?")


@dataclass(frozen=True)
class Held:
    """What the output is held to, and by which parameter.

    Args:
        kind: which field of `StructuredOutputs` it is.
        value: that field's.
        name: how the client gave it, as `response_format.json_schema.schema`.
    """

    kind: str
    value: Any
    name: str

    def outputs(self, behind: Thinking | None) -> StructuredOutputs:
        """As the runtime has it. Raises InvalidRequest in its words; see `in_words_of`."""
        return StructuredOutputs(**{self.kind: self.value}, behind=behind)


def in_words_of(name: str, message: str) -> str:
    """What the runtime says of structured outputs, with the name that they were given by."""
    return _NAMES.sub(lambda found: name, message)


def format_held(value: Mapping[str, Any], name: str = "", flat: bool = False) -> Held | None:
    """What a response format asks for; None: plain text.

    Args:
        name: what its parameters' names begin with where they are told of, as `response_format.`.
        flat: a schema stands beside its type, as in /v1/responses.

    Raises:
        InvalidRequest: it is none. Its parameter is the part that is wrong, `name` left out.
    """
    kind = value.get("type")
    if kind not in _TYPES or (flat and kind == "structural_tag"):
        known = ", ".join(_TYPES[:3] if flat else _TYPES)
        raise InvalidRequest(f"{name}type={shown(kind)}: it should be one of {known}", "type")
    if kind == "text":
        return None
    if kind == "structural_tag":
        return Held("structural_tag", value, name.rstrip("."))
    if kind == "json_object":
        schema = value.get("schema")  # as llama.cpp and others take it
        if schema is None:
            return Held("json_object", True, name.rstrip("."))
        return Held("json", _object(schema, name, "schema"), f"{name}schema")
    if flat:
        _check_labels(value, name, "")
        return Held("json", _object(value.get("schema"), name, "schema"), f"{name}schema")
    inner = _object(value.get("json_schema"), name, "json_schema")
    _check_labels(inner, name, "json_schema.")
    for known_name in (one for one in inner if one not in ("name", "schema", "strict", "description")):
        ignore(f"{name}json_schema.{known_name}")
    schema = _object(inner.get("schema"), name, "json_schema.schema")
    return Held("json", schema, f"{name}json_schema.schema")


def _check_labels(labels: Mapping[str, Any], name: str, place: str) -> None:
    """What stands beside a schema changes nothing here, but must be what it should."""
    for label, kind in (("name", str), ("description", str), ("strict", bool)):
        value = labels.get(label)
        if value is not None and type(value) is not kind:
            what = "true or false" if kind is bool else "a string"
            raise InvalidRequest(
                f"{name}{place}{label}={shown(value)}: it should be {what}", f"{place}{label}"
            )


def _object(value: Any, name: str, parameter: str) -> Mapping[str, Any]:
    if value is None:
        raise InvalidRequest(f"{name}{parameter} is missing", parameter)
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name}{parameter}={shown(value)}: it should be a JSON object", parameter)
    return value


def _checked_format(value: Any) -> Any:
    if not isinstance(value, dict):
        return value  # its type is found wrong
    if (held := format_held(value, "response_format.")) is None or held.kind != "structural_tag":
        for name in (one for one in value if one not in ("type", "json_schema", "schema")):
            ignore(f"response_format.{name}")
    return value


def _checked_outputs(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for name in (one for one in value if one not in KINDS):
        ignore(f"structured_outputs.{name}")
    given = {name: one for name, one in value.items() if name in KINDS and one not in (None, False)}
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise InvalidRequest(f"structured_outputs has {found}: give exactly one of {', '.join(KINDS)}")
    return given


def _text_or_object(value: Any) -> Any:
    if not isinstance(value, (str, dict)):
        raise ValueError("it should be a JSON object, or JSON of one as a string")
    return value


ResponseFormat = Annotated[dict[str, Any] | None, BeforeValidator(_checked_format), WithJsonSchema(_FORMAT)]
HeldTo = Annotated[dict[str, Any] | None, BeforeValidator(_checked_outputs), WithJsonSchema(_HELD_TO)]
Schema = Annotated[
    Any, BeforeValidator(_text_or_object), WithJsonSchema({"anyOf": [*_SCHEMA["anyOf"], {"type": "null"}]})
]

_ALIASES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
}


class HeldOutput(Body):
    """What the output is held to; see above. At most one of these is given."""

    response_format: ResponseFormat = None
    """JSON, or JSON of a schema. It is held to that, whatever `strict` says."""
    structured_outputs: HeldTo = None
    """With exactly one of json, json_object, regex, choice, grammar (Lark or GBNF), structural_tag."""
    guided_json: Schema = None
    """Older names of the same."""
    guided_regex: str | None = bounds(minLength=1, maxLength=MAX_REGEX)
    guided_choice: list[str] | None = bounds(minItems=1, maxItems=MAX_STRINGS)
    guided_grammar: str | None = bounds(minLength=1, maxLength=MAX_GRAMMAR_TEXT)
    structural_tag: Schema = None
    json_schema: Schema = None
    """SGLang's names."""
    regex: str | None = bounds(minLength=1, maxLength=MAX_REGEX)
    ebnf: str | None = bounds(minLength=1, maxLength=MAX_GRAMMAR_TEXT)
    grammar: str | None = bounds(minLength=1, maxLength=MAX_GRAMMAR_TEXT)
    """llama.cpp's name."""

    @property
    def held(self) -> Held | None:
        """What the output is held to; None: to nothing."""
        return next(iter(self._all_held), None)

    @property
    def _all_held(self) -> list[Held]:
        """All that is given."""
        every = []
        if self.response_format is not None:
            every.append(format_held(self.response_format, "response_format."))
        if self.structured_outputs is not None:
            (kind, value), *_ = self.structured_outputs.items()
            every.append(Held(kind, value, f"structured_outputs.{kind}"))
        for name, kind in _ALIASES.items():
            if (value := getattr(self, name)) is not None:
                every.append(Held(kind, value, name))
        return [held for held in every if held is not None]

    @model_validator(mode="after")
    def _held_to_one(self) -> HeldOutput:
        names = [held.name for held in self._all_held]
        if len(names) > 1:
            raise InvalidRequest(
                f"{' and '.join(names)} all say what the output is held to: give one", names[1]
            )
        return self
