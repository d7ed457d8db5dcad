"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WrapValidator, model_validator

from tpworker.chat.variables import check_variables
from tpworker.config import SamplingParams
from tpworker.errors import InvalidRequest
from tpworker.server.requests.fields import Body, Integer
from tpworker.server.requests.generation import GenerationRequest
from tpworker.server.requests.unsupported import CHAT, MESSAGE


class TextPart(Body):
    """A part of a message's content; there are only texts."""

    place = "messages.content."

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation."""

    unsupported = MESSAGE
    place = "messages."

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart] | None, WrapValidator(lambda c, check: c if type(c) is str else check(c))
    ] = None
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


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    unsupported = CHAT
    default_max_tokens: ClassVar[int | None] = None  # as many as fit

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Integer | None = None
    """The newer name of max_tokens."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the model's chat template, e.g. {"enable_thinking": false}."""

    @property
    def num_chars(self) -> int:
        """Of all messages together."""
        return sum(message.num_chars for message in self.messages)

    @model_validator(mode="after")
    def _variables_can_be_given(self) -> ChatRequest:
        check_variables(self.chat_template_kwargs or {})
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} "
                "mean the same: give one",
                parameter="max_completion_tokens",
            )
        return self

    def sampling(self, detokenize: bool = True) -> SamplingParams:
        """As that of `CompletionRequest`."""
        if self.max_completion_tokens is None:
            return self._sampling(self.max_tokens, detokenize)
        try:
            return self._sampling(self.max_completion_tokens, detokenize)
        except InvalidRequest as error:
            if error.parameter != "max_tokens":
                raise
            raise InvalidRequest(
                str(error).replace("max_tokens", "max_completion_tokens"), "max_completion_tokens"
            ) from error
