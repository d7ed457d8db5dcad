"""Kills, stops and slows a server's processes while clients ask, and judges what they get and what is left.

The right answers are asked for before anything happens, each twice. In float32 outputs are exact. In another
dtype an answer may be another from where the model finds two tokens about as likely: it is counted as near.
Status 0: nobody lost anything, nothing is left, and no process was replaced without a reason.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
from openai import AsyncOpenAI, BadRequestError
from rich.console import Console
from rich.table import Table

from benchmarks.chaos.faults import KINDS, Fault, disturb, members
from benchmarks.chaos.judge import NEAR, Verdict, difference, pauses, quantiles, wrong_answers
from benchmarks.chaos.load import Answer, Case, Client, ask, cases
from benchmarks.chaos.log import recoveries, without_reason
from benchmarks.chaos.quiet import Quiet, leaks
from benchmarks.chaos.served import MODEL, served, still_there
from benchmarks.common.options import new_file, positive
from benchmarks.common.report import machine, save

ASK_SECONDS = 600.0  # of a client's patience
QUIET_SECONDS = 60.0
SCRAPE_SECONDS = 2.0  # between two looks at /metrics


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
    parser.add_argument("--log", metavar="FILE", type=new_file, help="write what the server logs to FILE")
    parser.add_argument("--server-option", action="append", default=[], help="one more for `tpworker serve`")


def run(options: argparse.Namespace) -> int:
    """Prints what happened; 0 if nobody lost anything."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        try:
            with served(options, Path(folder), log) as (server, url):
                verdict, faults, num_told = asyncio.run(soak(options, server.pid, url))
                there = members(server.pid)
                server.send_signal(signal.SIGTERM)
                verdict.status = server.wait(60)
            verdict.left_behind = still_there(there)
        except BaseException:
            sys.stderr.write(_end_of(Path(folder) / "log"))
            raise
        text = (Path(folder) / "log").read_text()
    if options.log:
        Path(options.log).write_text(text)
    told = recoveries(text)
    verdict.recoveries = [recovery.seconds for recovery in told]
    verdict.odd += without_reason(told, faults)
    if num_told != len(told):
        verdict.odd.append(f"/metrics has {num_told:g} recoveries, the log {len(told)}")
    report(verdict)
    if not verdict.is_good:
        print("\n".join(text.splitlines()[-60:]))
    print("GOOD" if verdict.is_good else "BAD", flush=True)
    made = [
        {"kind": fault.kind, "process": fault.process, "at": time.time() - time.monotonic() + fault.time}
        for fault in faults
    ]
    found = {"verdict": verdict.as_json(), "faults": made}
    save(options.json, {"machine": machine(), "options": vars(options), **found})
    return 0 if verdict.is_good else 1


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-60:]) + "\n"


async def soak(options: argparse.Namespace, server: int, url: str) -> tuple[Verdict, list[Fault], float]:
    """Asks for the right answers, then for some time while faults are made. Returns the faults too, and how
    many recoveries /metrics has."""
    draw, is_text = random.Random(options.seed), options.load_format != "dummy"
    is_exact = options.dtype == "float32"
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="-", timeout=ASK_SECONDS, max_retries=0) as api:
        is_chat = is_text and await takes_conversations(api)
        asked = cases(MODEL, options.tokens, is_text, is_chat, not is_exact)
        right = await right_answers(api, asked, is_exact)
        before = await quiet(api, server, url, asked[0])
        began = time.monotonic()
        until = began + options.seconds
        clients = [
            Client(api, asked, random.Random(draw.random()), i % 4 == 0) for i in range(options.clients)
        ]
        scraping = asyncio.create_task(scrape(url))
        faults, *_ = await asyncio.gather(
            disturb(server, draw, options.faults_every, until, options.kinds, options.victims),
            *(client.run(until) for client in clients),
        )
        seconds = time.monotonic() - began
        scraping.cancel()
        await asyncio.wait([scraping])
        after = await quiet(api, server, url, asked[0])
    answers = [one for client in clients for one in client.answers]
    wrong, num_near = wrong_answers(answers, right, is_exact)
    verdict = Verdict(
        seconds,
        dict(sorted(Counter(f"{fault.kind} {fault.process}" for fault in faults).items())),
        round(after.metrics["tpworker_restarts_total"] - before.metrics["tpworker_restarts_total"]),
        len(answers),
        sum(client.num_left for client in clients),
        wrong,
        num_near,
        leaks(before, after),
        {kind: pauses(answers, [one for one in faults if one.kind == kind]) for kind in options.kinds},
        after.bytes - before.bytes,
    )
    if not scraping.cancelled():
        verdict.odd.append(f"/metrics did not answer: {scraping.exception()!r}")
    return verdict, faults, after.metrics["tpworker_recovery_seconds_count"]


async def takes_conversations(api: AsyncOpenAI) -> bool:
    """Whether the model has a chat template."""
    try:
        messages = [{"role": "user", "content": "Hello"}]
        await api.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)  # type: ignore[arg-type]
    except BadRequestError:
        return False
    return True


async def scrape(url: str) -> None:
    """Looks at /metrics now and then, as Prometheus does, until it is cancelled. Raises if that fails."""
    async with httpx.AsyncClient(timeout=60) as client:
        while True:
            (await client.get(f"{url}/metrics")).raise_for_status()
            await asyncio.sleep(SCRAPE_SECONDS)


async def right_answers(api: AsyncOpenAI, asked: Sequence[Case], is_exact: bool) -> dict[Case, Answer]:
    """Raises RuntimeError if one differs from the other of the same request."""
    first = await asyncio.gather(*(ask(api, case, True) for case in asked))
    again = await asyncio.gather(*(ask(api, case, False) for case in asked))
    for case, one, other in zip(asked, first, again, strict=True):
        why = one.error or difference(case, other, one, is_exact)
        if why not in ("", NEAR):
            raise RuntimeError(f"{case.name}, without a fault: {why}")
    return dict(zip(asked, first, strict=True))


async def quiet(api: AsyncOpenAI, server: int, url: str, case: Case) -> Quiet:
    """Of a server that has answered and has nothing to do. Raises RuntimeError if it always has."""
    until = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < until:
        answer = await ask(api, case, False)
        await asyncio.sleep(1)
        with contextlib.suppress(httpx.TimeoutException):
            now = await asyncio.to_thread(Quiet.of, server, url)
            if not answer.error and not now.metrics["tpworker_open_requests"]:
                return now
    raise RuntimeError("the server does not come to rest")


def report(verdict: Verdict) -> None:
    """Prints it."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table("fault", "times", title=f"{verdict.seconds:.0f} s of faults")
    for name, count in verdict.faults.items():
        table.add_row(name, str(count))
    console.print(table)
    table = Table("", "value", title="What came of it")
    rows = {
        "recoveries; processes started anew": f"{len(verdict.recoveries)}; {verdict.restarts} times",
        "recovered in, s (the server's own)": _times(verdict.recoveries),
        **{f"pause of a stream, s: {kind}": _times(times) for kind, times in verdict.pauses.items()},
        "answers": str(verdict.num_answers),
        "clients that hung up": str(verdict.num_left),
        "wrong, or failed": str(len(verdict.wrong)),
        "near": str(verdict.num_near),
        "odd": "; ".join(verdict.odd) or "nothing",
        "growth of the server, MiB": f"{verdict.growth / (1 << 20):.1f}",
        "leaks": "; ".join(verdict.leaks) or "none",
        "processes left": "; ".join(verdict.left_behind) or "none",
        "exit status": str(verdict.status),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    for line in verdict.wrong[:10]:
        console.print(f"wrong: {line}"[:400], markup=False)


def _times(times: Sequence[float]) -> str:
    found = quantiles(times)
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())
