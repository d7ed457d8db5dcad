"""https: a whole answer, a stream, and what goes wrong."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_refusals import COMPLETIONS
from tpworker.server import Tls

Start = Callable[..., LiveServer]


@pytest.fixture
def tls(tls_folder: Path) -> Tls:
    return Tls(str(tls_folder / "one.crt"), str(tls_folder / "one.key"))


@pytest.fixture
def trusting(tls_folder: Path) -> ssl.SSLContext:
    """What a client needs that knows who vouches for the certificate."""
    return ssl.create_default_context(cafile=str(tls_folder / "ca.crt"))


@pytest.mark.parametrize("stream", [False, True])
def test_answers_over_https(start: Start, tls: Tls, trusting: ssl.SSLContext, stream: bool) -> None:
    server = start(tls=tls)
    assert server.url.startswith("https://")
    body = {"prompt": "a", "max_tokens": 20, "stream": stream}
    with httpx.Client(verify=trusting) as client:
        for _ in range(2):
            response = client.post(server.url + COMPLETIONS, json=body)
            assert response.status_code == 200
            assert ("[DONE]" in response.text) == stream
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{server.url}/health")


def test_a_client_that_leaves_ends_its_request(
    start: Start, tls: Tls, trusting: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    async def wait(position: int) -> None:
        await asyncio.Event().wait()

    server = start(FakeRuntime(before=wait), tls=tls)
    plain = socket.create_connection(server.address)
    with trusting.wrap_socket(plain, server_hostname="127.0.0.1") as client:
        body = b'{"prompt": "a"}'
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_until(lambda: server.runtime.num_open == 1)
        client.unwrap().close()
        server.wait_until(lambda: len(server.runtime.aborted) == 1)
    assert "no effect when using ssl" not in caplog.text


def test_what_is_no_http_is_refused_there_too(
    start: Start, tls: Tls, trusting: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(tls=tls)
    plain = socket.create_connection(server.address)
    with trusting.wrap_socket(plain, server_hostname="127.0.0.1") as client:
        client.settimeout(10)
        client.sendall(b"NONSENSE\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 400 ")
        while client.recv(1000):
            pass
    with socket.create_connection(server.address) as client:  # no TLS either
        client.settimeout(10)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" not in client.recv(1000)
    with httpx.Client(verify=trusting) as good:
        assert good.get(f"{server.url}/health").status_code == 200
    assert "Fatal error" not in caplog.text
