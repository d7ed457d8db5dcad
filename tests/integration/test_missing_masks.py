"""Masks that never come are a fault of the scheduler's, named in a step's time; nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.guided import EOS, RECORD, TOKENIZER
from tpworker import Runtime, RuntimeFailed, SamplingParams, StructuredOutputs

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(180)]

HELD = SamplingParams(seed=3, max_tokens=60, structured_outputs=StructuredOutputs(json=RECORD))
FREE = SamplingParams(seed=3, max_tokens=60, ignore_eos=True)
NO_MASKS = "Masks(Missing|Unwritten): step 5"
"""Of a rank, or of the scheduler, which waits a little longer."""


@pytest.fixture(scope="module")
def spelling(folder: Path) -> Path:
    """The tiny model, with a tokenizer of characters."""
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return folder


def start(folder: Path, num_ranks: int, step_timeout: float = 1.5, **options: Any) -> Runtime:
    return Runtime(
        folder, device="cpu", dtype="float32", num_kv_blocks=64, tensor_parallel_size=num_ranks,
        step_timeout=step_timeout, max_restarts=0, **options,
    )  # fmt: skip


async def length(runtime: Runtime, sampling: SamplingParams) -> int:
    return sum([len(output.token_ids) async for output in runtime.generate("abc", sampling)])


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("not told", NO_MASKS),
        ("not written", NO_MASKS),
        ("never due", NO_MASKS),
        ("raises", "raised ValueError: a mask is at a loss"),
    ],
)
def test_a_scheduler_that_writes_no_masks_is_named(
    spelling: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int, fault: str, says: str
) -> None:
    monkeypatch.setenv("FAULT", fault)

    async def main() -> None:
        async with start(
            spelling, num_ranks, scheduler_module="tests.children.maskless_scheduler"
        ) as runtime:
            for sampling in (HELD, FREE):
                with pytest.raises(RuntimeFailed) as caught:
                    await length(runtime, sampling)
                assert caught.value.process == "tpworker-scheduler", caught.value
                assert re.search(says, caught.value.summary)
            assert runtime.health().state == "failed"

    asyncio.run(asyncio.wait_for(main(), 60))


def test_who_needs_no_masks_does_not_miss_them(spelling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "not told")

    async def main() -> None:
        module = "tests.children.maskless_scheduler"
        async with start(spelling, 2, step_timeout=60.0, scheduler_module=module) as runtime:
            assert await length(runtime, FREE) == 60

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("victim", ["tpworker-scheduler", "tpworker-rank0", "tpworker-rank1"])
def test_a_process_that_is_stopped_meanwhile_is_named(spelling: Path, victim: str) -> None:
    """Masks are late then too, or seem to be."""

    async def main() -> None:
        async with start(spelling, 2) as runtime:
            endless = SamplingParams(
                seed=3,
                structured_outputs=StructuredOutputs(regex="[a-z]*"),
                stop_token_ids=(),
                min_tokens=100,
            )
            outputs = runtime.generate("abc", endless)
            await anext(outputs)
            (process,) = (
                child
                for child in psutil.Process(os.getpid()).children(recursive=True)
                if child.cmdline()[0] == victim
            )
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(RuntimeFailed) as caught:
                async for _ in outputs:
                    pass
            assert caught.value.process == victim, caught.value

    asyncio.run(asyncio.wait_for(main(), 60))
