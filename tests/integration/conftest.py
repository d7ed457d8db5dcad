"""A real server, as a process of its own; and a tiny model for all who compare with an oracle."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import eventually

VOCAB = 97


class Server:
    """`tpworker serve` as a process of its own.

    Args:
        options: of `tpworker serve`.
        port: to listen on; None: one that is free.
    """

    def __init__(self, *options: str, port: int | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port or free.getsockname()[1]
        command = [sys.executable, "-m", "tpworker", "serve", "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        assert self.process.stderr is not None
        stderr = self.process.stderr
        self._reader = threading.Thread(target=lambda: self.lines.extend(stderr), daemon=True)
        self._reader.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready, status {self.process.poll()}:\n{self.stderr}")

    @property
    def stderr(self) -> str:
        return "".join(self.lines)

    def children(self) -> dict[str, psutil.Process]:
        """The runtime's processes, by the names that `ps` shows."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {child.cmdline()[0]: child for child in children}

    def wait(self, seconds: float = 60.0) -> int:
        status = self.process.wait(seconds)
        self._reader.join(10)
        return status

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """Starts servers; afterwards they are gone, with every process and socket of theirs."""
    servers: list[tuple[Server, list[psutil.Process]]] = []

    def start(*options: str, port: int | None = None) -> Server:
        server = Server(*options, port=port)
        servers.append((server, []))
        server.wait_until_ready()
        servers[-1][1].extend(server.children().values())
        return server

    yield start
    for server, children in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(30)
        _, alive = psutil.wait_procs(children, 20)
        assert not alive, f"left behind: {alive}"
        eventually(lambda pid=server.process.pid: not _sockets_of(pid))  # type: ignore[misc]


def _sockets_of(pid: int) -> list[str]:
    """The abstract sockets that the runtime in process `pid` has had made."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [line for line in lines if f"@tpworker-{pid}-" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six query and three key-value heads, and a vocabulary that no TP size divides."""
    from transformers import LlamaConfig

    from tests.model.helpers import tiny_model

    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    tiny_model(folder, config)
    return folder
