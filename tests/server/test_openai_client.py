"""The openai client's helpers, of which the answers are parsed, and go back as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime

Start = Callable[..., LiveServer]
HEADER = "X-Ignored-Parameters"
ASKED: Any = [{"role": "user", "content": "Which city?"}]


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    twins: list[str]


PARIS = City(name="Paris", twins=["Rome"])
TOOL: Any = openai.pydantic_function_tool(City)
NAMED: Any = {"type": "function", "function": {"name": "City"}}
FLAT_TOOL: Any = {"type": "function", **TOOL["function"]}


def reply(prompt: str) -> str:
    """A call, if there are tools."""
    answer = PARIS.model_dump_json()
    if "<tools>" not in prompt:
        return answer
    return f'<tool_call>\n{{"name": "City", "arguments": {answer}}}\n</tool_call>'


@pytest.fixture
def server(start: Start) -> LiveServer:
    return start(FakeRuntime(reply=reply, longest=4096))


def chat(server: LiveServer, streams: bool, **body: Any) -> Any:
    """The message of a chat, whole or as the client puts it together."""
    chats = server.openai.chat.completions
    if not streams:
        return chats.parse(model=MODEL, messages=ASKED, **body).choices[0].message
    with chats.stream(model=MODEL, messages=ASKED, **body) as stream:
        for _ in stream:
            snapshot = stream.current_completion_snapshot
        done = stream.get_final_completion().choices[0].message
    assert snapshot.choices[0].message.content == done.content
    return done


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of the client's own types
@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_is_parsed_and_goes_back(server: LiveServer, streams: bool) -> None:
    message = chat(server, streams, response_format=City)
    assert message.parsed == PARIS
    held = server.runtime.requests[-1][1].structured_outputs
    assert held is not None
    assert held.json is not None
    assert json.loads(held.json)["required"] == ["name", "twins"]
    chats = server.openai.chat.completions.with_raw_response
    response = chats.create(model=MODEL, messages=[*ASKED, message, *ASKED])
    assert HEADER not in response.headers
    assert f"[assistant]{message.content}[user]" in server.runtime.requests[-1][0]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
def test_a_call_is_parsed_and_goes_back(server: LiveServer, streams: bool, choice: Any) -> None:
    message = chat(server, streams, tools=[TOOL], tool_choice=choice)
    (call,) = message.tool_calls
    assert (call.function.name, call.function.parsed_arguments) == ("City", PARIS)
    held = server.runtime.requests[-1][1].structured_outputs
    assert held is not None, "the client's tools are strict"
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "Found."}
    chats = server.openai.chat.completions.with_raw_response
    response = chats.create(model=MODEL, messages=[*ASKED, message, result], tools=[TOOL])
    assert HEADER not in response.headers
    prompt = server.runtime.requests[-1][0]
    assert prompt.endswith("</tool_call>[user]<tool_response>\nFound.\n</tool_response>[assistant]")


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("body", [{"text_format": City}, {"tools": [FLAT_TOOL]}])
def test_items_are_parsed_and_go_back(server: LiveServer, streams: bool, body: dict[str, Any]) -> None:
    responses: Any = server.openai.responses
    if streams:
        with responses.stream(model=MODEL, input=ASKED, **body) as stream:
            answer = stream.get_final_response()
    else:
        answer = responses.parse(model=MODEL, input=ASKED, **body)
    (item,) = answer.output
    results = []
    if "tools" in body:
        assert City.model_validate_json(item.arguments) == PARIS
        results = [{"type": "function_call_output", "call_id": item.call_id, "output": "Found."}]
    else:
        assert answer.output_parsed == PARIS
    response = responses.with_raw_response.create(model=MODEL, input=[*ASKED, item, *results])
    assert HEADER not in response.headers


BROKEN = [
    ('{"name": "City", "arguments": {"name": }}', '{"name": }'),
    ('{"name": "City", "arguments": {"name": "Par', '{"name": "Par\n'),
    ('{"name": "City", "arguments": "in Paris"}', "in Paris"),
    ('{"name": "City", "arguments": [1]}', "[1]"),
    ('{"name": "City", "arguments": {"n": NaN}}', '{"n": NaN}'),
    (f'{{"name": "City", "arguments": {{"n": {"[" * 200}', f'{{"n": {"[" * 200}\n'),
    (f'{{"name": "City", "arguments": {{"n": {"9" * 5000}}}}}', f'{{"n": {"9" * 5000}}}'),
]
"""Calls as models write them, and of these what is no JSON of an object."""


@pytest.mark.parametrize(("written", "arguments"), BROKEN)
def test_a_broken_call_goes_back(start: Start, written: str, arguments: str) -> None:
    prompts = conversation(start, written)
    assert len(prompts) == 2
    for prompt in prompts:
        assert json.dumps({"name": "City", "arguments": {"INVALID_JSON": arguments}}) in prompt


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ('{"name": "no such tool!", "arguments": {"a": 1}}', '"no such tool!", "arguments": {"a": 1}'),
        (f'{{"name": "{"x" * 100}", "arguments": {{}}}}', "x" * 100),
        (f'{{"name": "City", "arguments": {{"n": {10**30}}}}}', '"arguments": {"n": 1e+30}'),
        (f'{{"name": "City", "arguments": {{"n": {2**64 - 1}}}}}', f'"arguments": {{"n": {2**64 - 1}}}'),
        (f'{{"name": "City", "arguments": {{"n": {-(2**63)}}}}}', f'"arguments": {{"n": {-(2**63)}}}'),
        ('{"name": "City", "arguments": ""}', '"arguments": {}'),
    ],
)
def test_whatever_the_model_has_called_goes_back(start: Start, written: str, told: str) -> None:
    for prompt in conversation(start, written):
        assert told in prompt


def conversation(start: Start, written: str) -> list[str]:
    """The prompts in which a call goes back, with a result: of a chat, and of items."""
    server = start(FakeRuntime(reply=lambda _: f"<tool_call>\n{written}\n</tool_call>", longest=1 << 15))
    loose: Any = {"type": "function", "function": {"name": "City"}}
    chats, responses = server.openai.chat.completions, server.openai.responses
    message = chats.create(model=MODEL, messages=ASKED, tools=[loose]).choices[0].message
    (call,) = message.tool_calls or []
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "That was wrong."}
    chats.create(model=MODEL, messages=[*ASKED, message, result])
    prompts = [server.runtime.requests[-1][0]]
    flat: Any = {"type": "function", "name": "City"}
    (item,) = responses.create(model=MODEL, input=ASKED, tools=[flat]).output
    output: Any = {"type": "function_call_output", "call_id": item.call_id, "output": "That was wrong."}  # type: ignore[union-attr]
    responses.create(model=MODEL, input=[*ASKED, item, output])  # type: ignore[list-item]
    return [*prompts, server.runtime.requests[-1][0]]


def test_an_item_goes_back_as_older_clients_send_it(server: LiveServer) -> None:
    part = {"type": "output_text", "text": PARIS.model_dump_json(), "parsed": PARIS.model_dump()}
    items = [*ASKED, {"role": "assistant", "content": [part]}]
    response = server.post("/v1/responses", json={"input": items})
    assert (response.status_code, response.headers.get(HEADER)) == (200, None)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("body", "cut"), [({"response_format": City}, 20), ({"tools": [TOOL], "tool_choice": "required"}, 70)]
)
def test_what_is_cut_is_no_answer(server: LiveServer, streams: bool, body: dict[str, Any], cut: int) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        chat(server, streams, max_tokens=cut, **body)
