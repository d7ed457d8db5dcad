"""How steps are filled, without a GPU: the real composer, simulated step times, simulated clients.

A step's time is a formula whose constants were read off Qwen3-8B in bfloat16 on one H200
(docs/benchmarks.md);
`tests/scheduler/test_filling.py` has it simulate too. What it is good for is the order of policies and the
shape of distributions, not the last digits: whatever it suggests is measured afterwards.

  fixed N    every step takes as much of N tokens as there is
  chosen     steps are filled by what decodes, what waits, and what steps take (scheduler/filling.py)
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.options import positive
from benchmarks.common.report import machine, quantile, save
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Sampling, StepResult, StepTiming, Submit
from tpworker.ipc.step_sizes import step_ladder
from tpworker.runtime.settings import TARGET_ITL, TARGET_TTFT
from tpworker.scheduler.composer import Composer
from tpworker.scheduler.deadlines import Deadlines
from tpworker.scheduler.drafting import Drafting
from tpworker.scheduler.filling import Filling
from tpworker.scheduler.inflight import InFlight, InFlightPlans
from tpworker.scheduler.kv_blocks import BlockPool
from tpworker.scheduler.requests import Request, State

MOST, SLOTS, LOOKAHEAD, BLOCK_SIZE = 8192, 256, 2, 16
RETURN_SECONDS = 0.001
"""From the end of a request to the next one of the same client."""


@dataclass(frozen=True, slots=True)
class Load:
    """Clients that ask again as soon as they are answered, or requests that come by chance."""

    prompt: int
    output: int
    clients: int
    rate: float = 0.0
    rounds: int = 3
    shared: int = 0
    """Tokens at the beginning of all prompts, which the prefix cache has."""

    def __str__(self) -> str:
        how = f"{self.rate:g}/s" if self.rate else f"{self.clients} clients"
        prompt = f"{self.shared} + {self.prompt - self.shared}" if self.shared else f"{self.prompt}"
        return f"{prompt} / {self.output}, {how}"


LOADS = (
    Load(1024, 256, 1),
    Load(1024, 256, 16),
    Load(1024, 256, 64),
    Load(1024, 256, 256, rounds=2),
    Load(8000, 16, 8, rounds=6),
    Load(16000, 200, 8),
    Load(2100, 128, 32, shared=2000),
    Load(8192, 1024, 8),
    Load(8192, 1024, 32, rounds=2),
    Load(8192, 1024, 64, rounds=2),
    Load(1024, 256, 300, rate=16.9, rounds=1),
)


@dataclass(slots=True)
class Seen:
    """What the clients saw, in seconds."""

    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    num_tokens: int = 0
    seconds: float = 0.0
    steps: list[int] = field(default_factory=list)
    """Tokens of prompts in each."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def step_seconds(plan: InFlight, contexts: int, ladder: list[int]) -> float:
    """What one H200 takes for a step of Qwen3-8B.

    Args:
        contexts: tokens in the cache of all that decode in it.
    """
    if not plan.num_prefill_tokens:
        return 1e-3 * (3.7 + 0.008 * plan.num_decodes + 3.43e-5 * contexts)
    tokens = plan.num_prefill_tokens + plan.num_decodes
    padded = next((size for size in ladder if size >= tokens), tokens)
    return 1e-3 * (1.5 + 0.0222 * padded + 5e-5 * contexts)


class World:
    """Runs one load.

    Args:
        most: tokens of a step.
        filling: None: every step takes as much as there is.
    """

    def __init__(self, load: Load, most: int, filling: Filling | None, seed: int = 0) -> None:
        self._load, self._filling, self._random = load, filling, random.Random(seed)
        blocks = SLOTS * -(-(load.prompt + load.output + 1) // BLOCK_SIZE) + 64
        pool = BlockPool(blocks, BLOCK_SIZE, load.shared > 0, None, None)
        self.composer = Composer(SLOTS, most, pool, Drafting((0,)), filling)
        self._ladder = step_ladder(MOST)
        self._arrivals: list[tuple[float, int]] = []  # when, and how many more of this client
        self._running: dict[int, tuple[float, float, int]] = {}  # by id: came, last token, how many more
        self._num_came = 0
        self.seen = Seen()

    def run(self) -> Seen:
        """Until everything has been answered."""
        load, now, free, step = self._load, 0.0, 0.0, 0
        when = 0.0
        for _ in range(load.clients):
            when += self._random.expovariate(load.rate) if load.rate else 1e-5
            heapq.heappush(self._arrivals, (when, load.rounds - 1))
        flying: deque[tuple[InFlight, float, float]] = deque()  # with its time, and when it ends
        in_flight = InFlightPlans(LOOKAHEAD, Deadlines(1e6, 1.0), self._filling)
        while self._arrivals or not self.composer.is_idle():
            while in_flight.has_room() and (composed := self.composer.compose(0, step)) is not None:
                plan = composed[1]
                contexts = sum(len(request.tokens) for request in plan.sampled[: plan.num_decodes])
                seconds = step_seconds(plan, contexts, self._ladder)
                free = max(now, free) + seconds
                flying.append((plan, seconds, free))
                in_flight.add(plan)
                self.seen.steps.append(plan.num_prefill_tokens)
                step += 1
            comes = self._arrivals[0][0] if self._arrivals else float("inf")
            ends = flying[0][2] if flying else float("inf")
            now = min(comes, ends)
            if comes <= ends:
                self._admit(now)
            else:
                plan = flying[0][0]
                tokens = pack_int32([1] * len(plan.sampled))
                in_flight.answered(StepResult(0, plan.step, tokens, StepTiming(0, 0, 0)))
                self._commit(*flying.popleft())
        self.seen.seconds = now
        return self.seen

    def _admit(self, now: float) -> None:
        _, more = heapq.heappop(self._arrivals)
        self._num_came += 1
        shared = self._load.shared
        own = [self._random.randrange(1000) for _ in range(self._load.prompt - shared)]
        prompt = pack_int32([1] * shared + own)
        sampling = Sampling(0.0, 1.0, 0, 0, self._load.output, 0, b"")
        request = Request(Submit(0, self._num_came, prompt, 0, sampling), 1 << 20, self._num_came)
        self._running[request.id] = (now, -1.0, more)
        self.composer.add(request)

    def _commit(self, plan: InFlight, seconds: float, now: float) -> None:
        if self._filling is not None:
            self._filling.answered(plan.num_decodes, plan.num_prefill_tokens, seconds)
        for request in plan.sampled:
            request.in_flight -= 1
            if request.state is State.FINISHED:
                continue
            request.tokens.append(1)
            came, last, more = self._running[request.id]
            if last < 0:
                self.seen.ttft.append(now - came)
            else:
                self.seen.itl.append(now - last)
            self.seen.num_tokens += 1
            self._running[request.id] = (came, now, more)
            if len(request.tokens) >= request.max_length:
                self.composer.finish(request)
                del self._running[request.id]
                if more:
                    heapq.heappush(self._arrivals, (now + RETURN_SECONDS, more - 1))


def simulate(load: Load, policy: str, targets: tuple[float, float] = (TARGET_ITL, TARGET_TTFT)) -> Seen:
    """One load under `chosen`, or a fixed number of tokens."""
    if policy == "chosen":
        return World(load, MOST, Filling(MOST, *targets, step_ladder(MOST))).run()
    return World(load, max(SLOTS, int(policy)), None).run()


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    parser.add_argument("--fixed", type=positive, nargs="*", default=[512, 2048, 8192], metavar="N")
    parser.add_argument("--target-itl", type=float, default=TARGET_ITL, help="seconds")
    parser.add_argument("--target-ttft", type=float, default=TARGET_TTFT, help="seconds")


def run(options: argparse.Namespace) -> int:
    """Simulates, and prints a table."""
    table = Table(title="simulated: one H200, Qwen3-8B; ms")
    columns = (
        "load",
        "policy",
        "tokens/s",
        "TTFT p50",
        "TTFT p99",
        "ITL p50",
        "ITL p99",
        "steps",
        "prompts in a step",
    )
    rows: list[dict[str, Any]] = []
    for column in columns:
        table.add_column(column, justify="right")
    for load in LOADS:
        for policy in [*map(str, options.fixed), "chosen"]:
            seen = simulate(load, policy, (options.target_itl, options.target_ttft))
            told = [1000 * quantile(x, q) for x in (seen.ttft, seen.itl) for q in (0.5, 0.99)]
            filled = [count for count in seen.steps if count]
            rows.append({"load": str(load), "policy": policy, "tokens/s": seen.tokens_per_second, "ms": told})
            table.add_row(
                str(load),
                policy,
                f"{seen.tokens_per_second:.0f}",
                *(f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" for ms in told),
                str(len(seen.steps)),
                f"{quantile(filled, 0.5)} … {max(filled)}",
            )
        table.add_section()
    Console(width=140).print(table)
    save(options.json, {"machine": machine(), "rows": rows})
    return 0
