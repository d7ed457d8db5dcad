"""How long clients wait when a process is lost: from the signal to the next token of each stream.

Requests are run three times without a fault, for caches to fill and for what is right; then once for each
victim, that is killed (or stopped, `VICTIM:stop`) when all have begun. In float32 all outputs are to be
equal; in another dtype what is computed again may be rounded otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.chaos.faults import members
from benchmarks.common.options import positive
from benchmarks.common.report import machine, quantile, save
from tpworker import Runtime, SamplingParams

NUM_FIRST = 3


@dataclass(frozen=True)
class Loss:
    """One process that was lost, and what came of it. Seconds."""

    victim: str
    noticed: float  # until the runtime knew
    recovered: float  # from there until requests had been sent again
    pause_median: float  # from the signal to the next token
    pause_longest: float
    num_equal: int | None  # outputs that are those without a fault, in float32
    num_requests: int


@dataclass
class Stream:
    """What a client got."""

    tokens: list[int]
    times: list[float]  # when; time.monotonic()

    def pause(self, lost: float, noticed: float) -> float:
        """From the loss to the next token; those that were on their way when it was noticed do not count."""
        return next((at - lost for at in self.times if at > noticed), 0.0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of this tool."""
    parser.add_argument("--model", help="a folder or a hub name (default: the default model)")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tensor-parallel-size", type=positive, default=1)
    parser.add_argument("--requests", type=positive, default=16)
    parser.add_argument("--prompt", type=positive, default=500, help="tokens (default: 500)")
    parser.add_argument("--output", type=positive, default=500, help="tokens (default: 500)")
    parser.add_argument(
        "--after", type=float, default=0.9, help="seconds until a process is lost (default: 0.9)"
    )
    parser.add_argument(
        "--victims", nargs="+", metavar="NAME", default=["rank0", "scheduler"],
        help="of processes, as `ps` shows them without 'tpworker-'; with ':stop' behind it is stopped",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Prints how long it took; 0 if every request got all of its tokens."""
    losses = asyncio.run(measure(options))
    table = Table(title=f"{options.requests} requests; seconds")
    for name in ("lost", "noticed", "recovered", "pause, median", "pause, longest", "equal outputs"):
        table.add_column(name)
    for loss in losses:
        times = (loss.noticed, loss.recovered, loss.pause_median, loss.pause_longest)
        equal = "-" if loss.num_equal is None else f"{loss.num_equal} of {loss.num_requests}"
        table.add_row(loss.victim, *(f"{one:.2f}" for one in times), equal)
    Console().print(table)
    rows = [asdict(loss) for loss in losses]
    save(options.json, {"machine": machine(), "options": vars(options), "rows": rows})
    return 0


async def measure(options: argparse.Namespace) -> list[Loss]:
    """One loss after the other. Raises RuntimeError if a request does not get all of its tokens."""
    fields: dict[str, Any] = {"load_format": options.load_format, "dtype": options.dtype}
    fields["tensor_parallel_size"] = options.tensor_parallel_size
    losses = []
    async with Runtime(options.model, max_restarts=1000, **fields) as runtime:
        for _ in range(NUM_FIRST):
            right = await ask_all(runtime, options)
        for victim in options.victims:
            name, _, is_stopped = victim.partition(":")
            asking = asyncio.create_task(ask_all(runtime, options))
            await asyncio.sleep(options.after)
            lost_at = time.monotonic()
            number = signal.SIGSTOP if is_stopped else signal.SIGKILL
            members(os.getpid())[name].send_signal(number)
            while runtime.health().state == "ready":
                await asyncio.sleep(0.001)
            noticed_at = time.monotonic()
            streams = await asking
            pauses = [stream.pause(lost_at, noticed_at) for stream in streams]
            losses.append(
                Loss(
                    victim,
                    noticed_at - lost_at,
                    runtime.stats().last_recovery_seconds or 0.0,
                    quantile(pauses, 0.5),
                    max(pauses),
                    num_equal(streams, right) if options.dtype == "float32" else None,
                    len(streams),
                )
            )
    return losses


def num_equal(streams: list[Stream], right: list[Stream]) -> int:
    """How many have the same tokens."""
    return sum(a.tokens == b.tokens for a, b in zip(streams, right, strict=True))


async def ask_all(runtime: Runtime, options: argparse.Namespace) -> list[Stream]:
    """All requests at once."""
    return await asyncio.gather(*(ask(runtime, options, i) for i in range(options.requests)))


async def ask(runtime: Runtime, options: argparse.Namespace, number: int) -> Stream:
    """Every other one greedily, the rest with a seed."""
    params = SamplingParams(
        max_tokens=options.output, temperature=0.7 * (number % 2), seed=number, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    stream = Stream([], [])
    prompt = [(31 * number + 7 * place) % runtime.vocab_size for place in range(options.prompt)]
    async for output in runtime.generate(prompt, params):
        stream.tokens += output.token_ids
        stream.times.append(time.monotonic())
    if len(stream.tokens) != options.output:
        raise RuntimeError(f"request {number} got {len(stream.tokens)} of {options.output} tokens")
    return stream
