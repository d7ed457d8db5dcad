"""/v1/responses, as the openai client uses it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime, byte_tokenizer
from tests.server.test_generation import HARD
from tests.server.test_refusals import error_of
from tpworker.server import shapes

Start = Callable[..., LiveServer]
RESPONSES = "/v1/responses"
FLAT = {"type": "function", "name": "f", "parameters": None, "strict": None}


def part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of a stream's events."""
    *events, end = text.split("\n\n")
    assert end == ""
    split = [event.split("\n") for event in events]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in split]


def test_a_response(server: LiveServer) -> None:
    done = server.openai.responses.create(
        model=MODEL, input="Hi", instructions="be brief", temperature=0.5, top_p=0.25, max_output_tokens=99
    )
    assert done.output_text == "You said '[system]be brief[user]Hi[assistant]'."
    assert (done.status, done.error, done.incomplete_details) == ("completed", None, None)
    assert (done.model, done.instructions, done.temperature, done.top_p) == (MODEL, "be brief", 0.5, 0.25)
    assert (done.max_output_tokens, done.tools, done.id.startswith("resp")) == (99, [], True)
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (35, 47, 82)
    assert done.usage.input_tokens_details.cached_tokens == 17
    _, sampling, request_id = server.runtime.requests[-1]
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.25, 99)
    assert request_id == done.id


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"input": "Hi"}, "[user]Hi[assistant]"),
        ({"input": "Hi", "instructions": None}, "[user]Hi[assistant]"),
        ({"input": [{"role": "user", "content": "Hi"}]}, "[user]Hi[assistant]"),
        (
            {
                "instructions": "a",
                "input": [
                    {"role": "developer", "content": [part("input_text", "b")]},
                    {"type": "message", "role": "user", "content": "c"},
                ],
            },
            "[system]a[system]b[user]c[assistant]",
        ),
        ({"input": "Hi", "chat_template_kwargs": {"mood": "calm"}}, "[user]Hi[assistant](calm)"),
    ],
)
def test_forms_of_the_input(server: LiveServer, body: dict[str, Any], prompt: str) -> None:
    response = server.post(RESPONSES, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["output"][0]["content"][0]["text"] == f"You said {prompt!r}."
    assert "X-Ignored-Parameters" not in response.headers
    shapes.ResponseShape.model_validate_json(response.text)


def test_an_answer_goes_back_as_input(start: Start) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "Well."))
    first = server.openai.responses.create(model=MODEL, input="Hi")
    history: Any = [{"role": "user", "content": "Hi"}, *first.output, {"role": "user", "content": "Go on"}]
    server.openai.responses.create(model=MODEL, input=history)
    assert server.runtime.requests[-1][0] == "[user]Hi[assistant]Well.[user]Go on[assistant]"


def test_what_is_cut_by_length_is_incomplete(server: LiveServer) -> None:
    done = server.openai.responses.create(model=MODEL, input="Hi", max_output_tokens=3)
    assert (done.status, done.output_text) == ("incomplete", "You")
    assert done.incomplete_details is not None
    assert done.incomplete_details.reason == "max_output_tokens"
    assert done.output[0].status == "incomplete"  # type: ignore[union-attr]
    *_, last = server.openai.responses.create(model=MODEL, input="Hi", max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output_text == "You"


@pytest.mark.parametrize("text", ["One two.", HARD, ""])
def test_a_stream_of_events(start: Start, text: str) -> None:
    server = start(FakeRuntime(reply=lambda prompt: text or "<end>"))
    events = list(server.openai.responses.create(model=MODEL, input="Hi", stream=True))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == text
    last: Any = events[-1]
    assert (last.response.output_text, last.response.status) == (text, "completed")
    assert last.response.usage.output_tokens > 0
    done: Any = events[-4]
    assert (done.text, done.item_id) == (text, last.response.output[0].id)
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1


def test_the_clients_own_stream_helper(server: LiveServer) -> None:
    with server.openai.responses.stream(model=MODEL, input="Hi") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == "You said '[user]Hi[assistant]'."


def test_events_have_their_names_and_lines(start: Start) -> None:
    server = start(FakeRuntime(reply=lambda prompt: HARD))
    response = server.post(RESPONSES, json={"input": "Hi", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert all(name == data["type"] for name, data in events)
    assert len(response.text.splitlines()) == 3 * len(events)


def test_a_failure_in_a_stream_is_an_event(start: Start) -> None:
    async def fail(position: int) -> None:
        if position == 2:
            server.runtime.fail()
            await asyncio.Event().wait()

    server = start(FakeRuntime(before=fail))
    *_, (name, data) = events_of(server.post(RESPONSES, json={"input": "Hi", "stream": True}).text)
    assert (name, data["code"], data["param"]) == ("error", "runtime_failed", None)
    assert "killed by SIGKILL" in data["message"]
    assert data["sequence_number"] == 6


def test_no_tokens_at_all(server: LiveServer) -> None:
    done = server.openai.responses.create(model=MODEL, input="Hi", max_output_tokens=0)
    assert (done.output_text, done.status) == ("", "incomplete")
    assert done.usage is not None
    assert done.usage.output_tokens == 0


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "missing"),
        ({"input": None}, "input", "missing"),
        ({"input": []}, "input", "at least 1"),
        ({"input": 5}, "input", "5"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        ({"input": [{"type": "item_reference", "id": "f"}]}, "input[0].type", "'item_reference'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "missing"),
        (
            {"input": [{"type": "function_call", "name": "f", "call_id": "a", "arguments": 5}]},
            "input[0].arguments",
            "5",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output", "missing"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "has no message"),
        (
            {"input": [{"role": "user", "content": [part("input_image", "x")]}]},
            "input[0].content[0].type",
            "image",
        ),
        ({"input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id", "nothing is kept here"),
        ({"input": "Hi", "background": True}, "background", "not supported"),
        ({"input": "Hi", "tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
        ({"input": "Hi", "tools": [{"type": "function"}]}, "tools[0].name", "missing"),
        ({"input": "Hi", "tools": [FLAT, FLAT]}, "tools[1].name", "another tool has that name"),
        ({"input": "Hi", "tool_choice": "required"}, "tool_choice", "there are no tools"),
        (
            {"input": "Hi", "tools": [FLAT], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            '"name": …',
        ),
        ({"input": "Hi", "text": {"format": {"type": "xml"}}}, "text.format.type", "'xml'"),
        ({"input": "Hi", "text": {"format": {"type": "json_schema"}}}, "text.format.schema", "missing"),
        ({"input": "Hi", "text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
        (
            {"input": "Hi", "text": {"format": {"type": "json_object"}}, "guided_regex": "a"},
            "guided_regex",
            "text.format and guided_regex all say",
        ),
        ({"input": "Hi", "response_format": {"type": "json_object"}}, "response_format", "text.format"),
        ({"input": "Hi", "reasoning": {"effort": "huge"}}, "reasoning.effort", "'huge'"),
        (
            {"input": "Hi", "reasoning": {"effort": "low"}, "reasoning_effort": "high"},
            "reasoning.effort",
            "differ",
        ),
        ({"input": "Hi", "truncation": "auto"}, "truncation", "not supported"),
        ({"input": "Hi", "max_output_tokens": -1}, "max_output_tokens", "max_output_tokens=-1"),
        ({"input": "Hi", "n": 2}, "n", "n is not supported"),
        ({"input": "Hi", "top_logprobs": 3}, "top_logprobs", "top_logprobs is not supported"),
        ({"input": "Hi", "prompt_logprobs": 0}, "prompt_logprobs", "prompt_logprobs is not supported"),
        ({"input": "Hi", "return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "not supported"),
        ({"input": "Hi", "return_token_ids": True}, "return_token_ids", "not supported"),
        ({"input": "Hi", "logit_bias": {"a": 1}}, "logit_bias", "'a' is no token id"),
        ({"input": "Hi", "max_output_tokens": 5, "max_tokens": 4}, "max_output_tokens", "give one"),
        ({"input": "Hi", "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "'messages'"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input", "the first turn is the user's"),
        ({"input": "x" * 600}, "input", "the prompt has 617 tokens, but"),
        ({"input": "x" * 400, "max_output_tokens": 200}, "max_output_tokens", "and max_output_tokens is 200"),
    ],
)
def test_what_is_refused(server: LiveServer, body: dict[str, Any], param: str | None, words: str) -> None:
    response = server.post(RESPONSES, json=body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_what_asks_for_nothing_is_taken_and_nothing_is_stored(server: LiveServer) -> None:
    done = server.openai.responses.create(
        model=MODEL,
        input="Hi",
        store=True,
        metadata={"a": "b"},
        tools=[],
        tool_choice="auto",
        truncation="disabled",
        text={"format": {"type": "text"}},
        include=[],
        background=False,
    )
    assert done.model_extra is not None
    assert done.model_extra["store"] is False
    with pytest.raises(
        openai.NotFoundError, match="keeps nothing between requests, and has no stored responses"
    ):
        server.openai.responses.retrieve(done.id)


def test_several_refusals_are_one(server: LiveServer) -> None:
    response = server.post(
        RESPONSES, json={"input": "Hi", "previous_response_id": "a", "max_tool_calls": 1, "background": True}
    )
    message = error_of(response)["message"]
    assert message.startswith("previous_response_id, max_tool_calls and background are not supported")


def test_models_that_cannot_chat(start: Start) -> None:
    server = start(FakeRuntime(the_tokenizer=byte_tokenizer(chat_template=None)))
    assert "no chat template" in error_of(server.post(RESPONSES, json={"input": "Hi"}))["message"]
    server = start(FakeRuntime(the_tokenizer=None))
    error = error_of(server.post(RESPONSES, json={"input": "Hi"}))
    assert (error["param"], "no tokenizer" in error["message"]) == ("input", True)
