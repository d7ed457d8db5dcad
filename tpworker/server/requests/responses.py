"""The body of /v1/responses. Nothing is stored, whatever `store` says: each request brings all its input."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WrapValidator, model_validator
from pydantic.config import JsonDict

from tpworker.chat.variables import NAMES, check_variables
from tpworker.server.requests.conversation import Conversation
from tpworker.server.requests.fields import Body, Integer, bounds
from tpworker.server.requests.generation import GenerationRequest
from tpworker.server.requests.unsupported import RESPONSES


class InputPart(Body):
    """A text, of the client's or out of an earlier answer."""

    accepted: ClassVar[frozenset[str]] = frozenset(["annotations", "logprobs"])
    place = "input.content."

    type: Literal["input_text", "output_text", "text"]
    text: str


def _or_string(schema: JsonDict) -> None:
    array: JsonDict = {name: schema.pop(name) for name in ("type", "items", "minItems") if name in schema}
    schema["anyOf"] = [{"type": "string"}, array]


def _string_stays(value: Any, check: Any) -> Any:
    return value if type(value) is str else check(value)


class InputMessage(Body):
    """A turn of the conversation: of the client's, or the output of an earlier answer."""

    accepted: ClassVar[frozenset[str]] = frozenset(["id", "status", "phase"])
    place = "input."

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[InputPart], WrapValidator(_string_stays)] = Field(json_schema_extra=_or_string)
    """Or a string."""

    def as_message(self) -> dict[str, Any]:
        """As /v1/chat/completions has it."""
        content: str | list[InputPart] = self.content
        if isinstance(content, list):
            return {"role": self.role, "content": [{"type": "text", "text": part.text} for part in content]}
        return {"role": self.role, "content": content}


class ResponsesRequest(GenerationRequest):
    """The body of /v1/responses."""

    unsupported = RESPONSES
    prompt_name: ClassVar[str] = "input"
    limit_name: ClassVar[str] = "max_output_tokens"

    input: Annotated[list[InputMessage], Field(min_length=1), WrapValidator(_string_stays)] = Field(
        json_schema_extra=_or_string
    )
    """The conversation, or a string: the user's one message."""
    instructions: str | None = None
    """What comes before it, as a message of the system."""
    max_output_tokens: Integer | None = bounds(minimum=0, maximum=2**31 - 1)
    chat_template_kwargs: dict[str, Any] | None = bounds(propertyNames=NAMES)
    """Variables for the model's chat template."""

    @model_validator(mode="after")
    def _variables_can_be_given(self) -> ResponsesRequest:
        check_variables(self.chat_template_kwargs or {})
        return self

    def conversation(self) -> Conversation:
        """What the chat template is given."""
        said: str | list[InputMessage] = self.input
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(said, str):
            messages.append({"role": "user", "content": said})
        else:
            messages += [message.as_message() for message in said]
        return Conversation.model_validate(
            {"messages": messages, "chat_template_kwargs": self.chat_template_kwargs}
        )
