"""What a token costs between the scheduler and a client's socket: detokenising, events, HTTP.

Server, scheduler and rank are the real processes, with a tokenizer of 49,152 tokens; only the device is fake:
every step takes the same time (tpworker/testing/fake_process.py). So many streams decode at a time, and are
read by a client that looks at bytes alone. CPU time is what counts, of each process by itself; how many
tokens a second that is shows as far as the cores reach.

    chat         /v1/chat/completions, streamed: an event a token
    completion   /v1/completions, streamed
    ids          the same with token ids in each event (return_token_ids)
    whole        /v1/completions, not streamed
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.common.cpu import Others, Usage
from benchmarks.common.options import positive
from benchmarks.common.report import Summary, machine, save
from benchmarks.common.vocabulary import write_tokenizer
from tpworker.testing.fake_process import fake_model

GOAL = 15.0
"""Microseconds of CPU time a token in the process that speaks HTTP, at 256 streams."""

_VOCAB_SIZE = 49152
_COMMON: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hello there"}], "stream": True},
    ),
    "completion": ("/v1/completions", {"prompt": "Hello there", "stream": True}),
    "ids": ("/v1/completions", {"prompt": "Hello there", "stream": True, "return_token_ids": True}),
    "whole": ("/v1/completions", {"prompt": "Hello there"}),
}
_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
_SETTLE_S = 2.0
_TOKENS = re.compile(r"^vllm:generation_tokens_total(?:{[^}]*})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Window:
    """A while of steady streams."""

    tokens_per_second: float
    events: float
    """Of a token: fewer than 1, where the server is late and sends several tokens as one. 0: not streamed."""
    cpu: dict[str, float]
    """By part: microseconds of CPU time a token."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    parser.add_argument("--streams", type=positive, nargs="+", default=[16, 256], help="default: 16 256")
    parser.add_argument("--step-ms", type=float, default=4.27, help="default: 4.27, 60,000 tokens/s of 256")
    parser.add_argument("--max-tokens", type=positive, default=500, help="of each answer; default: 500")
    parser.add_argument("--seconds", type=positive, default=5, help="of a round; default: 5")
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table, writes the JSON file."""
    where, others = machine(), Others()
    cells: dict[tuple[str, int], list[Window]] = {}
    with tempfile.TemporaryDirectory() as name, _served(Path(name), options) as (server, port):
        for _ in range(options.rounds):
            for kind in options.kinds:
                for streams in options.streams:
                    window = _measured(server, port, kind, streams, options)
                    cells.setdefault((kind, streams), []).append(window)
    where["others"] = others.share()
    _print(cells, options, where)
    rows = [
        {
            "kind": kind,
            "streams": streams,
            "tokens/s": w.tokens_per_second,
            "events": w.events,
            "cpu_us_a_token": w.cpu,
        }
        for (kind, streams), windows in cells.items()
        for w in windows
    ]
    save(options.json, {"machine": where, "options": vars(options), "windows": rows})
    return 0


@contextmanager
def _served(folder: Path, options: argparse.Namespace) -> Iterator[tuple[psutil.Process, int]]:
    """The server's process, and its port."""
    fake_model(folder, step_seconds=options.step_ms / 1000, vocab_size=_VOCAB_SIZE)
    write_tokenizer(folder, _VOCAB_SIZE)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _TEMPLATE})
    )
    command = [sys.executable, "-m", "benchmarks.host.http_server", str(folder), str(max(options.streams))]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = server.stdout.readline()
        if not port:
            raise RuntimeError("the server did not start; what it said is above")
        yield psutil.Process(server.pid), int(port)
    finally:
        server.terminate()
        server.wait()


def _measured(
    server: psutil.Process, port: int, kind: str, streams: int, options: argparse.Namespace
) -> Window:
    path, body = KINDS[kind]
    told = json.dumps({**_COMMON, **body, "max_tokens": options.max_tokens})
    command = [sys.executable, "-m", "benchmarks.host.http_clients", str(port), path, told, str(streams)]
    clients = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(_SETTLE_S)
        pids = {"HTTP": server.pid, "clients": clients.pid}
        pids |= {
            _part(child.name()): child.pid for child in server.children(recursive=True) if _part(child.name())
        }
        began, tokens, events, before = (
            time.monotonic(),
            _num_tokens(port),
            _num_events(clients),
            _usage(pids),
        )
        time.sleep(options.seconds)
        seconds, after = time.monotonic() - began, _usage(pids)
        tokens, events = _num_tokens(port) - tokens, _num_events(clients) - events
    finally:
        clients.stdin.close()  # type: ignore[union-attr]
        clients.wait()
    return Window(
        tokens / seconds,
        events / tokens,
        {part: 1e6 * (after[part] - before[part]).cpu / tokens for part in pids},
    )


def _num_events(clients: subprocess.Popen[str]) -> int:
    assert clients.stdin is not None
    assert clients.stdout is not None
    clients.stdin.write("\n")
    clients.stdin.flush()
    if not (told := clients.stdout.readline()):
        raise RuntimeError("the clients failed; what they said is above")
    return int(told)


def _usage(pids: dict[str, int]) -> dict[str, Usage]:
    return {part: Usage.of(pid) for part, pid in pids.items()}


def _part(name: str) -> str:
    """'' for those that only wait."""
    if "standby" in name:
        return ""
    return "scheduler" if "scheduler" in name else "rank" if "rank0" in name else ""


def _num_tokens(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        found = _TOKENS.search(page.read().decode())
    assert found is not None
    return float(found[1])


def _print(
    cells: dict[tuple[str, int], list[Window]], options: argparse.Namespace, where: dict[str, Any]
) -> None:
    parts = ("HTTP", "scheduler", "rank", "clients")
    table = Table(
        "kind", "streams", "tokens/s", "events", *(f"{part}, µs" for part in parts),
        title="CPU time of a token", caption="median (lowest … highest) of the rounds",
    )  # fmt: skip
    for (kind, streams), windows in cells.items():
        pace = Summary.of([[window.tokens_per_second] for window in windows]).median
        events = Summary.of([[window.events] for window in windows]).median
        shown = []
        for part in parts:
            cpu = Summary.of([[window.cpu[part]] for window in windows])
            shown.append(f"{cpu.median:.1f} ({cpu.low:.1f} … {cpu.high:.1f})")
        table.add_row(kind, str(streams), f"{pace:,.0f}", f"{events:.2f}", *shown)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(
        f"goal: HTTP at most {GOAL:g} µs at 256 streams. {where['cpu']}, {where['cores']} cores, Python "
        f"{where['python']}; other programs took {where['others']:.2f} cores; {where['command']}"
    )
