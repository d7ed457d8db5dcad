"""Clients that open too much, send too little, close a half, or come from a web page."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_faults import for_ever, stuck_at
from tests.server.test_hostile import CLOSE, exchange, head
from tests.server.test_refusals import error_of
from tpworker.server import bind, bodies, connection, seldom
from tpworker.server.connection import Crowd
from tpworker.server.seldom import Seldom
from tpworker.server.serve import Server, http_config

Start = Callable[..., LiveServer]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def connect() -> Iterator[Callable[[LiveServer], socket.socket]]:
    """Connections that are closed after the test."""
    with ExitStack() as opened:

        def connecting(server: LiveServer, sent: bytes = b"") -> socket.socket:
            client = opened.enter_context(socket.create_connection(server.address))
            client.settimeout(20)
            client.sendall(sent)
            return client

        yield connecting


Connect = Callable[..., socket.socket]


def num_connections(server: LiveServer) -> int:
    return len(server.server.server_state.connections)


def ends(client: socket.socket) -> bytes:
    """What comes until the server closes; a test fails if it does not."""
    received = b""
    try:
        while part := client.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def request(body: dict[str, Any], version: str = "1.1", **headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(content))}
    return head(**lines, **headers).replace(b"HTTP/1.1", f"HTTP/{version}".encode()) + content


# --------------------------------------------------------------------- too many of them


def test_the_connection_that_has_been_idle_for_the_longest_gives_way(start: Start, connect: Connect) -> None:
    server = start(FakeRuntime(before=stuck_at(2)), max_open=4)
    busy = connect(server, request({"prompt": "a", "stream": True}))
    assert busy.recv(100).startswith(b"HTTP/1.1 200 ")
    idle = []
    for count in range(2, 5):
        idle.append(connect(server))
        server.wait_until(lambda count=count: num_connections(server) == count)
    idle[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")  # now it is the one that has waited least
    assert idle[0].recv(100).startswith(b"HTTP/1.1 200 ")
    for gives_way in idle[1:]:
        newest = connect(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert newest.recv(100).startswith(b"HTTP/1.1 200 ")
        gives_way.settimeout(connection.HEADERS_S / 4)  # long before it would be closed anyhow
        assert ends(gives_way) == b""
    idle[0].sendall(head("GET", "/health", **CLOSE))
    assert ends(idle[0]).count(b'{"status":"ready"}') == 2
    assert server.runtime.num_open == 1, "who waits for an answer is not idle"


def test_when_none_is_idle_probes_are_answered_and_the_rest_refused(start: Start, connect: Connect) -> None:
    server = start(FakeRuntime(before=for_ever), max_open=2)
    for _ in range(2):
        connect(server, request({"prompt": "a"}))
    server.wait_until(lambda: server.runtime.num_open == 2)
    for _ in range(3):
        health = server.get("/health")
        assert (health.status_code, health.headers["connection"]) == (200, "close")
        refused = server.post(COMPLETIONS, json={"prompt": "a"})
        assert (refused.status_code, error_of(refused)["code"]) == (503, "too_many_connections")
        assert (
            len(refused.headers.get_list("X-Request-Id")) == len(health.headers.get_list("X-Request-Id")) == 1
        )
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
    server.call(server.runtime.fail)
    server.wait_until(lambda: server.runtime.num_open == 0)
    assert server.post(COMPLETIONS, json={"prompt": "a"}).json()["error"]["code"] == "runtime_failed"


def test_nothing_is_accepted_far_beyond_the_limit(start: Start, connect: Connect) -> None:
    server = start(FakeRuntime(before=for_ever), max_open=2)
    clients = [connect(server, request({"prompt": "a"})) for _ in range(2)]
    server.wait_until(lambda: server.runtime.num_open == 2)
    for _ in range(connection.NUM_SURPLUS * 2):
        clients.append(connect(server))
    server.wait_until(lambda: num_connections(server) <= 2 + connection.NUM_SURPLUS)
    assert server.get("/health").status_code == 200
    assert server.runtime.num_open == 2


def test_a_line_is_logged_once_in_a_while_and_then_with_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(seldom.time, "monotonic", lambda: now)
    few = Seldom()

    def passes(message: str, *arguments: object) -> str | None:
        record = logging.LogRecord("asyncio", logging.ERROR, "", 0, message, arguments, None)
        return record.getMessage() if few.filter(record) else None

    assert passes("out of %s\nsocket: <fd=1>", "files") == "out of files\nsocket: <fd=1>"
    assert [passes(f"out of %s\nsocket: <fd={i}>", "files") for i in range(1000)] == [None] * 1000
    assert passes("another") == "another"
    now += seldom.PERIOD_S
    assert passes("out of %s", "files") == "out of files (1000 more like it in the 30 s before)"
    now += seldom.PERIOD_S
    assert passes("out of %s", "files") == "out of files"
    for i in range(1000):
        passes(f"all different {i}")
    assert len(few._seen) <= 256


def test_another_bug_is_another_line_in_the_log() -> None:
    few = Seldom()

    def passes(bug: Callable[[], object]) -> bool:
        try:
            bug()
        except Exception:
            record = logging.LogRecord("uvicorn.error", 40, "", 0, "Exception", (), sys.exc_info())
            return few.filter(record)
        raise AssertionError

    bugs: list[Callable[[], object]] = [lambda: 1 // 0, lambda: {}[1], lambda: {}[2]]
    bugs.append(lambda: {}[3])
    assert [passes(bug) for bug in bugs * 2] == [True, True, False, True, False, False, False, False]


# ------------------------------------------------------------------- those that send nothing


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """All the times that a client may take are short."""
    for name in ("HEADERS_S", "REST_S", "LINGER_S"):
        monkeypatch.setattr(connection, name, 0.3)
    monkeypatch.setattr(bodies, "PAUSE_S", 0.3)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /v1/comp", b"HTTP/1.1 408 "),
        (head("POST", COMPLETIONS, Host="x", Content_Length="10")[:-2], b"HTTP/1.1 408 "),
        (head("POST", COMPLETIONS, Host="x", Content_Length="10"), b"HTTP/1.1 408 "),
        (head("POST", COMPLETIONS, Host="x", Content_Length="10") + b"{", b"HTTP/1.1 408 "),
        (head("POST", COMPLETIONS, Host="x", Transfer_Encoding="chunked") + b"5\r\nab", b"HTTP/1.1 408 "),
        (head("POST", "/health", Host="x", Content_Length="10") + b"{", b"HTTP/1.1 405 "),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /he", b"HTTP/1.1 200 "),
    ],
    ids=["nothing", "line", "headers", "body", "rest of body", "chunk", "body of nobody", "next request"],
)
def test_what_does_not_come_to_its_end_is_closed(
    start: Start, connect: Connect, sent: bytes, answer: bytes
) -> None:
    received = ends(connect(start(), sent))
    assert received.startswith(answer)
    if b" 408 " in answer:
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
        assert b"connection: close" in received.lower()


def test_a_body_that_trickles_has_an_end_too(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_S", 0.5)
    server = start()
    client = connect(server, head("POST", COMPLETIONS, Host="x", Content_Length="100000"))
    client.settimeout(0.05)
    received = b""
    while not received:
        client.sendall(b" ")
        try:
            received = client.recv(1000)
        except TimeoutError:
            continue
    assert received.startswith(b"HTTP/1.1 408 ")
    server.wait_until(lambda: num_connections(server) == 0)


@pytest.mark.usefixtures("hasty")
def test_who_waits_for_an_answer_or_between_requests_is_left_in_peace(start: Start, connect: Connect) -> None:
    go = asyncio.Event()

    async def before(position: int) -> None:
        if position == 1:
            await go.wait()

    server = start(FakeRuntime(before=before))
    whole = connect(server, request({"prompt": "a", "max_tokens": 3}))
    stream = connect(server, request({"prompt": "a", "max_tokens": 3, "stream": True}))
    idle = connect(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert idle.recv(100).startswith(b"HTTP/1.1 200 ")
    server.wait_until(lambda: server.runtime.num_open == 2)

    async def a_while() -> None:
        await asyncio.sleep(4 * connection.HEADERS_S)

    asyncio.run_coroutine_threadsafe(a_while(), server._loop.result()).result(20)
    assert num_connections(server) == 3
    server.call(go.set)
    for client in (whole, stream, idle):
        client.sendall(head("GET", "/health", **CLOSE))
        received = ends(client)
        assert received.endswith(b'{"status":"ready"}')
        assert client is idle or b'"finish_reason": "length"' in received


def test_who_takes_nothing_of_an_answer_is_closed_and_who_is_slow_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "STALLED_S", 0.4)
    size, num_parts = 1 << 18, 40  # more than the system holds for a client that does not read

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(num_parts):
            await send({"type": "http.response.body", "body": bytes(size), "more_body": i < num_parts - 1})

    async def main() -> int:
        listener = bind("127.0.0.1", 0)
        address = listener.getsockname()
        server = Server(http_config(app, Crowd(10)))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        slow, slow_writer = await asyncio.open_connection(*address, limit=4096)
        _, stalled_writer = await asyncio.open_connection(*address, limit=4096)
        for writer in (slow_writer, stalled_writer):
            writer.write(head("GET", "/", **CLOSE))
        received = 0
        async with asyncio.timeout(60):
            while len(server.server_state.connections) < 2:
                await asyncio.sleep(0.01)
            while len(server.server_state.connections) == 2:  # the stalled one goes, the slow one reads
                received += len(await slow.read(1 << 16))
                await asyncio.sleep(0.02)
            while part := await slow.read(1 << 20):
                received += len(part)
        for writer in (slow_writer, stalled_writer):
            writer.close()
        server.should_exit = True
        await serving
        return received

    assert asyncio.run(main()) > size * num_parts


# ---------------------------------------------------------------------- bodies, all together


def test_all_bodies_together_are_bounded_and_short_ones_always_find_room(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "HELD_BYTES", 300_000)
    server = start()
    gate = next(m for m in _middlewares(server) if type(m).__name__ == "Gate")
    unfinished = head("POST", COMPLETIONS, Host="x", Content_Length="500000") + b" " * 120_000
    clients = [connect(server, unfinished) for _ in range(2)]
    server.wait_until(lambda: gate._bodies.num_held == 2 * (120_000 - bodies.FREE_BYTES))
    body = json.dumps({"prompt": "a", "max_tokens": 3}).ljust(200_000)
    response = server.post(COMPLETIONS, content=body, headers=JSON)
    assert (response.status_code, error_of(response)["code"]) == (503, "bodies_full")
    assert response.headers["retry-after"] == "1"
    assert server.metric('tpworker_requests_total{outcome="unavailable"}') == 1
    assert server.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
    for client in clients:
        client.close()
    server.wait_until(lambda: gate._bodies.num_held == 0)
    assert server.post(COMPLETIONS, content=body, headers=JSON).status_code == 200
    server.wait_until(lambda: gate._bodies.num_held == 0)


def test_a_body_counts_until_it_is_answered(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "HELD_BYTES", 300_000)
    server = start(FakeRuntime(before=for_ever))
    content = json.dumps({"prompt": "a"}).ljust(200_000).encode()
    sent = head("POST", COMPLETIONS, Host="x", Content_Type=JSON["Content-Type"], Content_Length="200000")
    client = connect(server, sent + content)
    server.wait_until(lambda: server.runtime.num_open == 1)
    assert server.post(COMPLETIONS, content=content, headers=JSON).json()["error"]["code"] == "bodies_full"
    client.close()
    server.wait_until(lambda: server.runtime.num_open == 0)


def _middlewares(server: LiveServer) -> Iterator[Any]:
    assert server.get("/health").status_code == 200  # which builds them
    app = server.server.config.loaded_app.middleware_stack
    while app is not None:
        yield app
        app = getattr(app, "app", None) or getattr(app, "_app", None)


# ------------------------------------------------------------- those that close their half


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("stuck", [0, 2])
def test_who_closes_its_sending_side_gets_its_answer(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, version: str, stream: bool, stuck: int
) -> None:
    monkeypatch.setattr(connection, "PROBE_S", 0.1)
    go = asyncio.Event()

    async def before(position: int) -> None:
        if position == stuck:
            await go.wait()

    server = start(FakeRuntime(before=before))
    client = connect(server, request({"prompt": "a", "stream": stream}, version))
    client.shutdown(socket.SHUT_WR)
    server.wait_until(lambda: server.runtime.num_open == 1)

    async def a_while() -> None:
        await asyncio.sleep(0.8)

    asyncio.run_coroutine_threadsafe(a_while(), server._loop.result()).result(20)
    server.call(go.set)
    received = ends(client).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert received.startswith(b"HTTP/1.1 200 ")
    events = received.replace(b":\n\n", b"")
    assert b"[DONE]" in events if stream else json.loads(received.partition(b"\r\n\r\n")[2])["choices"]
    assert server.runtime.aborted == []
    server.wait_until(lambda: num_connections(server) == 0)


def test_several_requests_and_then_the_end_are_all_answered(server: LiveServer) -> None:
    ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    assert exchange(server, ask * 3, half_close=True).count(b"HTTP/1.1 200 ") == 3
    assert exchange(server, ask * 2, ask[:9], half_close=True).count(b"HTTP/1.1 200 ") == 2
    assert exchange(server, b"", half_close=True) == b""
    assert exchange(server, request({"prompt": "a"})[:-1], half_close=True) == b""


# ------------------------------------------------------------- browsers and orchestrators


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/fake-model", "/docs"]
)
def test_head_is_as_get_without_the_body(server: LiveServer, path: str) -> None:
    got, asked = server.get(path), httpx.head(server.url + path)
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-type"] == got.headers["content-type"]
    assert int(asked.headers["content-length"]) > 0
    assert httpx.head(server.url + COMPLETIONS).status_code == 405


def test_nobody_is_sent_elsewhere(server: LiveServer) -> None:
    elsewhere = {"Host": "evil.example"}
    for path in ("/health", "/v1/models", "/v1/models/fake-model"):
        assert server.get(f"{path}/", headers=elsewhere).json().keys() == server.get(path).json().keys()
    response = server.post(f"{COMPLETIONS}/", json={"prompt": "a"}, headers=elsewhere)
    assert response.status_code == 200
    for path in ("/nothing/", "//evil.example", "//evil.example/"):
        assert server.get(path, headers=elsewhere).status_code == 404


def preflight(server: LiveServer, origin: str, method: str = "POST") -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    return httpx.options(server.url + CHAT, headers=headers)


def test_web_pages_of_allowed_origins_may_ask(start: Start) -> None:
    server = start(api_key="secret", allowed_origins=["https://page.example"])
    allowed = preflight(server, "https://page.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in preflight(server, "https://other.example").headers
    assert preflight(server, "https://page.example", "DELETE").status_code == 400

    headers = {"Origin": "https://page.example", "Authorization": "Bearer secret"}
    answers = [
        server.post(COMPLETIONS, json={"prompt": "a"}, headers=headers),
        server.post(COMPLETIONS, json={"prompt": "a", "stream": True}, headers=headers),
        server.post(COMPLETIONS, json={"prompt": "a"}, headers=headers | {"Authorization": "Bearer wrong"}),
        server.post(COMPLETIONS, json={}, headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 401, 400]
    assert {answer.headers["access-control-allow-origin"] for answer in answers} == {headers["Origin"]}
    other = server.post(COMPLETIONS, json={"prompt": "a"}, headers=headers | {"Origin": "https://other"})
    assert "access-control-allow-origin" not in other.headers


def test_all_origins_or_none(start: Start) -> None:
    server = start(allowed_origins=["*"])
    assert preflight(server, "https://any.example").headers["access-control-allow-origin"] == "*"
    server = start()
    refused = preflight(server, "https://any.example")
    assert refused.status_code == 405
    response = server.get("/v1/models", headers={"Origin": "https://any.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
