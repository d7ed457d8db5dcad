"""Outputs of each format, as the models' chat templates write them, and what a parser says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tpworker.parsing import (
    TOOL_FORMATS,
    CallArguments,
    CallBegan,
    Content,
    Event,
    Function,
    OutputParser,
    Reasoning,
    ToolFormat,
)
from tpworker.structured_outputs import Thinking

Call = tuple[str, dict[str, Any]]

FUNCTIONS = (
    Function(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "tags": {"type": "array"},
                "options": {"type": "object"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "kind": {"$ref": "#/$defs/Kind"},
            },
            "$defs": {"Kind": {"enum": ["warm", "cold"]}},
        },
    ),
    Function("ping"),
)


@dataclass(frozen=True)
class Family:
    """A format, and how a template of it writes text and calls."""

    name: str
    tools: ToolFormat
    write: Callable[[str, Sequence[Call]], str]


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _marked(before: str, calls: Sequence[Call]) -> str:
    texts = [f'\n<tool_call>\n{{"name": "{n}", "arguments": {_dumps(a)}}}\n</tool_call>' for n, a in calls]
    return before + "".join(texts)


def _tagged(value: Any) -> str:
    return value if isinstance(value, str) else _dumps(value)


def _glm(before: str, calls: Sequence[Call], newline: str = "\n") -> str:
    text = before
    for name, arguments in calls:
        pairs = [
            f"<arg_key>{key}</arg_key>{newline}<arg_value>{_tagged(value)}</arg_value>{newline}"
            for key, value in arguments.items()
        ]
        text += f"{newline}<tool_call>{name}{newline}{''.join(pairs)}</tool_call>"
    return text


def _glm47(before: str, calls: Sequence[Call]) -> str:
    return _glm(before, calls, newline="")


def _qwen_coder(before: str, calls: Sequence[Call]) -> str:
    text = before
    for name, arguments in calls:
        pairs = [f"<parameter={k}>\n{_tagged(v)}\n</parameter>\n" for k, v in arguments.items()]
        text += f"\n<tool_call>\n<function={name}>\n{''.join(pairs)}</function>\n</tool_call>"
    return text


def _llama(before: str, calls: Sequence[Call]) -> str:
    texts = [f'{{"name": "{n}", "parameters": {_dumps(a)}}}' for n, a in calls]
    return before + ("<|python_tag|>" if before and calls else "") + "; ".join(texts)


def _mistral(before: str, calls: Sequence[Call]) -> str:
    texts = [f'{{"name": "{n}", "arguments": {_dumps(a)}, "id": "a1b2c3d4e"}}' for n, a in calls]
    return before + (f"[TOOL_CALLS] [{', '.join(texts)}]" if calls else "")


def _mistral11(before: str, calls: Sequence[Call]) -> str:
    return before + "".join(f"[TOOL_CALLS]{n}[ARGS]{_dumps(a)}" for n, a in calls)


def _mistral_ids(before: str, calls: Sequence[Call]) -> str:
    return before + "".join(f"[TOOL_CALLS]{n}[CALL_ID]a1b2c3d4e[ARGS]{_dumps(a)}" for n, a in calls)


FAMILIES = (
    Family("hermes", TOOL_FORMATS["hermes"], _marked),
    Family("ernie45", TOOL_FORMATS["ernie45"], _marked),
    Family("glm45", TOOL_FORMATS["glm45"], _glm),
    Family("glm47", TOOL_FORMATS["glm45"], _glm47),
    Family("qwen3_coder", TOOL_FORMATS["qwen3_coder"], _qwen_coder),
    Family("llama3_json", TOOL_FORMATS["llama3_json"], _llama),
    Family("mistral", TOOL_FORMATS["mistral"], _mistral),
    Family("mistral11", TOOL_FORMATS["mistral"], _mistral11),
    Family("mistral_ids", TOOL_FORMATS["mistral"], _mistral_ids),
)

MARKS = sorted({mark for tools in TOOL_FORMATS.values() for mark in tools.special})

CASES: dict[str, tuple[str, list[Call]]] = {
    "a call": ("", [("get_weather", {"city": "Paris", "days": 3})]),
    "text before it": ("Let me see.", [("get_weather", {"city": "Paris"})]),
    "no arguments": ("", [("ping", {})]),
    "several": ("Both.", [("get_weather", {"city": "Paris"}), ("ping", {}), ("get_weather", {"days": 1})]),
    "quotes": ("", [("get_weather", {"city": 'a "b" \\ c\\" }] {[', "note": "'; ,:"})]),
    "line breaks": ("", [("get_weather", {"city": "a\nb\n\tc", "note": "x\r\ny"})]),
    "marks": ("", [("get_weather", {"city": "<tool_call> </tool_call> [TOOL_CALLS] <|python_tag|> <"})]),
    "other scripts": ("Grüße 你好 👩‍👩‍👧", [("get_weather", {"city": "München 北京 🇩🇪", "note": "\u2028é"})]),
    "nested": ("", [("get_weather", {"options": {"a": [{"b": "}]"}, []], "c": {}}, "tags": [[1], "["]})]),
    "other types": ("", [("get_weather", {"days": -4, "exact": True, "note": None, "kind": "warm"})]),
    "looks like JSON": ("", [("get_weather", {"city": "12", "note": "true", "kind": "cold"})]),
    "a name nobody knows": ("", [("look_up", {"query": "x y"})]),
    "keys nobody knows": ("", [("get_weather", {"when": "now", "count": 2, "all": [1]})]),
}


def joined(events: Sequence[Event]) -> list[Event]:
    """Neighbours of one kind as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        match last, event:
            case Content(), Content():
                found[-1] = Content(last.text + event.text)
            case Reasoning(), Reasoning():
                found[-1] = Reasoning(last.text + event.text)
            case CallArguments(), CallArguments() if last.index == event.index:
                found[-1] = CallArguments(event.index, last.text + event.text)
            case _:
                found.append(event)
    return found


def parsed(
    pieces: Sequence[str],
    tools: ToolFormat | None,
    functions: Sequence[Function] = FUNCTIONS,
    thinking: Thinking | None = None,
) -> list[Event]:
    """What a parser says of text in pieces, joined. No event of it is empty."""
    parser = OutputParser(thinking, tools, functions)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert all(event.text for event in events if not isinstance(event, CallBegan))
    assert parser.num_calls == sum(isinstance(event, CallBegan) for event in events)
    return joined(events)


def cuts(text: str) -> list[list[str]]:
    """The text in two pieces, cut at every place, and in pieces of every size."""
    halves = [[text[:at], text[at:]] for at in range(1, len(text))]
    sizes = [[text[at : at + size] for at in range(0, len(text), size)] for size in range(1, len(text))]
    return halves + sizes


def content(events: Sequence[Event]) -> str:
    """What is said."""
    return "".join(event.text for event in events if isinstance(event, Content))


def calls(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Names, and arguments as text."""
    found: list[tuple[str, str]] = []
    for event in events:
        match event:
            case CallBegan(index, name):
                assert index == len(found)
                found.append((name, ""))
            case CallArguments(index, text):
                assert index == len(found) - 1
                found[-1] = (found[-1][0], found[-1][1] + text)
    return found
