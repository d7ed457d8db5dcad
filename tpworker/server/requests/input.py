"""The items of which the input of /v1/responses is made, and the messages that they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, WrapValidator
from pydantic.config import JsonDict

from tpworker.server.requests.conversation import CalledName, arguments_of
from tpworker.server.requests.fields import Body


class InputPart(Body):
    """A text, of the client's or out of an earlier answer."""

    accepted: ClassVar[frozenset[str]] = frozenset(["annotations", "logprobs", "parsed"])
    place = "input.content."

    type: Literal["input_text", "output_text", "text"]
    text: str


class ThoughtPart(Body):
    """A text that the model thought."""

    place = "input.content."

    type: Literal["reasoning_text"]
    text: str


def or_string(schema: JsonDict) -> None:
    """Of a list's JSON schema: or a string."""
    array: JsonDict = {name: schema.pop(name) for name in ("type", "items", "minItems") if name in schema}
    schema["anyOf"] = [{"type": "string"}, array]


def string_stays(value: Any, check: Any) -> Any:
    """A string as it is, anything else checked."""
    return value if type(value) is str else check(value)


Parts = Annotated[list[InputPart], WrapValidator(string_stays)]


class InputMessage(Body):
    """A turn of the conversation: of the client's, or the output of an earlier answer."""

    accepted: ClassVar[frozenset[str]] = frozenset(["id", "status", "phase"])
    place = "input."

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts = Field(json_schema_extra=or_string)
    """Or a string."""


class InputCall(Body):
    """A call of a tool, out of an earlier answer."""

    accepted: ClassVar[frozenset[str]] = frozenset(["id", "status"])
    place = "input."

    type: Literal["function_call"]
    call_id: str
    name: CalledName
    arguments: Annotated[dict[str, Any], WrapValidator(arguments_of)] = Field(
        json_schema_extra={"type": "string"}
    )
    """JSON, as it was in the answer."""


class InputResult(Body):
    """What came of a call."""

    accepted: ClassVar[frozenset[str]] = frozenset(["id", "status"])
    place = "input."

    type: Literal["function_call_output"]
    call_id: str
    output: Parts = Field(json_schema_extra=or_string)
    """Or a string."""


class InputReasoning(Body):
    """What the model thought, out of an earlier answer."""

    accepted: ClassVar[frozenset[str]] = frozenset(["id", "status", "summary", "encrypted_content"])
    place = "input."

    type: Literal["reasoning"]
    content: list[ThoughtPart] | None = None


_KINDS = ("message", "function_call", "function_call_output", "reasoning")
# Tags are no part of an item's place: `tpworker.server.refusals` leaves out what is in angle brackets.


def _kind(item: Any) -> str:
    """Which of them it is; of an unknown type a message, where that is told."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return f"<{kind if kind in _KINDS else 'message'}>"


InputItem = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputCall, Tag("<function_call>")]
    | Annotated[InputResult, Tag("<function_call_output>")]
    | Annotated[InputReasoning, Tag("<reasoning>")],
    Discriminator(_kind),
]


def messages_of(items: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages that items are, as /v1/chat/completions has them. What the assistant thinks, says and
    calls in a row is one turn of its."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case InputMessage():
                message = {"role": item.role, "content": _content(item.content)}
                last = messages[-1] if messages else {}
                if item.role == "assistant" and set(last) == {"role", "reasoning_content"}:
                    last.update(message)
                else:
                    messages.append(message)
            case InputReasoning():
                thought = "\n".join(part.text for part in item.content or ())
                if thought:
                    messages.append({"role": "assistant", "reasoning_content": thought})
            case InputCall():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                messages[-1].setdefault("tool_calls", []).append(call)
            case InputResult():
                messages.append(
                    {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
                )
    return messages


def _content(content: str | list[InputPart]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} for part in content]
