"""Real ranks that are ended and begun again by wish: in fp32, outputs are those of a runtime that only ever
had these weights; nothing is left of what was before, neither in caches nor in the process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import eventually, is_gone
from tests.integration.conftest import VOCAB
from tpworker import ModelError, Runtime, RuntimeSleeping, SamplingParams

pytestmark = pytest.mark.usefixtures("nothing_left")

OPTIONS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "dtype": "float32",
    "num_kv_blocks": 100,
    "block_size": 8,
}
PROMPT = [number * 7 % VOCAB for number in range(40)]


def other_weights(folder: Path, other: Path) -> Path:
    """A checkpoint of the same model."""
    generator = torch.Generator().manual_seed(1)
    other.mkdir()
    for file in folder.glob("*.json"):
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    noisy = {name: w * (1 + 0.2 * torch.randn(w.shape, generator=generator)) for name, w in weights.items()}
    save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
    return other


async def tokens(runtime: Runtime, max_tokens: int = 30, seed: int | None = None) -> list[int]:
    temperature = 0.0 if seed is None else 0.9
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=seed, detokenize=False, ignore_eos=True
    )
    return [token async for output in runtime.generate(PROMPT, params) for token in output.token_ids]


async def both(runtime: Runtime) -> tuple[list[list[int]], list[float]]:
    """Greedy and seeded tokens, of a prompt that the prefix cache may know; and logprobs, which tell of all
    that is behind them."""
    params = SamplingParams(max_tokens=5, temperature=0.0, detokenize=False, ignore_eos=True, logprobs=2)
    outputs = [output async for output in runtime.generate(PROMPT, params)]
    logprobs = [logprob for output in outputs for row in output.logprobs or () for _, logprob in row.top]
    return [await tokens(runtime), await tokens(runtime, seed=3)], logprobs


def check(found: tuple[list[list[int]], list[float]], expected: tuple[list[list[int]], list[float]]) -> None:
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=1e-4)


async def running(runtime: Runtime, max_tokens: int = 80) -> asyncio.Task[list[int]]:
    """A request that has got some tokens."""
    before = runtime.stats().output_tokens
    task = asyncio.ensure_future(tokens(runtime, max_tokens))
    while runtime.stats().output_tokens < before + 5:
        await asyncio.sleep(0.001)
    return task


def children() -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it is gone, or about to be
            found[" ".join(child.cmdline()[:1])] = child
    return found


def test_outputs_are_those_of_a_runtime_that_never_had_other_weights(folder: Path, tmp_path: Path) -> None:
    other = other_weights(folder, tmp_path / "other")

    async def main() -> None:
        async with Runtime(other, **OPTIONS) as runtime:
            of_other = await both(runtime)
        kinds: list[str] = []
        async with Runtime(folder, **OPTIONS, on_event=lambda event: kinds.append(event.kind)) as runtime:
            expected, long = await both(runtime), await tokens(runtime, 80)
            assert expected != of_other

            request = await running(runtime)
            await runtime.sleep()
            assert set(children()) == {"tpworker-scheduler-standby", "tpworker-rank-standby"}
            assert (runtime.health().state, runtime.is_sleeping) == ("sleeping", True)
            with pytest.raises(RuntimeSleeping, match="wake_up"):
                await tokens(runtime)
            standby = children()["tpworker-rank-standby"]
            standby.kill()  # nobody needs it now; its successor imports torch
            eventually(lambda: is_gone(standby.pid))
            await runtime.reset_prefix_cache()
            await runtime.wake_up("weights")
            assert runtime.is_sleeping
            await runtime.wake_up("kv_cache")
            assert await request == long
            check(await both(runtime), expected)
            assert kinds == ["sleeping", "woken"]

            request = await running(runtime)
            assert await runtime.update_weights(other) == runtime.weights_number > 0
            assert len(await request) == 80, "it goes on, with the new weights"
            check(await both(runtime), of_other)
            assert kinds[2:] == ["updating", "updated"]
            assert runtime.stats().restarts == runtime.stats().resumed_requests == 0

            save_file({"x": torch.zeros(1)}, other / "model.safetensors")
            with pytest.raises(ModelError, match=r"lacks the tensors lm_head.weight"):
                await runtime.update_weights(other)
            with pytest.raises(ModelError, match=r"no tensor model.embed_tokens.weight"):
                await runtime.update_weights([("x", torch.zeros(1))])
            check(await both(runtime), of_other)

            weights = load_file(folder / "model.safetensors")
            request = await running(runtime, 60)
            await runtime.update_weights((item for item in weights.items()), abort=True)
            assert 5 <= len(await request) < 60
            check(await both(runtime), expected)
            children()["tpworker-rank1"].send_signal(signal.SIGSEGV)  # which forfeits what is kept
            while runtime.stats().restarts != 1:
                await asyncio.sleep(0.01)
            check(await both(runtime), expected)

    asyncio.run(asyncio.wait_for(main(), 200))


def test_ten_times_sleep_and_other_weights_leave_nothing(folder: Path, tmp_path: Path) -> None:
    other = other_weights(folder, tmp_path / "other")
    weights = load_file(folder / "model.safetensors")

    async def main() -> None:
        async with Runtime(folder, **OPTIONS) as runtime:
            expected = await tokens(runtime)
            held = set(os.listdir("/proc/self/fd"))
            for number in range(10):
                await runtime.sleep(2 if number % 3 == 2 else 1)  # not of tensors, which would be gone
                waking = asyncio.ensure_future(runtime.wake_up())
                if number in (3, 6):  # it is lost in its start, or at once
                    while "tpworker-rank1" not in (found := children()):
                        await asyncio.sleep(0.002)
                    found["tpworker-rank1"].kill()
                await waking
                updating = asyncio.ensure_future(runtime.update_weights(other if number % 3 else weights))
                if number == 5:
                    children()["tpworker-scheduler"].kill()
                await updating
            assert number % 3 == 0
            assert await tokens(runtime) == expected
            assert len(os.listdir("/proc/self/fd")) <= len(held) + 1, "and one for the tensors"
            assert runtime.stats().restarts >= 2
            assert runtime.health().state == "ready"

    asyncio.run(asyncio.wait_for(main(), 200))
