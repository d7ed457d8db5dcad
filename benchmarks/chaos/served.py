"""A server to be treated badly: its start, and what is left after its end."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from benchmarks.common.vocabulary import write_tokenizer

READY_SECONDS = 300.0
MODEL = "chaos"
"""The name that is served."""


@contextlib.contextmanager
def served(
    options: argparse.Namespace, folder: Path, log: object
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server, until it is ready and as long as it is wanted; its log goes to a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tpworker", "serve", "--port", str(port), "--dtype", options.dtype]
    command += ["--tensor-parallel-size", str(options.tensor_parallel_size), "--served-model-name", MODEL]
    command += ["--step-timeout", str(options.step_timeout), "--max-restarts", "100000"]
    command += ["--load-format", options.load_format, *options.server_option]
    if options.model:
        command += ["--model", str(_with_tokenizer(Path(options.model), folder))]
    server = subprocess.Popen(command, stdout=log, stderr=log)  # type: ignore[call-overload]
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(server, url)
        yield server, url
    finally:
        server.kill()
        server.wait()


def still_there(processes: dict[str, psutil.Process]) -> list[str]:
    """Of a server's processes, those that have not ended: zombies have, and wait for whoever is process 1."""
    found = []
    for name, process in processes.items():
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(name)
    return found


def _with_tokenizer(model: Path, folder: Path) -> Path:
    """The model's folder; of one that is a config.json alone a copy, with a tokenizer made for it."""
    if not (model / "config.json").exists() or (model / "tokenizer.json").exists():
        return model
    text = (model / "config.json").read_text()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(text)
    write_tokenizer(folder / "model", json.loads(text)["vocab_size"])
    return folder / "model"


def _wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    """Raises RuntimeError if it does not get so."""
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not get ready (status {server.poll()})")
