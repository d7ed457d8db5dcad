"""The fake ranks of the benchmarks: real processes, real messages, tokens that tell of their steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgpack
import psutil
import pytest
import zmq

from tpworker import Runtime, RuntimeStopped, SamplingParams
from tpworker.ipc.channels import new_socket
from tpworker.ipc.kv_events import END_OF_REPLAY
from tpworker.testing.fake_process import FAKE_RANKS, fake_model


@pytest.mark.parametrize("lookahead", [0, 2])
def test_every_token_is_the_number_of_its_step(tmp_path: Path, lookahead: int) -> None:
    async def tokens(runtime: Runtime, prompt: list[int], number: int) -> list[int]:
        sampling = SamplingParams(max_tokens=number, detokenize=False)
        outputs = [output async for output in runtime.generate(prompt, sampling)]
        return [token for output in outputs for token in output.token_ids]

    async def main() -> None:
        model = fake_model(tmp_path / "model", step_seconds=0.002, vocab_size=50)
        async with Runtime(model, tensor_parallel_size=2, lookahead=lookahead, **FAKE_RANKS) as runtime:
            first = await tokens(runtime, [1, 2, 3], 100)
            assert first == [step % 50 for step in range(100)]
            both = await asyncio.gather(*(tokens(runtime, [7] * 20 + [i], 30 + i) for i in range(2)))
            assert [len(each) for each in both] == [30, 31]
            for each in both:
                assert each == [(each[0] + i) % 50 for i in range(len(each))]
            records = runtime.stats().recent_steps
            assert all(record.ended_ns - record.started_ns >= 2_000_000 for record in records)
            assert all(after.started_ns >= before.ended_ns for before, after in pairwise(records))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_after_a_reset_nothing_is_found_though_the_scheduler_is_lost_meanwhile(tmp_path: Path) -> None:
    """And subscribers to the cache's events hear of all of it."""
    heard = new_socket(zmq.SUB)
    heard.set(zmq.SUBSCRIBE, b"")
    heard.set(zmq.RCVTIMEO, 20_000)
    heard.connect(f"ipc://{tmp_path}/kv")

    def events(until: Callable[[list[str]], bool]) -> list[str]:
        """The kinds of events, and how many blocks they are about, until they are as wanted."""
        kinds: list[str] = []
        while not until(kinds):
            _, number, batch = heard.recv_multipart()
            assert int.from_bytes(number, "big") >> 40 == 0
            kinds += [f"{kind} {len(told[0])}" if told else kind for kind, *told in msgpack.unpackb(batch)[1]]
        return kinds

    replay = new_socket(zmq.DEALER)
    replay.set(zmq.RCVTIMEO, 20_000)
    replay.connect(f"ipc://{tmp_path}/replay")
    kv_events = {
        "enable_kv_cache_events": True,
        "endpoint": f"ipc://{tmp_path}/kv",
        "replay_endpoint": f"ipc://{tmp_path}/replay",
    }

    async def cached(runtime: Runtime) -> int:
        sampling = SamplingParams(max_tokens=2, detokenize=False)
        return [output async for output in runtime.generate(range(100), sampling)][-1].num_cached_tokens

    async def main() -> None:
        model = fake_model(tmp_path / "model")
        async with Runtime(model, kv_events_config=kv_events, **FAKE_RANKS) as runtime:
            while not heard.poll(50):  # it may not be connected yet
                await runtime.reset_prefix_cache()
            assert [await cached(runtime) for _ in range(2)] == [0, 96]
            await runtime.reset_prefix_cache()
            assert [await cached(runtime) for _ in range(2)] == [0, 96]
            told = events(lambda kinds: kinds.count("BlockStored 6") == 2)
            assert told[-3:] == ["BlockStored 6", "AllBlocksCleared", "BlockStored 6"]
            (scheduler,) = (c for c in psutil.Process().children(True) if c.name() == "tpworker-scheduler")
            scheduler.suspend()  # it hears of nothing any more
            reset = asyncio.ensure_future(runtime.reset_prefix_cache())
            await asyncio.sleep(0.1)
            assert not reset.done()
            scheduler.kill()
            await reset
            assert runtime.stats().restarts == 1
            assert [await cached(runtime) for _ in range(2)] == [0, 96]
            # What a subscriber misses before it is connected again, it asks for.
            replay.send_multipart([b"", (1 << 40).to_bytes(8, "big")])
            told = []
            while (frames := replay.recv_multipart())[1] != END_OF_REPLAY:
                assert int.from_bytes(frames[1], "big") >> 40 == 1
                told += [kind for kind, *_ in msgpack.unpackb(frames[2])[1]]
            assert told[0] == "AllBlocksCleared"
            assert told[-2:] == ["AllBlocksCleared", "BlockStored"]
        for socket in (heard, replay):
            socket.close(linger=0)
        with pytest.raises(RuntimeStopped, match="the runtime is stopped"):
            await runtime.reset_prefix_cache()

    asyncio.run(asyncio.wait_for(main(), 60))
