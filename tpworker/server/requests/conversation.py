"""A conversation, as bodies have it that are about one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, WrapValidator, model_validator
from pydantic.config import JsonDict

from tpworker.chat.variables import NAMES, check_variables
from tpworker.errors import InvalidRequest
from tpworker.server.requests.fields import Body, bounds
from tpworker.server.requests.unsupported import MESSAGE

if TYPE_CHECKING:
    from tpworker.text.tokenizer import Tokenizer


class TextPart(Body):
    """A part of a message's content; there are only texts."""

    place = "messages.content."

    type: Literal["text"]
    text: str


def _or_string(schema: dict[str, Any]) -> None:
    schema["anyOf"].append({"type": "string"})


_SAYS_SOMETHING: JsonDict = {
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
    ]
}


class Message(Body):
    """A turn of a conversation."""

    model_config = ConfigDict(json_schema_extra=_SAYS_SOMETHING)
    unsupported = MESSAGE
    place = "messages."

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart] | None, WrapValidator(lambda c, check: c if type(c) is str else check(c))
    ] = Field(None, json_schema_extra=_or_string)
    """Or a string, which stays one. The assistant's alone may be missing, as where it called a tool."""
    name: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise InvalidRequest("content is missing; it should be a string, or a list of parts", "content")
        return self

    @property
    def num_chars(self) -> int:
        """Of its content."""
        content: str | list[TextPart] = self.content or ""
        return len(content) if isinstance(content, str) else sum(len(part.text) for part in content)

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: the developer called the system. The content as it came; none is ''."""
        content: str | list[TextPart] = self.content or ""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content if isinstance(content, str) else [part.model_dump() for part in content],
        }
        extra = {"name": self.name, "reasoning_content": self.reasoning_content}
        return message | {name: value for name, value in extra.items() if value is not None}


class Conversation(Body):
    """What a chat template is given."""

    messages: Annotated[list[Message], Field(min_length=1)]
    chat_template_kwargs: dict[str, Any] | None = bounds(propertyNames=NAMES)
    """Variables for the model's chat template, e.g. {"enable_thinking": false}."""
    add_generation_prompt: bool | None = None
    """False: the prompt does not end with what opens the assistant's turn."""
    continue_final_message: bool | None = None
    """Whether the answer continues the last message, instead of a turn of its own."""

    @property
    def num_chars(self) -> int:
        """Of all messages together."""
        return sum(message.num_chars for message in self.messages)

    def rendered(self, tokenizer: Tokenizer) -> str:
        """Its text. Takes its time: not for the event loop.

        Raises:
            InvalidRequest: the template refuses it, or there is none.
        """
        return tokenizer.apply_chat_template(
            [message.for_template() for message in self.messages],
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
            **(self.chat_template_kwargs or {}),
        )

    @model_validator(mode="after")
    def _variables_can_be_given(self) -> Conversation:
        check_variables(self.chat_template_kwargs or {})
        return self

    @model_validator(mode="after")
    def _opens_or_continues(self) -> Conversation:
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message exclude each other: give one",
                parameter="continue_final_message",
            )
        return self
