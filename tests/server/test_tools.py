"""Tools in chats: what the template is given, what the output is held to, and how calls are answered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime, byte_tokenizer
from tests.server.test_refusals import CHAT, USER, error_of
from tpworker.grammar import Compiler, grammar_of
from tpworker.parsing import TOOL_FORMATS
from tpworker.server import shapes

Start = Callable[..., LiveServer]

TEMPLATE = (
    "{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}{{ m.tool_call_id }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "({{ c.id }} {{ c.function.name }}: {{ c.function.arguments.items() | list }})"
    "{% endfor %}{% endfor %}[assistant]"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How the weather is",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
BODY: dict[str, Any] = {"messages": [USER], "tools": [WEATHER, TIME]}
PARIS = {"city": "Paris", "days": 3}


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {**tool["function"], "strict": True}}


def hermes(*calls: tuple[str, dict[str, Any]]) -> str:
    written = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written)


def fake(reply: str, template: str | None = TEMPLATE, **options: Any) -> FakeRuntime:
    return FakeRuntime(
        reply=lambda prompt: reply,
        the_tokenizer=byte_tokenizer(template, options.pop("special", ()), options.pop("added", ())),
        longest=options.pop("longest", 8192),
        **options,
    )


def whole(server: LiveServer, **body: Any) -> dict[str, Any]:
    response = server.post(CHAT, json=BODY | body)
    assert response.status_code == 200, response.text
    shapes.ChatCompletion.model_validate_json(response.text)
    answer: dict[str, Any] = response.json()
    return answer


def chunks(server: LiveServer, **body: Any) -> list[dict[str, Any]]:
    response = server.post(CHAT, json=BODY | {"stream": True} | body)
    assert response.status_code == 200, response.text
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def gathered(events: Sequence[dict[str, Any]], index: int = 0) -> tuple[dict[str, Any], str]:
    """One choice of a stream as the message that it makes, and why it ended. Checks what clients rely on."""
    message: dict[str, Any] = {}
    reasons = []
    mine = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    assert [choice["delta"].get("role") for choice in mine] == ["assistant", *[None] * (len(mine) - 1)]
    for choice in mine:
        delta = choice["delta"]
        for name in ("content", "reasoning_content", "reasoning"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for part in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in part:
                assert (part["index"], part["type"]) == (len(calls), "function")
                assert part["function"]["arguments"] == ""
                calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
            else:
                assert part["index"] == len(calls) - 1
                assert set(part["function"]) == {"arguments"}
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        reasons.append(choice["finish_reason"])
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return message, reasons[-1]


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    called = message.get("tool_calls", [])
    ids = [call["id"] for call in called]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("call_[A-Za-z0-9]{24}", one) for one in ids)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in called]


def parsed(calls: Sequence[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


def both(server: LiveServer, **body: Any) -> tuple[dict[str, Any], str]:
    """The message and why it ended, whole; a stream must say the same."""
    choice = whole(server, **body)["choices"][0]
    message, reason = gathered(chunks(server, **body))
    assert calls_of(message) == calls_of(choice["message"])
    assert reason == choice["finish_reason"]
    content = choice["message"]["content"] or ""
    assert message["content"].strip() == content.strip()
    return choice["message"], reason


# ------------------------------------------------------------------------------ answers

OUTPUTS = {
    "hermes": hermes(("weather", PARIS)),
    "glm45": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    "ernie45": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>\n',
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    "llama3_json": '{"name": "weather", "parameters": {"city": "Paris", "days": 3}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris", "days": 3}}]',
}


def test_all_formats_are_tried() -> None:
    assert OUTPUTS.keys() == TOOL_FORMATS.keys()


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_call_in_each_format(start: Start, name: str) -> None:
    """A token of the fake is a byte: a stream is cut at every place."""
    server = start(fake(OUTPUTS[name]), tool_call_parser=name)
    message, reason = both(server)
    assert parsed(calls_of(message)) == [("weather", PARIS)]
    assert (message["content"], reason) == (None, "tool_calls")
    assert server.runtime.requests[-1][1].structured_outputs is None


def test_text_beside_calls_and_several_of_them(start: Start) -> None:
    calls = [("weather", PARIS), ("time", {}), ("weather", {"city": "Rome"})]
    server = start(fake("I will look.\n" + hermes(*calls)), tool_call_parser="hermes")
    message, reason = both(server)
    assert message["content"].strip() == "I will look."
    assert parsed(calls_of(message)) == calls
    assert reason == "tool_calls"


def test_text_alone_ends_as_it_did(start: Start) -> None:
    server = start(fake("No <tool> is <needed."), tool_call_parser="hermes")
    message, reason = both(server)
    assert (message, reason) == (
        {"role": "assistant", "content": "No <tool> is <needed.", "refusal": None},
        "stop",
    )


def test_a_call_that_is_cut_is_told_as_far_as_it_came(start: Start) -> None:
    text = hermes(("time", {}), ("weather", PARIS))
    server = start(fake(text), tool_call_parser="hermes")
    cut = text.index("Paris") + 3
    message, reason = both(server, max_tokens=cut)
    (first, second), reason_whole = calls_of(message), reason
    assert first == ("time", "{}")
    assert (second[0], second[1].endswith('"Par')) == ("weather", True)
    assert reason_whole == "length"


def test_a_broken_call_is_no_failure(start: Start) -> None:
    for text in ('<tool_call>\n{"name": "weather", "arguments": {"city": }}\n</tool_call>', "<tool_call>{{{"):
        server = start(fake(text), tool_call_parser="hermes")
        message, reason = both(server)
        assert reason in ("stop", "tool_calls")
        assert "weather" in json.dumps(message) or "{{{" in json.dumps(message)


def test_one_call_at_most(start: Start) -> None:
    server = start(fake(hermes(("time", {}), ("weather", PARIS))), tool_call_parser="hermes")
    message, reason = both(server, parallel_tool_calls=False)
    assert (parsed(calls_of(message)), reason) == ([("time", {})], "tool_calls")
    assert len(calls_of(both(server, parallel_tool_calls=True)[0])) == 2


def test_several_choices_with_logprobs_token_ids_and_usage(start: Start) -> None:
    server = start(fake(hermes(("time", {}))), tool_call_parser="hermes")
    body: dict[str, Any] = {"n": 3, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    answer = whole(server, **body)
    events = chunks(server, **body, stream_options={"include_usage": True})
    assert events[-1]["usage"] == answer["usage"]
    ids = set()
    for index, choice in enumerate(answer["choices"]):
        message, reason = gathered(events, index)
        assert calls_of(message) == calls_of(choice["message"]) == [("time", "{}")]
        assert reason == choice["finish_reason"] == "tool_calls"
        assert (
            (choice["message"]["content"] or "") == message["content"] == ("" if not index else f"+{index}")
        )
        ids |= {message["tool_calls"][0]["id"], choice["message"]["tool_calls"][0]["id"]}
        mine = [one for event in events for one in event["choices"] if one["index"] == index]
        assert [i for one in mine for i in one.get("token_ids", ())] == choice["token_ids"]
        told = [entry for one in mine if one["logprobs"] for entry in one["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"]
        assert len(told) == len(choice["token_ids"])
    assert len(ids) == 6


def test_a_stop_string_cuts_a_call(start: Start) -> None:
    server = start(fake(hermes(("weather", PARIS))), tool_call_parser="hermes")
    message, reason = both(server, stop=["Par"])
    assert calls_of(message)[0][1].endswith('"city": "')
    assert reason == "tool_calls"


def test_the_openai_client_reads_a_stream(start: Start) -> None:
    server = start(fake("Well. " + hermes(("weather", PARIS))), tool_call_parser="hermes")
    with server.openai.chat.completions.stream(
        model=MODEL,
        messages=[USER],  # type: ignore[list-item]
        tools=[strict(WEATHER)],  # type: ignore[list-item]
    ) as stream:
        done = stream.get_final_completion()
    (call,) = done.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == PARIS
    assert (done.choices[0].finish_reason, done.choices[0].message.content) == ("tool_calls", "Well.")


# ---------------------------------------------------------------------------- special tokens


def test_marks_that_are_special_tokens_are_found_and_others_are_no_text(start: Start) -> None:
    special = ("[TOOL_CALLS]", "[OTHER]", "<pad>")
    text = '[OTHER]We[OT]ll<pad>.[TOOL_CALLS] [{"name": "time", "arguments": {}}]'
    server = start(fake(text, special=special), tool_call_parser="mistral")
    message, _ = both(server)
    assert (message["content"].strip(), parsed(calls_of(message))) == ("We[OT]ll.", [("time", {})])
    assert server.runtime.requests[-1][1].shown_special_tokens == ("[TOOL_CALLS]",)
    assert whole(server, tools=None)["choices"][0]["message"]["content"] == (
        'We[OT]ll. [{"name": "time", "arguments": {}}]'
    )
    assert server.runtime.requests[-1][1].shown_special_tokens == ()
    assert both(server, skip_special_tokens=False)[0]["content"].strip() == "[OTHER]We[OT]ll<pad>."


def test_what_only_begins_as_a_special_token_does_is_told_in_the_end(start: Start) -> None:
    server = start(fake("Well [OTH", special=["[TOOL_CALLS]", "[OTHER]"]), tool_call_parser="mistral")
    assert both(server)[0]["content"] == "Well [OTH"


def test_marks_that_are_none_leave_special_tokens_out(start: Start) -> None:
    server = start(fake("<pad>" + hermes(("time", {})), special=["<pad>"]), tool_call_parser="hermes")
    message, _ = both(server)
    assert (message["content"], calls_of(message)) == (None, [("time", "{}")])
    assert server.runtime.requests[-1][1].shown_special_tokens == ()


# ---------------------------------------------------------------------------- what it is held to


@pytest.mark.parametrize(
    ("body", "is_held"),
    [
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "none"}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": NAMED}, True),
        ({"tools": [strict(WEATHER), TIME]}, True),
        ({"tools": [strict(WEATHER)], "tool_choice": "none"}, False),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}},
            True,
        ),
    ],
)
def test_what_calls_are_held_to(start: Start, body: dict[str, Any], is_held: bool) -> None:
    server = start(fake(hermes(("weather", PARIS))), tool_call_parser="hermes")
    whole(server, **body)
    held = server.runtime.requests[-1][1].structured_outputs
    assert (held is not None) == is_held
    if held is not None:
        assert held.kinds == ("grammar",)
        assert "weather" in str(held.grammar)
        assert ("time" in str(held.grammar)) == (body.get("tool_choice") == "required" or "tools" in body)


def test_marks_that_are_tokens_are_held_to_be_those(start: Start) -> None:
    runtime = fake("ok", special=["<pad>"], added=["<tool_call>"])
    server = start(runtime, tool_call_parser="hermes")
    whole(server, tool_choice="required")
    held = runtime.requests[-1][1].structured_outputs
    assert held is not None
    assert f"<[{runtime.tokenizer.encode('<tool_call>')[0]}]>" in str(held.grammar)


def test_a_choice_that_is_none_leaves_calls_in_the_text(start: Start) -> None:
    text = hermes(("time", {}))
    server = start(fake(text), tool_call_parser="hermes")
    message, reason = both(server, tool_choice="none")
    assert (message["content"], reason) == (text, "stop")
    assert "<tool>" in server.runtime.requests[-1][0], "the template shows them all the same, as vLLM's does"


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_calls_and_a_format_of_the_answer_exclude_each_other(start: Start, choice: Any) -> None:
    server = start(fake(""), tool_call_parser="hermes")
    response = server.post(CHAT, json=BODY | {"tool_choice": choice, "guided_regex": "a"})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "guided_regex")
    assert "tool_choice" in error["message"]


@pytest.mark.parametrize("held", [{"guided_regex": "a"}, {"structured_outputs": {"choice": ["a"]}}])
def test_calls_and_an_answer_that_is_no_json_exclude_each_other(start: Start, held: dict[str, Any]) -> None:
    server = start(fake(""), tool_call_parser="hermes")
    response = server.post(CHAT, json=BODY | held)
    error = error_of(response)
    (name,) = held
    assert (response.status_code, error["param"].startswith(name)) == (400, True)
    assert "beside tools the answer may be JSON alone" in error["message"]
    assert server.post(CHAT, json=BODY | held | {"tool_choice": "none"}).status_code == 200


FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    },
}


def test_calls_that_begin_as_an_answer_does_exclude_it(start: Start) -> None:
    server = start(fake("{}"), tool_call_parser="llama3_json")
    error = error_of(server.post(CHAT, json=BODY | {"response_format": FORMAT}))
    assert error["param"] == "response_format.json_schema.schema"
    assert "calls in the format llama3_json begin as JSON does" in error["message"]


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name != "llama3_json"])
def test_the_model_calls_or_answers_as_it_is_asked_to(start: Start, name: str) -> None:
    """Of a chat with tools and a format of the answer the output is either."""
    runtime = fake("{}")
    server = start(runtime, tool_call_parser=name)
    whole(server, response_format=FORMAT)
    held = runtime.requests[-1][1].structured_outputs
    assert held is not None
    tokenizer = json.loads(runtime.tokenizer._backend.to_str())
    compiler = Compiler(json.dumps(tokenizer), 257, [256])
    for text, is_fine in (
        (OUTPUTS[name].rstrip(), True),
        ('{"a": 5}', True),
        ('{"a": "b"}', False),
        ("Well", False),
    ):
        matcher = compiler.matcher(grammar_of(held))
        num_taken = matcher.try_consume_tokens(runtime.tokenizer.encode(text))
        assert (num_taken == len(text) and matcher.is_accepting()) == is_fine, (text, num_taken)
