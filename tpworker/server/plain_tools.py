"""Tools for models whose chat template knows none: told in plain messages, in the format of Hermes.

The first message, the system's, says what there is to be called, and how. Of earlier turns calls are text of
the assistant's, and results the user's. So the format is in the conversation for whatever model there is,
and calls are found in its outputs by the parser of that format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

_TOLD = """\
You may call functions to help with the user's request. These are their signatures:
<tools>
{}
</tools>

To call a function, write its name and its arguments as one JSON object between <tool_call> and </tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>"""


def told_of(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages whose first one, the system's, tells of tools."""
    told = _told(tools)
    if messages and messages[0]["role"] == "system":
        first, *others = messages
        return [_with_text(first, told), *others]
    return [{"role": "system", "content": told}, *messages]


def told_to_user(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages whose first one, the user's, begins with that."""
    first, *others = messages
    content = first["content"]
    if isinstance(content, str):
        return [{**first, "content": f"{_told(tools)}\n\n{content}"}, *others]
    return [{**first, "content": [{"type": "text", "text": _told(tools)}, *content]}, *others]


def _told(tools: Sequence[Mapping[str, Any]]) -> str:
    return _TOLD.format("\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def in_plain_words(messages: Sequence[Message]) -> list[Message]:
    """Messages without calls, and without the role `tool`: both are text."""
    plain: list[Message] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            result = f"<tool_response>\n{_text_of(message)}\n</tool_response>"
            if was_result:  # the results of one turn are one message
                plain[-1] = _with_text(plain[-1], result, between="\n")
            else:
                plain.append({"role": "user", "content": result})
        elif calls := message.get("tool_calls"):
            written = "\n".join(_call(call["function"]) for call in calls)
            others = {name: value for name, value in message.items() if name != "tool_calls"}
            plain.append(_with_text(others, written, between="\n"))
        else:
            plain.append(message)
        was_result = is_result
    return plain


def _call(function: Mapping[str, Any]) -> str:
    called = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(called, ensure_ascii=False)}\n</tool_call>"


def _text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _with_text(message: Message, text: str, between: str = "\n\n") -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": f"{content}{between}{text}" if content else text}
    return {**message, "content": [*content, {"type": "text", "text": text}]}
