"""A conversation, as bodies have it that are about one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, WrapValidator, model_validator
from pydantic.config import JsonDict

from tpworker.chat.variables import NAMES, check_variables
from tpworker.errors import InvalidRequest
from tpworker.server.call_ids import with_ids_of
from tpworker.server.dialect import Dialect
from tpworker.server.plain_tools import in_plain_words, told_of, told_to_user
from tpworker.server.requests.fields import Body, bounds, check_depth
from tpworker.server.requests.tools import MAX_TOOLS, Tools
from tpworker.server.requests.unsupported import MESSAGE

if TYPE_CHECKING:
    from tpworker.text.tokenizer import Tokenizer

BROKEN = "INVALID_JSON"
"""What holds arguments that are no JSON, as pydantic-ai calls it, too."""


class TextPart(Body):
    """A part of a message's content; there are only texts."""

    place = "messages.content."

    type: Literal["text"]
    text: str


def _or_string(schema: dict[str, Any]) -> None:
    schema["anyOf"].append({"type": "string"})


def arguments_of(arguments: Any, check: Any) -> Any:
    """Arguments of a call, which come as JSON, as what that says.

    A model that is not held to its schema may have written anything. The conversation goes on all the same: a
    text that is no JSON of an object is kept as it is, in an object, as templates take nothing else.
    """
    if type(arguments) is not str:
        check_depth(arguments)
        return check(arguments)
    try:
        read = json.loads(arguments.strip() or "{}", parse_constant=_no_constant, parse_int=_number)
        check_depth(read)
        if "\\u" in arguments:
            read = _in_unicode(read)
    except (ValueError, RecursionError):
        read = None
    return read if isinstance(read, dict) else {BROKEN: arguments}


def _in_unicode(value: Any) -> Any:
    """A value of JSON in which halves of surrogate pairs are U+FFFD: a model may write one of two escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _number(digits: str) -> int | float:
    """An integer, if it is one that a process can be sent."""
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(digits)


_SAYS_SOMETHING: JsonDict = {
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
    ]
}


CalledName = Annotated[str, Field(min_length=1)]
"""Whatever the model has called: there need not be such a tool."""


class CalledFunction(Body):
    """Which function was called, and with what."""

    accepted: ClassVar[frozenset[str]] = frozenset(["parsed_arguments"])
    """The openai client's `parse` and `stream` add it to an answer, as they do `parsed`."""
    place = "messages.tool_calls.function."

    name: CalledName
    arguments: Annotated[dict[str, Any] | None, WrapValidator(arguments_of)] = Field(
        None, json_schema_extra=_or_string
    )
    """JSON, as it was in the answer."""


class ToolCall(Body):
    """A call of a tool in an earlier turn."""

    accepted: ClassVar[frozenset[str]] = frozenset(["index"])
    place = "messages.tool_calls."

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: its arguments are no text."""
        function = {"name": self.function.name, "arguments": self.function.arguments or {}}
        return {"type": "function", "function": function} | ({} if self.id is None else {"id": self.id})


class Message(Body):
    """A turn of a conversation."""

    model_config = ConfigDict(json_schema_extra=_SAYS_SOMETHING)
    accepted: ClassVar[frozenset[str]] = frozenset(["parsed"])
    unsupported = MESSAGE
    place = "messages."

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart] | None, WrapValidator(lambda c, check: c if type(c) is str else check(c))
    ] = Field(None, json_schema_extra=_or_string)
    """Or a string, which stays one. The assistant's alone may be missing, as where it called a tool."""
    name: str | None = None
    reasoning_content: str | None = None
    """Of the assistant: what it thought."""
    reasoning: str | None = None
    """The same."""
    tool_calls: list[ToolCall] | None = None
    """Of the assistant: what it called."""
    tool_call_id: str | None = None
    """Of a tool: which call it answers."""

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise InvalidRequest("content is missing; it should be a string, or a list of parts", "content")
        return self

    @model_validator(mode="after")
    def _says_what_it_may(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise InvalidRequest(f"tool_calls are the assistant's, and not the {self.role}'s", "tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise InvalidRequest(f"tool_call_id is a tool's, and not the {self.role}'s", "tool_call_id")
        return self

    @property
    def num_chars(self) -> int:
        """Of its content, its thinking and its calls."""
        content: str | list[TextPart] = self.content or ""
        num_said = len(content) if isinstance(content, str) else sum(len(part.text) for part in content)
        num_thought = len(self.reasoning_content or self.reasoning or "")
        return num_said + num_thought + sum(len(str(call.function)) for call in self.tool_calls or ())

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: the developer called the system. The content as it came; none is ''."""
        content: str | list[TextPart] = self.content or ""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content if isinstance(content, str) else [part.model_dump() for part in content],
        }
        extra = {
            "name": self.name,
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_calls": [call.for_template() for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
        }
        return message | {name: value for name, value in extra.items() if value is not None}


class Conversation(Body):
    """What a chat template is given."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Tools = Field(None, json_schema_extra={"maxItems": MAX_TOOLS})
    chat_template_kwargs: dict[str, Any] | None = bounds(propertyNames=NAMES)
    """Variables for the model's chat template, e.g. {"enable_thinking": false}."""
    add_generation_prompt: bool | None = None
    """False: the prompt does not end with what opens the assistant's turn."""
    continue_final_message: bool | None = None
    """Whether the answer continues the last message, instead of a turn of its own."""

    @property
    def num_chars(self) -> int:
        """Of all messages and tools together."""
        num_told = sum(len(str(tool.function)) for tool in self.tools or ())
        return num_told + sum(message.num_chars for message in self.messages)

    def variables_for(self, dialect: Dialect) -> dict[str, Any]:
        """Variables for the chat template."""
        return dict(self.chat_template_kwargs or {})

    def rendered(self, tokenizer: Tokenizer, dialect: Dialect, variables: Mapping[str, Any]) -> str:
        """Its text. Takes its time: not for the event loop.

        Args:
            dialect: what its template knows.
            variables: from `variables_for`.

        Raises:
            InvalidRequest: the template refuses it, or there is none.
        """
        messages: list[Mapping[str, Any]] = [message.for_template() for message in self.messages]
        tools = [tool.function.for_template() for tool in self.tools or ()] or None
        if not dialect.shows_calls:
            messages = in_plain_words(messages)
        elif dialect.id_length is not None:
            messages = with_ids_of(dialect.id_length, messages)
        render = partial(
            tokenizer.apply_chat_template,
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
            **variables,
        )
        if tools is None or dialect.shows_tools or not dialect.tells_tools:
            return render(messages, tools=tools if dialect.shows_tools else None)
        try:
            return render(told_of(messages, tools))
        except InvalidRequest:
            if messages[0]["role"] != "user":
                raise
            return render(told_to_user(messages, tools))  # templates that take no system's message

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
