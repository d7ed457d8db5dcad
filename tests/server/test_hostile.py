"""Requests that nobody sends in good faith: no 500, no waiting for ever, no traceback comes of any."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime

Start = Callable[..., LiveServer]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def _no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a client does is an error of ours."""
    yield
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR or r.exc_info] == []


def exchange(server: LiveServer, *parts: bytes, half_close: bool = False) -> bytes:
    """All that the server sends in answer to these bytes, until it closes."""
    with socket.create_connection(server.address) as client:
        client.settimeout(20)
        try:
            for part in parts:
                client.sendall(part)
            if half_close:
                client.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while part := client.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def head(method: str = "POST", path: str = COMPLETIONS, **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {v}" for name, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


CLOSE = {"Host": "x", "Connection": "close"}
BODY = b'{"prompt": "a", "max_tokens": 2}'
WHOLE = head(**CLOSE, Content_Type="application/json", Content_Length=str(len(BODY))) + BODY
CHUNKED = head(**CLOSE, Content_Type="application/json", Transfer_Encoding="chunked")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (head("GET", "/health", Host="[::1", Connection="close"), 200),
        (head("GET", "/nothing", Host="[::1", Connection="close"), 404),
        (head("GET", "/nothing", Host="\xff", Connection="close"), 404),
        (head("GET", COMPLETIONS, Host="[", Connection="close"), 405),
        (head("GET", "http://any.host:1/health", **CLOSE), 200),
        (head("GET", "http://any.host", **CLOSE), 404),
        (head("GET", "HTTPS://[bad/v1/models", **CLOSE), 200),
        (head("OPTIONS", "*", **CLOSE), 404),
        (head("CONNECT", "x:443", **CLOSE), 404),
        (head("BREW", "/health", **CLOSE), 405),
        # What a proxy may take for two requests: refused, and nothing behind it is read.
        (head(Host="x", Content_Length="5", Transfer_Encoding="chunked") + b"0\r\n\r\n" + WHOLE, 400),
        (head("GET", "/%ff%00%0d%0a", **CLOSE), 404),
        (head("GET", "/v1/models/%ff%00", **CLOSE), 404),
        (head("GET", "/v1/models/" + "x" * 10_000, **CLOSE), 404),
        (head("GET", "/health?" + "x" * 10_000, **CLOSE), 200),
        (head("GET", "/" + "x" * 1_000_000, **CLOSE), 400),
        (head("GET", "/health", **CLOSE, X_Long="x" * 1_000_000), 400),
        (head("GET", "/health", **CLOSE).replace(b"\r\n\r\n", b"\r\nx: y" * 100_000 + b"\r\n\r\n"), 400),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),
        (head("GET", "/health", **CLOSE, Upgrade="websocket").replace(b"close", b"upgrade, close"), 200),
        (head("GET", "/health", Host="x", Connection="close", Expect="100-continue"), 200),
        (head(**CLOSE, Content_Length="-1"), 400),
        (head(**CLOSE, Content_Length="5", Transfer_Encoding="gzip"), 400),
        (CHUNKED + b"zz\r\n", 400),
        (CHUNKED + b"5\r\nabcdeXX", 400),
        (CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), 200),
        (head(**CLOSE, Content_Type="application/json"), 400),
    ],
)
def test_what_is_hardly_http(server: LiveServer, sent: bytes, status: int) -> None:
    answer = exchange(server, sent)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    if status >= 400:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert len(answer) < 5000
    assert exchange(server, WHOLE).startswith(b"HTTP/1.1 200 ")


def test_bytes_that_break_off_after_the_answer(start: Start) -> None:
    server = start(api_key="secret")
    sent = CHUNKED.replace(b"close", b"keep-alive")
    with socket.create_connection(server.address) as client:
        client.settimeout(20)
        client.sendall(sent)
        assert client.recv(100).startswith(b"HTTP/1.1 401 ")  # before the body, which is no body
        client.sendall(b"no chunk\r\n")
        while client.recv(65536):
            pass


def test_requests_one_behind_the_other(server: LiveServer) -> None:
    first = WHOLE.replace(b"Connection: close\r\n", b"")
    answer = exchange(server, first + first + WHOLE)
    assert answer.count(b"HTTP/1.1 200 ") == 3


@pytest.mark.parametrize(
    ("headers", "content", "status", "words"),
    [
        (JSON | {"Content-Encoding": "gzip"}, gzip.compress(BODY, mtime=0), 415, "Content-Encoding"),
        (JSON | {"Content-Encoding": "br"}, BODY, 415, "Content-Encoding"),
        (JSON | {"Content-Encoding": "identity"}, BODY, 200, "Yo"),
        ({"Content-Type": "application/json; charset=utf-16"}, BODY.decode().encode("utf-16"), 200, "Yo"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, BODY, 400, "Content-Type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"prompt=a", 400, "Content-Type"),
        ({"Content-Type": "\xff/\xff"}, BODY, 400, "Content-Type"),
        (JSON, b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", 400, "digits"),
        (JSON, b'{"prompt": "a", "max_tokens": 2, "max_tokens": 1}', 200, "length"),
        (JSON, b'{"prompt": "a", "n": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "n=["),
        (JSON, b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "prompt"),
        (JSON, b'{"prompt": "a", "stop": ' + b'{"a":' * 900 + b"1" + b"}" * 901, 400, "stop"),
        (JSON, b'{"prompt": "a\\u0000b", "max_tokens": 2}', 200, "Yo"),
        (JSON, b'{"prompt": [1, 1e400]}', 400, "prompt"),
        (JSON, b'{"prompt": [-Infinity]}', 400, "prompt"),
        (JSON, b'{"prompt": [' + b"9" * 4000 + b"]}", 400, "prompt"),
        (JSON, b'{"prompt": "a", "temperature": -Infinity}', 400, "temperature"),
        (JSON, b'{"prompt": "a", "top_p": NaN}', 400, "top_p"),
        (JSON, b'{"prompt": "a", "seed": Infinity}', 400, "seed"),
        (JSON, b'{"prompt": "a", "metadata": NaN, "max_tokens": 2}', 200, "Yo"),
        (JSON, b'{"prompt": "a", "\\ud800": {"\\udfff": 1}, "max_tokens": 2}', 200, "Yo"),
        (JSON, b'{"prompt": "a", "stop": "\\ud800", "max_tokens": 2}', 400, "stop[0]"),
        (JSON, b'{"prompt": "a", "stream_options": {"\\ud800": 1}, "stream": true}', 200, "[DONE]"),
        (JSON, b'{"prompt": "a", "max_tokens": 2, "%s": 1}' % (b"x" * 500_000), 200, "Yo"),
        (JSON, b'{"prompt": "a", "model": "%s"}' % (b"x" * 500_000), 404, "the model"),
        (JSON, b"\xef\xbb\xbf" + BODY, 200, "Yo"),
        (JSON, b"\x00" * 1000, 400, "JSON"),
    ],
)
def test_bodies_that_nobody_writes(
    server: LiveServer, headers: dict[str, str], content: bytes, status: int, words: str
) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    response = server.post(COMPLETIONS, content=content, headers=raw)
    assert response.status_code == status, response.text
    assert len(response.text) < 5000
    assert words in response.text


_INNER = [
    *("tool_calls", "tool_call_id", "function", "name", "parameters", "arguments", "call_id", "output"),
    *("json_schema", "schema", "json", "regex", "choice", "format", "effort", "strict"),
]
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**62)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(["user", "system", "assistant", "text", "a", "fake-model"])
    | st.sampled_from(["tool", "function", "function_call", "reasoning", "json_schema", "json_object", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "x", "\ud800", *_INNER]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
_names = [
    *(
        "model",
        "prompt",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
    ),
    *("min_tokens", "seed", "stop", "stop_token_ids", "ignore_eos", "n", "logit_bias", "tools", "user"),
    *("max_completion_tokens", "chat_template_kwargs", "response_format", "logprobs", "other"),
    *("top_logprobs", "prompt_logprobs", "echo", "best_of", "min_p", "presence_penalty", "bad_words"),
    *("tool_choice", "parallel_tool_calls", "structured_outputs", "guided_json", "guided_choice", "regex"),
    *("reasoning_effort", "enable_thinking", "separate_reasoning", "input", "text", "reasoning"),
    *("allowed_token_ids", "priority", "cache_salt", "return_tokens_as_token_ids", "repetition_penalty"),
]


RESPONSES = "/v1/responses"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(extra=st.dictionaries(st.sampled_from(_names), _values, max_size=4))
def test_no_body_is_a_bug(server: LiveServer, path: str, extra: dict[str, Any]) -> None:
    start: dict[str, Any] = {
        COMPLETIONS: {"prompt": "a"},
        CHAT: {"messages": [_USER]},
        RESPONSES: {"input": "a"},
    }[path]
    response = _client(server).post(path, content=json.dumps(start | extra), headers=JSON)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


_USER = {"role": "user", "content": "Hi"}
_clients: dict[str, httpx.Client] = {}


def _client(server: LiveServer) -> httpx.Client:
    """One for all examples: a connection each would take most of the time."""
    return _clients.setdefault(server.url, httpx.Client(base_url=server.url, timeout=20))


def test_a_bug_is_still_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """That the fixture above can fail."""

    def broken(prompt: str) -> str:
        raise ZeroDivisionError

    with LiveServer(FakeRuntime(reply=broken)) as server:
        assert server.post(COMPLETIONS, json={"prompt": "a"}).status_code == 500
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]
    caplog.clear()


_FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
_PLACES: list[tuple[str, Callable[[Any], dict[str, Any]]]] = [
    (CHAT, lambda one: {"tools": [one]}),
    (CHAT, lambda one: {"tools": [{"type": "function", "function": one}]}),
    (CHAT, lambda one: {"tools": [{"type": "function", "function": _FUNCTION | {"parameters": one}}]}),
    (CHAT, lambda one: {"tools": [{"type": "function", "function": _FUNCTION}], "tool_choice": one}),
    (CHAT, lambda one: {"messages": [_USER, one]}),
    (CHAT, lambda one: {"messages": [_USER, {"role": "assistant", "tool_calls": [one]}]}),
    (CHAT, lambda one: {"messages": [_USER, {"role": "tool", "content": one, "tool_call_id": "a"}]}),
    (CHAT, lambda one: {"response_format": one}),
    (CHAT, lambda one: {"response_format": {"type": "json_schema", "json_schema": one}}),
    (CHAT, lambda one: {"structured_outputs": one}),
    (RESPONSES, lambda one: {"input": [_USER, one]}),
    (RESPONSES, lambda one: {"tools": [{"type": "function", "name": "f", "parameters": one}]}),
    (RESPONSES, lambda one: {"text": {"format": one}}),
]


@pytest.mark.parametrize("place", range(len(_PLACES)))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=_values)
def test_nothing_within_a_body_is_a_bug(server: LiveServer, place: int, value: Any) -> None:
    path, put = _PLACES[place]
    start = {"messages": [_USER]} if path == CHAT else {"input": "a"}
    response = _client(server).post(path, content=json.dumps(start | put(value)), headers=JSON)
    assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize("place", range(len(_PLACES)))
@pytest.mark.parametrize(
    "value", ["[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, '{"\\ud800": "\\ud800"}']
)
def test_values_that_are_deep_or_no_text(server: LiveServer, place: int, value: str) -> None:
    path, put = _PLACES[place]
    start = {"messages": [_USER]} if path == CHAT else {"input": "a"}
    content = json.dumps(start | put("HERE")).replace('"HERE"', value)
    response = server.post(path, content=content, headers=JSON)
    assert response.status_code in (200, 400), response.text
    assert server.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
