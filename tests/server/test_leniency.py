"""What is taken as OpenAI's API takes it: null is nothing, 4.0 is 4, and what nobody knows is named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime
from tpworker.server import ignored

Start = Callable[..., LiveServer]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
HEADER = "X-Ignored-Parameters"


def part(**more: object) -> dict[str, object]:
    return {"type": "text", "text": "Hi", **more}


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        (COMPLETIONS, {"prompt": "a", "temprature": 0}, "temprature"),
        (COMPLETIONS, {"prompt": "a", "zeta": 1, "alpha": None, "temperature": None}, "zeta, alpha"),
        (COMPLETIONS, {"prompt": "a", "n": None, "logprobs": None, "user": None}, None),
        (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"prompt": "a", "bad name,\r\nX: 1": 1}, "bad%20name%2C%0D%0AX%3A%201"),
        (COMPLETIONS, {"prompt": "a", "x" * 5000: 1}, "x" * 64),
        (COMPLETIONS, {"prompt": "a", "": 1}, '""'),
        (
            CHAT,
            {
                "messages": [USER | {"weight": None}, USER | {"weight": 1, "content": [part(cache=None)]}],
                "moderation": None,
                "stream": True,
                "stream_options": {"include_usage": None, "news": {"a": 1}},
            },
            "moderation, stream_options.news, messages.weight, messages.content.cache",
        ),
    ],
)
def test_what_nobody_knows_is_ignored_and_named(
    server: LiveServer, path: str, body: dict[str, Any], names: str | None
) -> None:
    response = server.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers.get(HEADER) == names


def test_half_a_character_in_a_name(server: LiveServer) -> None:
    content = b'{"prompt": "a", "\\ud83d": 1, "\\u00e9": 2}'
    response = server.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.headers[HEADER]) == (200, "%5Cud83d, %5Cxe9")


def test_errors_name_it_too_and_the_next_request_does_not(server: LiveServer) -> None:
    response = server.post(COMPLETIONS, json={"prompt": "a", "temprature": 0, "top_p": 7})
    assert (response.status_code, response.headers[HEADER]) == (400, "temprature")
    assert HEADER not in server.post(COMPLETIONS, json={"prompt": "a"}).headers


def test_the_header_is_bounded(server: LiveServer) -> None:
    body = {"prompt": "a"} | {f"{number}{'é' * 100}": 1 for number in range(1000)}
    header = server.post(COMPLETIONS, json=body).headers[HEADER]
    *names, more = header.split(", ")
    assert [len(name) for name in names] == [64] * 16
    assert more == "and-984-more"


def test_each_name_is_logged_once_and_not_without_end(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ignored, "_logged", logged := set[str]())
    server = start()
    with caplog.at_level(logging.WARNING, "tpworker.server.ignored"):
        for _ in range(3):
            server.post(COMPLETIONS, json={"prompt": "a", "temprature\n": 0})
        assert [record.getMessage() for record in caplog.records] == [
            "requests have the parameter temprature%0A, which is ignored here; this is said once"
        ]
        for start_at in range(0, 400, 10):
            names = {f"name{number}": 1 for number in range(start_at, start_at + 10)}
            server.post(COMPLETIONS, json={"prompt": "a"} | names)
    assert len(caplog.records) == ignored.MAX_LOGGED + 1
    assert len(logged) == ignored.MAX_LOGGED
    assert "others are ignored without a word" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        (COMPLETIONS, {"prompt": "a", "suffix": "b", "no_stop_trim": True}, ["suffix", "no_stop_trim"]),
        (COMPLETIONS, {"prompt": 5, "suffix": "x", "top_p": 9, "top_a": 0.5}, ["suffix", "top_a"]),
        (
            CHAT,
            {
                "messages": [USER, {"role": "assistant", "content": None, "function_call": {}, "audio": {}}],
                "functions": [1],
                "chat_template": "x",
            },
            ["functions", "chat_template", "messages[1].function_call", "messages[1].audio"],
        ),
    ],
)
def test_all_that_is_not_supported_is_named_at_once(
    server: LiveServer, path: str, body: dict[str, Any], names: list[str]
) -> None:
    response = server.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, names[0])
    listed = ", ".join(names[:-1])
    assert error["message"].startswith(f"{listed} and {names[-1]} are not supported: leave them out")
    for remedy in ("chat_template: the server's own is used", "functions: give them as tools"):
        assert (f"instead of {remedy}" in error["message"]) == (path == CHAT)
    told = "instead of messages[1].function_call: give tool_choice, and in messages tool_calls"
    assert (told in error["message"]) == (path == CHAT)


@pytest.mark.parametrize(
    ("body", "num_tokens"),
    [
        ({"max_tokens": 4.0, "top_k": 3.0, "seed": -0.0, "min_tokens": 1e0}, 4),
        ({"max_tokens": 2, "stop": ""}, 2),
        ({"max_tokens": 2, "stop_token_ids": [3.0], "prompt": [65.0, 66]}, 2),
        ({"max_tokens": 2, "prompt": [[65.0], [66]]}, 4),
    ],
)
def test_values_that_mean_the_same(server: LiveServer, body: dict[str, Any], num_tokens: int) -> None:
    response = server.post(COMPLETIONS, json={"prompt": "a"} | body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == num_tokens


@pytest.mark.parametrize("value", [4.5, 1e400, True, "4"])
def test_what_is_no_integer_is_none(server: LiveServer, value: object) -> None:
    content = f'{{"prompt": "a", "max_tokens": {repr(value).replace("inf", "1e400")}}}'
    content = content.replace("True", "true").replace("'", '"')
    response = server.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")
    assert server.post(COMPLETIONS, json={"prompt": [1.5]}).status_code == 400


@pytest.mark.parametrize("said", [{"content": None}, {}, {"content": ""}, {"content": []}])
def test_an_assistant_may_have_said_nothing(server: LiveServer, said: dict[str, Any]) -> None:
    messages: Any = [USER, {"role": "assistant", **said}, USER]
    done = server.openai.chat.completions.create(model=MODEL, messages=messages)
    assert done.choices[0].message.content == "You said '[user]Hi[assistant][user]Hi[assistant]'."


@pytest.mark.parametrize("role", ["user", "system", "developer"])
def test_the_others_must_say_something(server: LiveServer, role: str) -> None:
    for said in ({"content": None}, {}):
        response = server.post(CHAT, json={"messages": [{"role": role, **said}]})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "messages[0].content")


def test_a_browser_may_read_the_header(start: Start) -> None:
    server = start(FakeRuntime(), allowed_origins=["https://page.example"])
    response = server.post(
        COMPLETIONS, json={"prompt": "a", "x": 1}, headers={"Origin": "https://page.example"}
    )
    assert HEADER in response.headers["Access-Control-Expose-Headers"]
