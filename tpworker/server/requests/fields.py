"""What all bodies have in common: how they take what they know, what they do not know, and what is not there.

known                  checked strictly: "5" is no number, and 1 is no truth; null is as if left out
not supported          refused, unless its value asks for nothing; all of them in one error
changes nothing here   accepted
anything else          ignored, and the answer says so: `tpworker.server.ignored`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from tpworker.server.ignored import ignore
from tpworker.server.requests.unsupported import Neutral, is_neutral
from tpworker.structured_outputs import MAX_SCHEMA_DEPTH

UNSUPPORTED = "unsupported"
"""The type of error that a parameter has which is not supported; its place is the parameter's."""


class Body(BaseModel):
    """A JSON object of a request; see above."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    unsupported: ClassVar[Neutral] = {}
    accepted: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[str] = ""
    """What stands before the names of fields where they are told of, as `messages.`."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """What of the document FastAPI cannot know: parameters that are not supported, and harmless ones."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        properties = schema["properties"]
        for name, neutral in cls.unsupported.items():
            properties[name] = {"enum": [*neutral, None], "description": "Not supported."}
        for name in sorted(cls.accepted):
            properties[name] = {"description": "Accepted; it changes nothing here."}
        return schema

    @model_validator(mode="wrap")
    @classmethod
    def _sift(cls, data: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return check(data)
        refused = [
            _unsupported([name], value)
            for name, value in data.items()
            if name in cls.unsupported and not is_neutral(value, cls.unsupported[name])
        ]
        known = {}
        for name, value in data.items():
            if name in cls.model_fields:
                if value is not None:
                    known[name] = value
            elif name not in cls.unsupported and name not in cls.accepted:
                ignore(cls.place + name)
        try:
            body = check(known)
        except ValidationError as error:
            deeper = [one for one in error.errors(include_url=False) if one["type"] == UNSUPPORTED]
            refused += [_unsupported(one["loc"], one["input"]) for one in deeper]
            if not refused:
                raise
        if refused:
            raise ValidationError.from_exception_data(cls.__name__, refused)
        return body


def _unsupported(place: Sequence[int | str], value: object) -> InitErrorDetails:
    kind = PydanticCustomError(UNSUPPORTED, "it is not supported")
    return InitErrorDetails(type=kind, loc=tuple(place), input=value)


def _integral(value: Any) -> Any:
    """4.0 is an integer in JSON, and some languages write all numbers so."""
    return int(value) if type(value) is float and value.is_integer() else value


def bounds(**said: object) -> Any:
    """Of an optional field: what the document says of its values. They are checked where they are used."""
    return Field(default=None, json_schema_extra=said)  # type: ignore[arg-type]


Integer = Annotated[int, BeforeValidator(_integral)]

TOKEN_ID: dict[str, Any] = {"title": "Token id", "type": "integer", "minimum": 0, "maximum": 2**31 - 1}
"""Of a token id the JSON schema; document.py puts the model's own maximum in."""
TokenId = Annotated[Integer, WithJsonSchema(TOKEN_ID)]
"""Whether the model has it, is seen where it is used."""


def check_depth(value: object) -> None:
    """Raises ValueError unless a value of JSON can be gone through by functions that call themselves."""
    level = [value]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_SCHEMA_DEPTH} levels, the limit")
