"""/v1/responses beyond text: calls of tools, thinking, and what the answer is held to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pydantic
import pytest

from tests.server.conftest import MODEL
from tests.server.test_reasoning import OPENS, SAID, thinker
from tests.server.test_responses import RESPONSES, events_of
from tests.server.test_tools import PARIS, WEATHER, Start, fake, hermes
from tpworker.server import shapes
from tpworker.structured_outputs import StructuredOutputs

FLAT: dict[str, Any] = {"type": "function", **WEATHER["function"]}
TIME: dict[str, Any] = {"type": "function", "name": "time", "parameters": None, "strict": None}
BODY: dict[str, Any] = {"input": "Hi", "tools": [FLAT, TIME]}


def whole(server: Any, **body: Any) -> dict[str, Any]:
    response = server.post(RESPONSES, json=BODY | body)
    assert response.status_code == 200, response.text
    shapes.ResponseShape.model_validate_json(response.text)
    answer: dict[str, Any] = response.json()
    return answer


def streamed(server: Any, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    """A stream's events, checked for what clients rely on: numbers, places, and that all that begins ends."""
    events = events_of(server.post(RESPONSES, json=BODY | {"stream": True} | body).text)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    texts: dict[str, str] = {}
    items: list[dict[str, Any]] = []
    for name, data in events:
        if name == "response.output_item.added":
            assert data["output_index"] == len(items)
            items.append(data["item"])
            texts[data["item"]["id"]] = ""
        elif name.endswith(".delta"):
            assert data["item_id"] == items[-1]["id"]
            texts[data["item_id"]] += data["delta"]
        elif name in ("response.output_text.done", "response.reasoning_text.done"):
            assert data["text"] == texts[data["item_id"]]
        elif name == "response.function_call_arguments.done":
            assert data["arguments"] == texts[data["item_id"]]
        elif name == "response.output_item.done":
            assert data["item"]["id"] == items[data["output_index"]]["id"]
            items[data["output_index"]] = data["item"]
    assert events[-1][1]["response"]["output"] == items
    return events


def written(output: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Items by their types, with their texts; without their ids."""
    return [
        (item["type"], f"{item['name']} {item['arguments']}")
        if item["type"] == "function_call"
        else (item["type"], item["content"][0]["text"])
        for item in output
    ]


def both(server: Any, **body: Any) -> list[dict[str, Any]]:
    answer = whole(server, **body)
    last = streamed(server, **body)[-1][1]["response"]
    shapes.ResponseShape.model_validate(last)
    assert written(last["output"]) == written(answer["output"])
    assert (last["status"], last["usage"]) == (answer["status"], answer["usage"])
    output: list[dict[str, Any]] = answer["output"]
    return output


def test_calls_are_items(start: Start) -> None:
    server = start(fake("Well.\n" + hermes(("weather", PARIS), ("time", {}))), tool_call_parser="hermes")
    output = both(server)
    assert written(output) == [
        ("message", "Well."),
        ("function_call", f"weather {json.dumps(PARIS)}"),
        ("function_call", "time {}"),
    ]
    assert len({item["id"] for item in output} | {item.get("call_id") for item in output}) == 6
    answer = whole(server)
    assert [tool["name"] for tool in answer["tools"]] == ["weather", "time"]
    assert (answer["tool_choice"], answer["status"]) == ("auto", "completed")
    assert written(both(server, parallel_tool_calls=False))[1:] == [
        ("function_call", f"weather {json.dumps(PARIS)}")
    ]


def test_the_events_of_a_call(start: Start) -> None:
    server = start(fake(hermes(("time", {}))), tool_call_parser="hermes")
    names = [name.removeprefix("response.") for name, _ in streamed(server)]
    deltas = names.count("function_call_arguments.delta")
    assert deltas
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        *["function_call_arguments.delta"] * deltas,
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_the_events_of_thinking(start: Start) -> None:
    names = [name.removeprefix("response.") for name, _ in streamed(start(thinker()), tools=None)]
    assert [name for number, name in enumerate(names) if name not in names[:number]] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_text.delta",
        "output_text.done",
        "completed",
    ]


def test_thinking_is_an_item_and_is_counted(start: Start) -> None:
    server = start(thinker(added=["<think>", "</think>"]))
    assert written(both(server, tools=None)) == [("reasoning", "Hm."), ("message", "Yes.")]
    usage = whole(server, tools=None)["usage"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": len("\nHm.\n") + 2}
    assert written(both(server, tools=None, include_reasoning=False)) == [("message", "Yes.")]
    assert written(both(server, tools=None, separate_reasoning=False)) == [("message", SAID)]


def test_thinking_that_is_cut_is_incomplete(start: Start) -> None:
    server = start(thinker("Hm.</think>Yes.", OPENS))
    (item,) = both(server, tools=None, max_output_tokens=2)
    assert (item["type"], item["status"], item["content"][0]["text"]) == ("reasoning", "incomplete", "Hm")


def test_the_openai_client_goes_round(start: Start) -> None:
    server = start(fake(hermes(("weather", PARIS))), tool_call_parser="hermes")
    client = server.openai.responses
    tools: Any = BODY["tools"]
    first = client.create(model=MODEL, input="Hi", tools=tools)
    (call,) = first.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("weather", PARIS)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    history: Any = [{"role": "user", "content": "Hi"}, *first.output, result]
    client.create(model=MODEL, input=history, tools=tools)
    prompt = server.runtime.requests[-1][0].partition("[user]")[2]
    assert prompt == (
        f"Hi[assistant]({call.call_id} weather: [('city', 'Paris'), ('days', 3)])"
        f"[tool{call.call_id}]sun[assistant]"
    )
    with client.stream(model=MODEL, input="Hi", tools=[{**FLAT, "strict": True}]) as stream:  # type: ignore[list-item]
        kinds = {event.type for event in stream}
        (called,) = stream.get_final_response().output
    assert "response.function_call_arguments.done" in kinds
    assert called.parsed_arguments == PARIS  # type: ignore[union-attr]
    held = server.runtime.requests[-1][1].structured_outputs
    assert held is not None
    assert held.kinds == ("grammar",)


def test_what_was_thought_said_and_called_is_one_turn(start: Start) -> None:
    server = start(thinker("ok"), tool_call_parser="hermes")
    first = whole(start(thinker()), tools=None)["output"]
    call = {"type": "function_call", "call_id": "c", "name": "time", "arguments": "{}", "id": "fc_1"}
    result = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "2"}]}
    empty = {"type": "reasoning", "id": "rs_1", "summary": []}
    response = server.post(
        RESPONSES, json={"input": [{"role": "user", "content": "Hi"}, empty, *first, call, result]}
    )
    assert response.status_code == 200, response.text
    assert "X-Ignored-Parameters" not in response.headers
    assert server.runtime.requests[-1][0] == "[user]Hi[assistant]<think>Hm.</think>Yes.[tool]2<|assistant|>\n"


def test_a_choice_names_functions_as_the_endpoint_does(start: Start) -> None:
    server = start(fake(hermes(("time", {}))), tool_call_parser="hermes")
    named = {"type": "function", "name": "time"}
    for choice in (named, {"type": "allowed_tools", "mode": "auto", "tools": [named]}):
        assert whole(server, tool_choice=choice)["tool_choice"] == choice
        held = server.runtime.requests[-1][1].structured_outputs
        assert held is not None
        assert "time" in str(held.grammar)
        assert "weather" not in str(held.grammar)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, StructuredOutputs(json_object=True)),
        (
            {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True},
            StructuredOutputs(json=SCHEMA),
        ),
    ],
)
def test_what_the_answer_is_held_to(start: Start, asked: dict[str, Any], held: object) -> None:
    server = start(fake("{}"))
    assert whole(server, tools=None, text={"format": asked})["text"] == {"format": asked}
    assert server.runtime.requests[-1][1].structured_outputs == held


def test_the_clients_own_schemas(start: Start) -> None:
    class Point(pydantic.BaseModel):
        x: int

    server = start(fake('{"x": 5}'))
    done = server.openai.responses.parse(model=MODEL, input="Hi", text_format=Point)
    assert done.output_parsed == Point(x=5)


def test_effort_switches_thinking(start: Start) -> None:
    server = start(thinker("Yes."))
    answer = whole(server, tools=None, reasoning={"effort": "none", "summary": "auto"})
    assert answer["reasoning"] == {"effort": "none", "summary": None}
    assert server.runtime.requests[-1][0] == "[user]Hi<|assistant|>\n<think></think>\n"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (r'"text": {"format": {"type": "text", "name": "a\ud800", "x": NaN}}', {"name": "a?", "x": None}),
        (
            r'"tool_choice": {"type": "function", "name": "weather", "x": ["\udfff", 1e999]}',
            {"x": ["?", None]},
        ),
    ],
)
def test_what_is_repeated_is_json(start: Start, stream: bool, asked: str, told: dict[str, Any]) -> None:
    """What changes nothing is not checked, but must not break the answer either."""
    server = start(fake(hermes(("weather", PARIS))))
    content = f'{{"input": "Hi", "tools": {json.dumps([FLAT])}, "stream": {json.dumps(stream)}, {asked}}}'
    response = server.post(RESPONSES, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200
    answer = events_of(response.text)[-1][1]["response"] if stream else response.json()
    repeated = answer["text"]["format"] if "format" in asked else answer["tool_choice"]
    assert told.items() <= repeated.items()
