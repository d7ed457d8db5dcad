"""A runtime with fake ranks under a steady load, and what a step of it costs."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.cpu import Usage, busy_seconds
from tpworker import Runtime, SamplingParams
from tpworker.outputs import StepRecord, step_gap
from tpworker.testing.fake_process import FAKE_RANKS, fake_model

PARTS = ("scheduler", "rank 0", "other ranks", "runtime")
_MAX_MODEL_LEN = 1 << 16
_VOCAB_SIZE = 32000
_NUM_KV_BLOCKS = 1 << 16
_LONGEST_START = 60.0
_SETTLE = 0.05


@dataclass(slots=True)
class Window:
    """A while of steady decoding."""

    steps: int
    cpu: dict[str, float]
    """By part (of the other ranks: each): microseconds of CPU time a step."""
    queued: dict[str, float]
    """Microseconds a step for which it could have run and had no core."""
    sleeps: dict[str, float]
    """How often one of its threads went to sleep in a step."""
    periods: list[float]
    """Milliseconds from each step's start to the next one's."""
    gaps: list[float]
    """Microseconds before each step in which the device had nothing to do."""
    others: float
    """Cores that other programs kept busy meanwhile."""


class Driven:
    """A runtime that has started, and its processes. Make it with `start`."""

    def __init__(self, runtime: Runtime, pids: dict[str, list[int]]) -> None:
        self.runtime = runtime
        self.pids = pids
        """By part."""

    @classmethod
    @asynccontextmanager
    async def start(cls, folder: Path, step_seconds: float, **options: Any) -> AsyncIterator[Driven]:
        """Starts a runtime, with what seems to be a model in `folder`, and stops it in the end.

        Several may run at a time, but not start at a time: whose child a process is shows in the order.
        """
        fake_model(folder, step_seconds=step_seconds, max_model_len=_MAX_MODEL_LEN, vocab_size=_VOCAB_SIZE)
        before = set(psutil.Process().children(recursive=True))
        async with Runtime(folder, num_kv_blocks=_NUM_KV_BLOCKS, **FAKE_RANKS, **options) as runtime:
            pids: dict[str, list[int]] = {part: [] for part in PARTS}
            pids["runtime"].append(os.getpid())
            for child in set(psutil.Process().children(recursive=True)) - before:
                if "standby" not in child.name():
                    pids[_part(child.name())].append(child.pid)
            yield cls(runtime, pids)

    async def decode(self, batch: int, context: int, seconds: float) -> Window:
        """Lets `batch` requests with prompts of `context` tokens decode for a while."""
        draw = random.Random(batch)
        prompts = [draw.choices(range(_VOCAB_SIZE), k=context) for _ in range(batch)]
        earlier = self.runtime.stats().steps
        tasks = [asyncio.create_task(self._consume(prompt)) for prompt in prompts]
        try:
            async with asyncio.timeout(_LONGEST_START):
                while not self._all_decode(batch, earlier):
                    await asyncio.sleep(_SETTLE)
                    for task in tasks:
                        if task.done():
                            task.result()
            await asyncio.sleep(_SETTLE)
            return await self._measure(batch, seconds)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def idle(self, seconds: float) -> dict[str, float]:
        """Percent of a core that each part uses (the other ranks together)."""
        before = self._usage()
        await asyncio.sleep(seconds)
        after = self._usage()
        return {
            part: 100 * sum(after[pid].cpu - before[pid].cpu for pid in pids) / seconds
            for part, pids in self.pids.items()
        }

    async def _consume(self, prompt: list[int]) -> None:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False)
        async for _ in self.runtime.generate(prompt, sampling):
            pass

    def _all_decode(self, batch: int, earlier: int) -> bool:
        """Whether the last step was a decode of them all, and none of the `earlier` steps."""
        stats = self.runtime.stats()
        return stats.steps > earlier and stats.recent_steps[-1].num_decodes == batch

    async def _measure(self, batch: int, seconds: float) -> Window:
        first, before, busy = self.runtime.stats().steps, self._usage(), -busy_seconds()
        await asyncio.sleep(seconds)
        busy += busy_seconds()
        after, last = self._usage(), self.runtime.stats()
        steps = last.steps - first
        records = last.recent_steps[-steps:]
        if not steps or any(record.num_decodes != batch or record.num_prefill_tokens for record in records):
            raise RuntimeError(f"no steady decoding of {batch} requests; lengthen --seconds")

        def a_step(what: str, unit: float) -> dict[str, float]:
            return {
                part: sum(getattr(after[pid] - before[pid], what) for pid in pids) * unit / steps / len(pids)
                for part, pids in self.pids.items()
                if pids
            }

        return Window(
            steps,
            a_step("cpu", 1e6),
            a_step("queued", 1e6),
            a_step("sleeps", 1),
            [(step.started_ns - previous.started_ns) / 1e6 for previous, step in pairwise(records)],
            [gap / 1e3 for gap in map(_gap, records, records[1:]) if gap is not None],
            max(0.0, busy - sum(after[pid].cpu - before[pid].cpu for pid in before)) / seconds,
        )

    def _usage(self) -> dict[int, Usage]:
        return {pid: Usage.of(pid) for pids in self.pids.values() for pid in pids}


def _part(name: str) -> str:
    if "scheduler" in name:
        return "scheduler"
    return "rank 0" if name.endswith("rank0") else "other ranks"


def _gap(before: StepRecord, step: StepRecord) -> int | None:
    return step_gap(step.num_decodes, step.started_ns, before.ended_ns)
