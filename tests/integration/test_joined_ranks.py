"""Real ranks that torchrun has started: outputs are those of ranks of our own, and a lost one comes back."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runtime.test_joining import new_name
from tpworker import Runtime, RuntimeEvent, SamplingParams

pytestmark = pytest.mark.usefixtures("nothing_left")

PROMPTS = [[7, 5, 3, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9] * 4]


async def ask(runtime: Runtime, prompt: list[int]) -> list[int]:
    params = SamplingParams(max_tokens=60, temperature=0.8, seed=3, ignore_eos=True, detokenize=False)
    return [token async for output in runtime.generate(prompt, params) for token in output.token_ids]


def outputs(folder: Path, victim: str = "", **options: Any) -> tuple[list[list[int]], list[str]]:
    """Of all prompts, and what happened. Where there is to be a victim, it is killed at the first token."""
    events: list[RuntimeEvent] = []

    async def live() -> list[list[int]]:
        async with Runtime(
            folder, device="cpu", tensor_parallel_size=2, dtype="float32", on_event=events.append, **options
        ) as runtime:
            asked = [asyncio.create_task(ask(runtime, prompt)) for prompt in PROMPTS]
            while victim and not runtime.stats().output_tokens:
                await asyncio.sleep(0.002)
            for process in psutil.Process().children(recursive=True):
                if process.name() == victim:
                    process.kill()
            return await asyncio.gather(*asked)

    return asyncio.run(live()), [event.kind for event in events]


def test_torchrun_starts_the_ranks(folder: Path) -> None:
    name = new_name()
    command = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tpworker"),
        *("rank", "--join", name),
    ]
    launched = subprocess.Popen([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        expected, _ = outputs(folder)
        found, events = outputs(folder, victim="tpworker-rank1", join_address=name)
        assert launched.wait(30) == 0
    finally:
        launched.terminate()
        launched.wait(30)
    assert found == expected
    assert events == ["lost", "recovering", "recovered"]
