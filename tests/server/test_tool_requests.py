"""Tools in a request: what the template is given of them, and what cannot be."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.test_refusals import CHAT, USER, error_of
from tests.server.test_tools import (
    BODY,
    NAMED,
    PARIS,
    WEATHER,
    Start,
    both,
    calls_of,
    chunks,
    fake,
    gathered,
    hermes,
    parsed,
    whole,
)


def test_what_the_template_is_given(start: Start) -> None:
    server = start(fake("ok"), tool_call_parser="hermes")
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
    }
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "tool_calls": [{**call, "index": 0, "function": {"name": "time"}}]},
        {"role": "tool", "content": [{"type": "text", "text": "now"}]},
    ]
    response = server.post(CHAT, json=BODY | {"messages": messages})
    assert response.status_code == 200, response.text
    assert "X-Ignored-Parameters" not in response.headers
    prompt = server.runtime.requests[-1][0]
    told = [json.loads(one) for one in re.findall("<tool>(.*?)</tool>", prompt)]
    empty = {"type": "object", "properties": {}}
    assert told == [WEATHER, {"type": "function", "function": {"name": "time", "parameters": empty}}]
    assert prompt.partition("[user]")[2] == (
        "Hi[assistant](call_1 weather: [('city', 'Bonn')])[toolcall_1]rain"
        "[assistant](call_1 time: [])[tool]now"
        "[assistant]"
    )


def test_an_answer_goes_back_with_its_result(start: Start) -> None:
    server = start(fake(hermes(("weather", PARIS))), tool_call_parser="hermes")
    client = server.openai.chat.completions
    tools: Any = BODY["tools"]
    first = client.create(model=MODEL, messages=[USER], tools=tools)  # type: ignore[list-item]
    message = first.choices[0].message
    (call,) = message.tool_calls or []
    result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
    history: Any = [USER, message, result]
    client.create(model=MODEL, messages=history, tools=tools)
    assert (
        f"({call.id} weather: [('city', 'Paris'), ('days', 3)])[tool{call.id}]sun"
        in server.runtime.requests[-1][0]
    )


@pytest.mark.parametrize(
    ("arguments", "city"),
    [
        (r"\ud83d\ude00", "\U0001f600"),
        (r"\ud83d", "\ufffd"),
        (r"a\ude00\u00e9", "a\ufffdé"),
        (r"\\ud83d", r"\ud83d"),
    ],
)
def test_half_an_escape_of_a_models_goes_back(start: Start, arguments: str, city: str) -> None:
    """The parser passes on what a model writes within a string, and that may be half of an emoji."""
    template = (
        "{% for m in messages %}{{ (m.tool_calls or [])[0].function.arguments.city }}{% endfor %}{{ tools }}"
    )
    server = start(fake("ok", template), tool_call_parser="hermes")
    function = {"name": "weather", "arguments": f'{{"city": "{arguments}"}}'}
    told = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    response = server.post(CHAT, json={"messages": [told]})
    assert response.status_code == 200, response.text
    assert server.runtime.requests[-1][0] == f"{city}None"


SHORT_IDS = (
    "{% for t in tools or [] %}[TOOL_CALLS]{% endfor %}{% for m in messages %}[{{ m.role }}]"
    "{% for c in m.tool_calls or [] %}{% if not c.id is defined or c.id|length != 9 %}"
    "{{ raise_exception('ids have 9 characters') }}{% endif %}{{ c.id }}{% endfor %}"
    "{{ m.tool_call_id }}{% endfor %}"
)


def test_a_template_that_wants_short_ids_gets_them(start: Start) -> None:
    """Mistral's do. A conversation goes on with what was answered, and with the ids of other servers."""
    server = start(fake('[TOOL_CALLS][{"name": "weather", "arguments": {}}]', SHORT_IDS))
    for body in ({}, {"stream": True}):
        answer = chunks(server) if body else None
        message = gathered(answer)[0] if answer else whole(server)["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert re.fullmatch("[A-Za-z0-9]{9}", call["id"])
        for given in (call["id"], "call_" + "x" * 24, "call_" + "y" * 24, "a-b.c_d e", "é" * 9, "\ud800"):
            told = {"role": "assistant", "content": None, "tool_calls": [{**call, "id": given}]}
            result = {"role": "tool", "tool_call_id": given, "content": "sun"}
            content = json.dumps(BODY | {"messages": [USER, told, result]})
            response = server.post(CHAT, content=content, headers={"content-type": "application/json"})
            assert response.status_code == 200, response.text
            prompt = server.runtime.requests[-1][0]
            (mine, others) = re.findall(r"\](\w{9})(?=\[|$)", prompt)
            assert mine == others
            assert (mine == given) == (given == call["id"])


ONE_CALL = (
    "{% for m in messages %}{% if 'tool_calls' in m and not m.tool_calls|length == 1 %}"
    "{{ raise_exception('one call at once') }}{% endif %}[{{ m.role }}]{% endfor %}{{ tools }}<|python_tag|>"
)


def test_a_template_that_takes_one_call_a_turn_gets_no_more(start: Start) -> None:
    """Llama 3's do: a conversation with several calls in one turn could not go on."""
    call = '{"name": "weather", "parameters": {}}'
    server = start(fake(f"{call}; {call}", ONE_CALL))
    assert len(calls_of(both(server)[0])) == 1
    whole(server, tool_choice="required")
    grammar = server.runtime.requests[-1][1].structured_outputs.grammar
    assert '"; "' not in grammar


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def test_a_model_whose_template_knows_no_tools_is_told_of_them(start: Start) -> None:
    server = start(fake(hermes(("weather", PARIS)), PLAIN))
    message, reason = both(server)
    assert (parsed(calls_of(message)), reason) == ([("weather", PARIS)], "tool_calls")
    prompt = server.runtime.requests[-1][0]
    assert prompt.startswith("[system]You may call functions")
    assert json.dumps(WEATHER) in prompt
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sun"}
    system = {"role": "system", "content": "Be brief."}
    server.post(CHAT, json=BODY | {"messages": [system, USER, message, result, result]})
    prompt = server.runtime.requests[-1][0]
    assert prompt.startswith("[system]Be brief.\n\nYou may call functions")
    behind = prompt.partition("[user]")[2]
    told = "<tool_response>\nsun\n</tool_response>"
    assert behind == f"Hi[assistant]{hermes(('weather', PARIS))}[user]{told}\n{told}[assistant]"


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% if 'bad' in messages[-1].content %}{{ raise_exception('bad it is') }}{% endif %}" + PLAIN
)


def test_a_template_without_a_system_message_has_the_user_tell_of_tools(start: Start) -> None:
    server = start(fake("ok", NO_SYSTEM))
    part = {"type": "text", "text": "Hi"}
    for content, behind in (("Hi", "\n\nHi"), ([part], "\nHi")):
        messages = [{"role": "user", "content": content}]
        assert server.post(CHAT, json=BODY | {"messages": messages}).status_code == 200
        prompt = server.runtime.requests[-1][0]
        assert prompt.startswith("[user]You may call functions")
        assert prompt.endswith(f"</tool_call>{behind}[assistant]")
    for messages, words in (
        ([{"role": "system", "content": "a"}, USER], "no system here"),
        ([{"role": "user", "content": "bad"}], "bad it is"),
    ):
        error = error_of(server.post(CHAT, json=BODY | {"messages": messages}))
        assert (error["param"], words in error["message"]) == ("messages", True)


def test_a_model_that_cannot_be_told_of_tools(start: Start) -> None:
    for options, words in (
        ({"tool_call_parser": "none"}, "not taken by this server (--tool-call-parser none)"),
        ({"tool_call_parser": "glm45"}, "does not show tools, and the server (--tool-call-parser glm45)"),
    ):
        server = start(fake("ok", PLAIN), **options)
        for stream in (False, True):
            response = server.post(CHAT, json=BODY | {"stream": stream})
            error = error_of(response)
            assert (response.status_code, error["param"]) == (400, "tools")
            assert words in error["message"]
        assert server.post(CHAT, json=BODY | {"tool_choice": "none"}).status_code == 200
        assert server.runtime.requests[-1][0] == "[user]Hi[assistant]"


def test_tokenize_shows_tools_too(start: Start) -> None:
    server = start(fake("ok"), tool_call_parser="hermes")
    count = server.post("/tokenize", json={"messages": [USER], "tools": [WEATHER]}).json()["count"]
    assert count == len(f"<tool>{json.dumps(WEATHER)}</tool>[user]Hi[assistant]")


# ---------------------------------------------------------------------------- what is wrong


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def called(arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}, **more}
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


ARGUMENTS = "messages[1].tool_calls[0].function.arguments"
DEEP: Any = json.loads("[" * 300 + "]" * 300)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": {}}, "tools", "list"),
        ({"tools": [1]}, "tools[0]", "1"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing"),
        ({"tools": [tool(name="")]}, "tools[0].function.name", "1 to 64 of the characters"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name", "'a b'"),
        ({"tools": [tool(name="a\n")]}, "tools[0].function.name", "characters"),
        ({"tools": [tool(name="x" * 65)]}, "tools[0].function.name", "1 to 64"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "another tool has that name"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "[]"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters", "of an object"),
        ({"tools": [tool(parameters={"a": DEEP})]}, "tools[0].function.parameters", "deeper than 100 levels"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict", "'yes'"),
        ({"tools": [tool(name=f"f{i}") for i in range(129)]}, "tools", "129 tools are more than the 128"),
        ({"tools": [tool(description="x" * 300_000)]}, "tools", "more than 262144 characters as JSON"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": None, "tool_choice": NAMED}, "tool_choice", "there are no tools"),
        ({"tool_choice": "any"}, "tool_choice", "tool_choice='any': it should be"),
        ({"tool_choice": 5}, "tool_choice", "tool_choice=5"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "it should be"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g', which"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice",
            "it should be",
        ),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "'no'"),
        ({"functions": [{"name": "f"}]}, "functions", "give them as tools"),
        ({"function_call": {"name": "f"}}, "function_call", "give tool_choice"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content", "missing"),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function", "missing"),
        (
            {"messages": [{**USER, "tool_calls": called()["messages"][1]["tool_calls"]}]},
            "messages[0].tool_calls",
            "the assistant's, and not the user's",
        ),
        ({"messages": [{**USER, "tool_call_id": "a"}]}, "messages[0].tool_call_id", "not the user's"),
        (called({"a": DEEP}), ARGUMENTS, "deeper than 100 levels"),
        (called([1]), ARGUMENTS, "[1]"),
        (called(5), ARGUMENTS, "5"),
        (called(type="custom"), "messages[1].tool_calls[0].type", "'custom'"),
        (called({"a": 123456789012345678901234567890}), "messages", "64 bits"),
    ],
)  # fmt: skip
def test_what_cannot_be(tooled: LiveServer, body: dict[str, Any], param: str, words: str) -> None:
    response = tooled.post(CHAT, json=BODY | body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_tools_that_make_too_long_a_grammar(start: Start) -> None:
    wide = {name: {"type": "array"} for name in map(str, range(40))}
    shared = {"A": {"description": "x" * 5000}}  # which each of them refers to, for all that is known
    for name, parameters in (
        ("hermes", {"type": "object", "description": "x" * 200_000}),
        ("glm45", {"type": "object", "properties": wide, "$defs": shared}),
        ("glm45", {"type": "object", "properties": {key: {} for key in map(str, range(2500))}}),
    ):
        server = start(fake("ok", longest=1 << 20), tool_call_parser=name)
        tools = [tool(parameters=parameters)]
        error = error_of(server.post(CHAT, json=BODY | {"tools": tools, "tool_choice": "required"}))
        assert error["param"] == "tools"
        assert "more than 131072 characters, the limit: make their schemas smaller" in error["message"]


@pytest.fixture(scope="module")
def tooled() -> Any:
    with LiveServer(fake("ok"), tool_call_parser="hermes") as live:
        yield live


@pytest.mark.parametrize("body", [{"tools": []}, {"tools": None}, {"tools": [], "tool_choice": "auto"}])
def test_no_tools_are_none(tooled: LiveServer, body: dict[str, Any]) -> None:
    response = tooled.post(CHAT, json=BODY | body)
    assert response.status_code == 200
    assert tooled.runtime.requests[-1][0] == "[user]Hi[assistant]"


def test_a_plain_chat_is_not_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it costs to look for calls is paid by those who ask for them."""

    def never(*_: object) -> None:
        raise AssertionError("nobody asked for it")

    server = start(fake("ok"), tool_call_parser="hermes")
    monkeypatch.setattr("tpworker.server.speech.OutputParser", never)
    assert gathered(chunks(server, tools=None))[0] == {"content": "ok"}
    assert whole(server, tools=None)["choices"][0]["message"]["content"] == "ok"
    assert server.post(CHAT, json=BODY).status_code == 500  # that this can fail


def test_schemas_of_tools_may_say_what_says_nothing(tooled: LiveServer) -> None:
    """As those of answers may; llguidance refuses both."""
    taken = {"type": "integer", "minimum": -(1 << 63)}
    parameters = {"properties": {"a": taken, "b": {"type": "array", "uniqueItems": False}}}
    body = BODY | {"tools": [tool(parameters=parameters)], "tool_choice": "required"}
    assert tooled.post(CHAT, json=body).status_code == 200
    grammar = tooled.runtime.requests[-1][1].structured_outputs.grammar
    assert '"a": {"type": "integer", "minimum": -9223372036854774784}' in grammar
    assert '"b": {"type": "array"}' in grammar
