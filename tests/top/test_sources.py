"""Where snapshots come from: a process that is followed from generation to generation, and a server."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from tests.observe.boards import busy_board
from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tests.top.snapshots import snapshot
from tpworker.errors import ConfigError
from tpworker.ipc.board import About
from tpworker.observe.attach import NoBoard
from tpworker.observe.snapshot import to_json
from tpworker.top.sources import Absent, BoardSource, Ended, UrlSource, told, top_url


def test_a_process_is_followed_through_a_recovery() -> None:
    first = busy_board(generation=0)
    with closing(BoardSource(os.getpid())) as source:
        seen = source.read()
        assert (seen.generation, seen.runtime.pid, seen.scheduler.completed) == (0, os.getpid(), 100)
        assert (seen.runtime.memory_bytes or 0) > 1 << 20
        first.close()
        with pytest.raises(Absent, match="no processes at this moment"):
            source.read()
        with closing(busy_board(generation=1)):
            assert source.read().generation == 1
            with closing(busy_board()), closing(BoardSource(os.getpid())) as several:
                assert several.name.endswith("(the newest of 2 runtimes in it)")
            source._started = 1  # as of a process that had this pid before
            with pytest.raises(Ended, match=f"process {os.getpid()} has ended"):
                source.read()
    with pytest.raises(NoBoard):
        BoardSource(os.getpid())


def test_a_server_is_asked() -> None:
    with (
        closing(busy_board()) as board,
        LiveServer(FakeRuntime(board=board), api_key="secret", served_model_names=("alias",)) as server,
    ):
        for url in (server.url, f"{server.url}/v1", f"{server.url}/top"):
            seen = UrlSource(url, "secret").read()
            assert (seen.model, seen.scheduler.completed) == ("alias", 100)
        for key in (None, "wrong"):
            with pytest.raises(ConfigError, match=r"wants its API key \(status 401\): --api-key-file"):
                UrlSource(server.url, key).read()


class Answers(BaseHTTPRequestHandler):
    """By path; and tells which keys it was sent."""

    keys: list[str | None] = []  # noqa: RUF012  # of the whole test

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        status = {"/missing/top": 404, "/moved/top": 302, "/busy/top": 503}.get(self.path, 200)
        body = b'{"other": []}' if self.path != "/text/top" else b"hello"
        if self.path == "/good/top":
            body = json.dumps(to_json(snapshot(3))).encode()
        if self.path == "/lies/top":
            body = b'{"model": 7}'
        self.send_response(status)
        self.send_header("Location", "/good/top")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *unused: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_servers_answer(url: str) -> None:
    assert UrlSource(f"{url}/good").read() == snapshot(3)
    for path, message in (
        ("/missing", r"is not there \(status 404\): the server is no tpworker, or an older one"),
        ("/moved", r"is not there \(status 302\)"),
        ("/text", "answers as no tpworker does"),
        ("/lies", "answers as no tpworker does"),
    ):
        with pytest.raises(ConfigError, match=message):
            UrlSource(url + path).read()
    with pytest.raises(Absent, match="answers with status 503"):
        UrlSource(f"{url}/busy").read()
    Answers.keys.clear()
    with pytest.raises(ConfigError):
        UrlSource(f"{url}/moved", "secret").read()
    assert Answers.keys == ["Bearer secret"], "it was sent elsewhere, too"


def test_a_server_that_is_not_there_may_come_back() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(Absent, match=r"does not answer: .*refused"):
            UrlSource(f"http://127.0.0.1:{taken.getsockname()[1]}").read()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:8000", "http://h:8000/top"),
        ("https://h/llm/v1/", "https://h/llm/top"),
        ("http://[::1]:1/top?x=1#y", "http://[::1]:1/top"),
    ],
)
def test_urls(url: str, expected: str) -> None:
    assert top_url(url) == expected


@pytest.mark.parametrize(
    "url",
    ["ftp://h", "http://", "http:///top", "http://[::1", "http://h:0", "http://a b", "http://[::1]x"],
)
def test_what_is_no_url_of_a_server(url: str) -> None:
    with pytest.raises(ConfigError, match="no URL of a server"):
        top_url(url)


def test_choices() -> None:
    choices = [
        (12, About(model="/m/qwen3-8b", device="cuda", gpus=("a", "b"), created_ns=0)),
        (345, About(model="/m/tiny\x1b", device="cpu", created_ns=60_000_000_000)),
    ]
    assert told(choices, 192_000_000_000) == [
        "  1  pid 12       qwen3-8b, 2 GPUs, since 3:12",
        "  2  pid 345      tiny?, cpu, since 2:12",
    ]
