"""The body of /v1/responses. Nothing is stored, whatever `store` says: each request brings all its input."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema, WrapValidator, model_validator

from tpworker.chat.variables import NAMES, check_variables
from tpworker.errors import InvalidRequest
from tpworker.server.dialect import EFFORT
from tpworker.server.ignored import ignore
from tpworker.server.requests.conversation import Conversation
from tpworker.server.requests.fields import Body, Integer, bounds
from tpworker.server.requests.held import Held, format_held
from tpworker.server.requests.input import InputItem, messages_of, or_string, string_stays
from tpworker.server.requests.reasoning import Effort
from tpworker.server.requests.spoken import SpokenRequest
from tpworker.server.requests.tools import MAX_TOOLS, FlatTools
from tpworker.server.requests.unsupported import RESPONSES

_FORMAT = {
    "title": "Format",
    "anyOf": [
        {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "name": {"type": "string"},
                "description": {"type": "string"},
                "schema": {"type": "object"},
                "strict": {"type": "boolean"},
            },
            "required": ["type", "schema"],
        },
        {"type": "null"},
    ],
}


def _checked_format(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    format_held(value, "text.format.", flat=True)
    for name in (one for one in value if one not in ("type", "name", "schema", "strict", "description")):
        ignore(f"text.format.{name}")
    return value


class TextOptions(Body):
    """`text`."""

    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {"verbosity": ("medium",)}
    place = "text."

    format: Annotated[dict[str, Any] | None, BeforeValidator(_checked_format), WithJsonSchema(_FORMAT)] = None
    """What the answer is held to: JSON, or JSON of a schema."""


class ReasoningOptions(Body):
    """`reasoning`."""

    accepted: ClassVar[frozenset[str]] = frozenset(["summary", "generate_summary"])
    place = "reasoning."

    effort: Effort | None = None
    """As `reasoning_effort` of /v1/chat/completions."""


class ResponsesRequest(SpokenRequest):
    """The body of /v1/responses."""

    unsupported = RESPONSES
    prompt_name: ClassVar[str] = "input"
    limit_name: ClassVar[str] = "max_output_tokens"
    is_flat: ClassVar[bool] = True

    input: Annotated[list[InputItem], Field(min_length=1), WrapValidator(string_stays)] = Field(
        json_schema_extra=or_string
    )
    """The conversation, or a string: the user's one message."""
    instructions: str | None = None
    """What comes before it, as a message of the system."""
    max_output_tokens: Integer | None = bounds(minimum=0, maximum=2**31 - 1)
    chat_template_kwargs: dict[str, Any] | None = bounds(propertyNames=NAMES)
    """Variables for the model's chat template."""
    tools: FlatTools = Field(None, json_schema_extra={"maxItems": MAX_TOOLS})  # type: ignore[assignment]
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None

    @model_validator(mode="after")
    def _variables_can_be_given(self) -> ResponsesRequest:
        check_variables(self.chat_template_kwargs or {})
        return self

    @model_validator(mode="after")
    def _one_effort(self) -> ResponsesRequest:
        efforts = (self.reasoning_effort, None if self.reasoning is None else self.reasoning.effort)
        if None not in efforts and efforts[0] != efforts[1]:
            raise InvalidRequest("reasoning.effort and reasoning_effort differ: give one", "reasoning.effort")
        return self

    @model_validator(mode="after")
    def _says_something(self) -> ResponsesRequest:
        said: Any = self.input
        if not isinstance(said, str) and not self.instructions and not messages_of(said):
            raise InvalidRequest("input has no message: give one of the user's at least", "input")
        return self

    @property
    def _effort(self) -> tuple[str, str | None]:
        if self.reasoning is not None and self.reasoning.effort is not None:
            return "reasoning.effort", self.reasoning.effort
        return EFFORT, self.reasoning_effort

    @property
    def _all_held(self) -> list[Held]:
        asked = None if self.text is None else self.text.format
        held = None if asked is None else format_held(asked, "text.format.", flat=True)
        return [*([] if held is None else [held]), *super()._all_held]

    def conversation(self) -> Conversation:
        """What the chat template is given."""
        said: str | list[Any] = self.input
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(said, str):
            messages.append({"role": "user", "content": said})
        else:
            messages += messages_of(said)
        return Conversation.model_validate(
            {
                "messages": messages,
                "tools": [tool.function.for_template() for tool in self.tools or ()],
                "chat_template_kwargs": self.chat_template_kwargs,
            }
        )
