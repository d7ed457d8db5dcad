"""Streams of events past the layers of the app: what clients get is the same."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_hostile import exchange, head
from tpworker.errors import RequestFailed
from tpworker.outputs import RequestOutput
from tpworker.server.connection import BodyWriter, Connection

Start = Callable[..., LiveServer]
TEXT = "".join(chr(0x61 + i % 26) for i in range(3000)) + '—\u2028\x00"\\é'


@pytest.fixture
def num_written(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many parts have been written past the layers."""
    count, write = 0, BodyWriter.write

    def counted(self: BodyWriter, part: bytes) -> None:
        nonlocal count
        count += 1
        write(self, part)

    monkeypatch.setattr(BodyWriter, "write", counted)
    return lambda: count


def request(version: str = "1.1", path: str = "/v1/completions", **more: object) -> bytes:
    asked = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "stream": True, **more}
    del asked["messages" if path.endswith("/completions") and "chat" not in path else "prompt"]
    body = json.dumps(asked).encode()
    kind = {"Content_Type": "application/json", "Content_Length": str(len(body))}
    sent = head("POST", path, Host="x", Connection="close", **kind) + body
    return sent.replace(b"HTTP/1.1", f"HTTP/{version}".encode())


def body_of(answer: bytes) -> bytes:
    """Without headers, and without chunks' marks if there are any."""
    headers, _, body = answer.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200")
    if b"transfer-encoding: chunked" not in headers.lower():
        return body
    whole, place, size = [], 0, -1
    while size:
        end = body.index(b"\r\n", place)
        size, begin = int(body[place:end], 16), end + 2
        whole.append(body[begin : begin + size])
        place = begin + size + 2
        assert body[begin + size : place] == b"\r\n"
    assert place == len(body), "the last chunk is empty, and nothing comes behind it"
    return b"".join(whole)


def events_of(answer: bytes) -> list[dict[str, object]]:
    *events, end, nothing = body_of(answer).decode().split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(answer: bytes) -> str:
    choices = [event["choices"][0] for event in events_of(answer)]  # type: ignore[index]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    return "".join(choice["text"] for choice in choices)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_each_version_of_http_gets_the_whole_text(
    start: Start, num_written: Callable[[], int], version: str
) -> None:
    server = start(FakeRuntime(reply=lambda prompt: TEXT, longest=5000))
    answer = exchange(server, request(version, max_tokens=4000))
    assert text_of(answer) == TEXT
    assert num_written() > 1000
    assert (b"chunked" in answer.partition(b"\r\n\r\n")[0]) == (version == "1.1")


def test_what_an_event_holds_is_the_same_as_in_the_layers(
    start: Start, monkeypatch: pytest.MonkeyPatch, num_written: Callable[[], int]
) -> None:
    server = start(FakeRuntime(reply=lambda prompt: TEXT[-40:]))
    asked = [
        {},
        {"n": 2},
        {"path": "/v1/chat/completions", "n": 2, "stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"logprobs": 1, "return_token_ids": True},
    ]

    def answers() -> list[dict[tuple[int, str], str]]:
        told = []
        for more in asked:
            texts: dict[tuple[int, str], str] = {}
            for event in events_of(exchange(server, request(max_tokens=99, **more))):  # type: ignore[arg-type]
                for choice in event["choices"]:  # type: ignore[attr-defined]
                    for name, value in choice.get("delta", choice).items():
                        key = choice["index"], name
                        texts[key] = texts.get(key, "") + str(value if value is not None else "")
            told.append(texts)
        return told

    past = answers()
    assert num_written() > 50
    before = num_written()
    monkeypatch.setattr(BodyWriter, "is_free", property(lambda self: False))
    assert [
        {k: v for k, v in each.items() if k[1] in ("text", "content", "finish_reason")} for each in answers()
    ] == [{k: v for k, v in each.items() if k[1] in ("text", "content", "finish_reason")} for each in past]
    assert num_written() == before


def test_for_who_reads_slowly_tokens_wait_and_come_together(
    start: Start, num_written: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection_made = Connection.connection_made

    def with_a_small_buffer(self: Connection, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        connection_made(self, transport)

    monkeypatch.setattr(Connection, "connection_made", with_a_small_buffer)
    length = 6000
    server = start(FakeRuntime(reply=lambda prompt: "x" * length, longest=length + 9))
    with socket.create_connection(server.address) as client:
        client.settimeout(60)
        client.sendall(request(max_tokens=length))
        answer = client.recv(4096)
        written = -1
        while written != (written := num_written()):  # until nothing is written any more: buffers are full
            time.sleep(0.5)
        while part := client.recv(1 << 20):
            answer += part
    assert text_of(answer) == "x" * length
    assert 0 < num_written() < length - 100, "the rest came together"
    assert len(events_of(answer)) < length - 100


def test_a_client_that_leaves_in_the_middle_ends_its_request(start: Start) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "x" * 100_000, longest=100_009))
    with socket.create_connection(server.address) as client:
        client.sendall(request(max_tokens=100_000))
        assert client.recv(4096)
    deadline = time.monotonic() + 20
    while server.call(lambda: server.runtime.num_open):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.runtime.aborted


class Scripted:
    """A collector: in each of the script's turns it gives outputs, or raises."""

    num_turns = 0
    """That have begun, of all collectors at once."""

    def __init__(self, turns: list[list[RequestOutput] | Exception]) -> None:
        self._turns = turns

    def listen(self, on_news: Callable[[], None], *, is_whole: bool = False) -> None:
        def turn() -> None:
            Scripted.num_turns += 1
            on_news()

        for number in range(len(self._turns)):
            asyncio.get_running_loop().call_later(0.05 * (1 + number), turn)

    def take(self) -> Sequence[RequestOutput]:
        if not Scripted.num_turns:
            return ()
        given = self._turns[Scripted.num_turns - 1]
        if isinstance(given, Exception):
            raise given
        self._turns[Scripted.num_turns - 1] = []
        return given

    is_over = False

    async def aclose(self) -> None: ...


def token(text: str) -> RequestOutput:
    return RequestOutput("r", text, (7,), None, None, 1, 0, 1)


@pytest.mark.parametrize("text", ["more", ""])
def test_an_error_in_the_turn_of_another_prompts_output_ends_the_stream(
    start: Start, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Whether there is something to send before it or not."""
    server = start()
    monkeypatch.setattr(Scripted, "num_turns", 0)
    failing = Scripted([[token("two")], RequestFailed("it cannot go on")])
    monkeypatch.setattr(failing, "listen", lambda *arguments, **options: None)
    collectors = iter([Scripted([[token("one")], [token(text)]]), failing])

    async def collect(*arguments: Any, **options: Any) -> Scripted:
        return next(collectors)

    monkeypatch.setattr(server.runtime, "collect", collect)
    with socket.create_connection(server.address) as client:
        client.settimeout(20)
        client.sendall(request(prompt=["a", "b"]))
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert b"it cannot go on" in answer
    assert (b'"more"' in answer) == bool(text)
