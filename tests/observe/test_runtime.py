"""A runtime on GPUs, as far as that goes without any: the ranks do nothing, and the driver is a fake."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable

import psutil
import pytest

from tests.observe.fake_nvml import FakeGpu, FakeNvml
from tpworker import Runtime, RuntimeFailed, RuntimeStopped

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    first = min(os.sched_getaffinity(0))
    library = FakeNvml([FakeGpu("GPU-1", cpus=(1 << first,)), FakeGpu("GPU-2", cpus=(1 << first,))])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr("tpworker.observe.gpus.torch_cuda", lambda: (13, 0))
    monkeypatch.setattr("tpworker.observe.affinity.CPUS_PER_RANK", 0.5)
    return library


async def _run(runtime: Runtime) -> list[set[int]]:
    async with runtime:
        assert [(state.rank, state.gpu.uuid) for state in runtime.gpus()] == [(0, "GPU-1"), (1, "GPU-2")]
        assert runtime._processes is not None
        children = runtime._processes.generation._supervisor._children
        return [set(os.sched_getaffinity(child.pid or 0)) for child in children if "rank" in child.name]


def test_it_watches_its_gpus_and_keeps_ranks_near_them(
    driver: FakeNvml, fake_runtime: Callable[..., Runtime]
) -> None:
    runtime = fake_runtime(tensor_parallel_size=2, device="cuda")
    assert runtime.gpus() == ()
    kept = asyncio.run(_run(runtime))
    assert kept == [{min(os.sched_getaffinity(0))}] * 2
    assert runtime.gpus() == ()


def test_on_the_cpu_no_gpu_is_watched(driver: FakeNvml, fake_runtime: Callable[..., Runtime]) -> None:
    async def run() -> None:
        async with fake_runtime(device="cpu") as runtime:
            assert runtime.gpus() == ()

    asyncio.run(run())
    assert not driver.calls


def test_what_the_start_took_is_told(fake_runtime: Callable[..., Runtime]) -> None:
    async def run() -> float:
        async with fake_runtime(device="cpu") as runtime:
            assert runtime.start_times is not None
            return runtime.start_times.total

    assert asyncio.run(run()) > 0


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, the tokenizer is being loaded."""
    loading = threading.Event()
    monkeypatch.setattr("tpworker.runtime.start.load_tokenizer_of", lambda model: loading.wait(20) and None)
    return loading


async def all_but_the_tokenizer(runtime: Runtime) -> asyncio.Task[None]:
    """A start whose processes are ready."""
    starting = asyncio.create_task(runtime.start())
    while runtime._processes is None or not runtime._processes.generation._ready.done():
        await asyncio.sleep(0.01)
    return starting


def test_stopped_while_it_waits_for_its_tokenizer_alone(
    fake_runtime: Callable[..., Runtime], loading: threading.Event
) -> None:
    async def run() -> None:
        runtime = fake_runtime(device="cpu")
        starting = await all_but_the_tokenizer(runtime)
        await runtime.stop()
        loading.set()
        with pytest.raises(RuntimeStopped, match="stopped while it started"):
            await starting

    asyncio.run(run())


def test_a_process_that_dies_while_the_tokenizer_is_loaded_is_named(
    fake_runtime: Callable[..., Runtime], loading: threading.Event
) -> None:
    async def run() -> None:
        runtime = fake_runtime(device="cpu", max_restarts=0)
        starting = await all_but_the_tokenizer(runtime)
        children = psutil.Process().children(recursive=True)
        (rank,) = [child for child in children if child.name() == "tpworker-rank0"]
        rank.kill()
        while runtime.health().state != "failed":
            await asyncio.sleep(0.01)
        loading.set()
        with pytest.raises(RuntimeFailed, match="tpworker-rank0"):
            await starting

    asyncio.run(run())
