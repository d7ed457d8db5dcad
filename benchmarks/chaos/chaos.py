"""Kills, stops and slows a server's processes while clients ask, and judges what they get and what is left.

The right answers are asked for before anything happens, each twice. Outputs are exact in float32; with
another dtype, or random weights, only their lengths and ends are compared. Status 0: nobody lost anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from benchmarks.chaos.faults import KINDS, disturb, members
from benchmarks.chaos.judge import Quiet, Verdict, leaks, pauses, wrong_answers
from benchmarks.chaos.load import Answer, Case, Client, ask, cases
from benchmarks.common.options import positive
from benchmarks.common.report import machine, quantile, save
from benchmarks.common.vocabulary import write_tokenizer

READY_SECONDS = 300.0
ASK_SECONDS = 600.0  # of a client's patience
QUIET_SECONDS = 60.0
MODEL = "chaos"  # the name that is served


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of this tool."""
    parser.add_argument("--model", help="a folder or a hub name (default: the default model)")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tensor-parallel-size", type=positive, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of faults (default: 60)")
    parser.add_argument("--faults-every", type=float, default=5.0, help="seconds, on the mean (default: 5)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--victims", nargs="+", metavar="KIND",
        default=["rank", "scheduler", "rank-standby", "scheduler-standby", "keeper"],
    )  # fmt: skip
    parser.add_argument("--clients", type=positive, default=8)
    parser.add_argument("--tokens", type=positive, default=64, help="of an answer, at most (default: 64)")
    parser.add_argument("--step-timeout", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-option", action="append", default=[], help="one more for `tpworker serve`")


def run(options: argparse.Namespace) -> int:
    """Prints what happened; 0 if nobody lost anything."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        with served(options, Path(folder), log) as (server, url):
            verdict = asyncio.run(soak(options, server.pid, url))
            there = members(server.pid)
            server.send_signal(signal.SIGTERM)
            verdict.status = server.wait(60)
        verdict.left_behind = still_there(there)
        log.seek(0)
        report(verdict, log.read())
    save(options.json, {"machine": machine(), "options": vars(options), "verdict": verdict.as_json()})
    return 0 if verdict.is_good else 1


def still_there(processes: dict[str, psutil.Process]) -> list[str]:
    """Of a server's processes, those that have not ended: zombies have, and wait for whoever is process 1."""
    found = []
    for name, process in processes.items():
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(name)
    return found


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
        command += ["--model", str(with_tokenizer(Path(options.model), folder))]
    server = subprocess.Popen(command, stdout=log, stderr=log)  # type: ignore[call-overload]
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(server, url)
        yield server, url
    finally:
        server.kill()
        server.wait()


def with_tokenizer(model: Path, folder: Path) -> Path:
    """The model's folder; of one that is a config.json alone a copy, with a tokenizer made for it."""
    if not (model / "config.json").exists() or (model / "tokenizer.json").exists():
        return model
    text = (model / "config.json").read_text()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(text)
    write_tokenizer(folder / "model", json.loads(text)["vocab_size"])
    return folder / "model"


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    """Raises RuntimeError if it does not get so."""
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not get ready (status {server.poll()})")


async def soak(options: argparse.Namespace, server: int, url: str) -> Verdict:
    """Asks for the right answers, then for some time while faults are made."""
    draw = random.Random(options.seed)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="-", timeout=ASK_SECONDS, max_retries=0) as api:
        is_exact = options.dtype == "float32" and options.load_format != "dummy"
        right = await right_answers(api, cases(MODEL, options.tokens, options.load_format != "dummy"))
        before = await quiet(api, server, url, next(iter(right)))
        began = time.monotonic()
        until = began + options.seconds
        clients = [
            Client(api, right, random.Random(draw.random()), i % 4 == 0) for i in range(options.clients)
        ]
        faults, *_ = await asyncio.gather(
            disturb(server, draw, options.faults_every, until, options.kinds, options.victims),
            *(client.run(until) for client in clients),
        )
        seconds = time.monotonic() - began
        after = await quiet(api, server, url, next(iter(right)))
    answers = [one for client in clients for one in client.answers]
    if not is_exact:
        for answer in (*right.values(), *(answer for _, _, answer in answers)):
            answer.texts, answer.logprobs = {}, []
    name = "tpworker_restarts_total"
    return Verdict(
        seconds,
        dict(sorted(Counter(f"{fault.kind} {fault.process}" for fault in faults).items())),
        round(after.metrics[name] - before.metrics[name]),
        len(answers),
        sum(client.num_left for client in clients),
        wrong_answers(answers, right),
        leaks(before, after),
        pauses(answers, [fault for fault in faults if fault.kind != "slow"]),
        after.bytes - before.bytes,
    )


async def right_answers(api: AsyncOpenAI, asked: list[Case]) -> dict[Case, Answer]:
    """Raises RuntimeError if one differs from the other of the same request."""
    right = {case: await ask(api, case, True) for case in asked}
    for case in asked:
        again = await ask(api, case, False)
        why = right[case].error or ("" if again.ends == right[case].ends else "it ends otherwise")
        if why:
            raise RuntimeError(f"{case.name}, without a fault: {why}")
    return right


async def quiet(api: AsyncOpenAI, server: int, url: str, case: Case) -> Quiet:
    """Of a server that has answered and has nothing to do. Raises RuntimeError if it always has."""
    until = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < until:
        answer = await ask(api, case, False)
        await asyncio.sleep(1)
        now = await asyncio.to_thread(Quiet.of, server, url)
        if not answer.error and not now.metrics["tpworker_open_requests"]:
            return now
    raise RuntimeError("the server does not come to rest")


def report(verdict: Verdict, log: str) -> None:
    """Prints it."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=f"{verdict.seconds:.0f} s of faults")
    for name in ("fault", "times"):
        table.add_column(name)
    for name, count in verdict.faults.items():
        table.add_row(name, str(count))
    console.print(table)
    table = Table(title="What came of it")
    for name in ("", "value"):
        table.add_column(name)
    rows = {
        "recoveries": str(verdict.restarts),
        "answers": str(verdict.num_answers),
        "clients that hung up": str(verdict.num_left),
        "wrong, or failed": str(len(verdict.wrong)),
        "growth of the server, MiB": f"{verdict.growth / (1 << 20):.1f}",
        "leaks": "; ".join(verdict.leaks) or "none",
        "processes left": "; ".join(verdict.left_behind) or "none",
        "exit status": str(verdict.status),
    }
    if verdict.pauses:
        times = (quantile(verdict.pauses, share) for share in (0.5, 0.99, 1.0))
        rows["pause of a stream, s: p50, p99, max"] = ", ".join(f"{one:.2f}" for one in times)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    for line in verdict.wrong[:10]:
        console.print(f"wrong: {line}"[:400], markup=False)
    if not verdict.is_good:
        print("\n".join(log.splitlines()[-60:]))
    print("GOOD" if verdict.is_good else "BAD", flush=True)
