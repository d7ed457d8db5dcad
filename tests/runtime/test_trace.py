"""A trace, with real processes whose device alone is a fake: on and off, and through a lost rank."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.observe.traces import Trace
from tests.runtime.test_recovery import until
from tests.runtime.test_runtime import children, collect, ids_only, run
from tpworker import ConfigError, Runtime, RuntimeStopped
from tpworker.testing.fake_process import FAKE_RANKS, fake_model

IN_FLIGHT = 4

pytestmark = pytest.mark.usefixtures("nothing_left")


def check_steps(trace: Trace, num_ranks: int) -> None:
    """Every step is there once in each lane, and an arrow leads through it; but for those that were in flight
    when a generation ended."""
    committed = trace.named("scheduler: plans", "commit")
    last = dict(committed)
    steps = [(generation, step) for generation, step in committed if step <= last[generation] - IN_FLIGHT]
    assert len(steps) > 20
    assert set(steps) <= set(trace.named("scheduler: plans", "compose"))
    lanes = {"scheduler: plans": ("compose", "stream", "commit"), "runtime: event loop": ("deliver",)}
    for rank in range(num_ranks):
        lanes |= {
            f"rank {rank}: launch thread": ("barrier", "launch"),
            f"rank {rank}: device": (),
            f"rank {rank}: publisher": (),
        }
    for lane, names in lanes.items():
        for name in names or (None,):
            found = Counter(trace.named(lane, *([name] if name else [])))
            assert set(found.values()) == {1}, f"{lane}: {name}"
            assert set(steps) <= set(found), f"{lane}: {name}"
    whole = [parts for parts in trace.arrows().values() if {"s", "f"} <= {part["ph"] for part in parts}]
    assert len(whole) >= len(steps) * num_ranks
    ways = Counter(tuple(part["span"]["name"].split()[0] for part in parts) for parts in whole)
    firsts, others = ["stream", "launch"], ("decode", "prefill")
    for way in ways:
        assert list(way[:2]) == firsts
        assert way[2] in others
        assert way[3:] in ((), ("publish", "commit", "deliver"))
    for parts in whole:
        assert len({part["span"]["args"]["step"] for part in parts}) == 1


def test_a_trace_goes_on_through_a_lost_rank_and_is_whole_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"

    async def main() -> None:
        runtime = Runtime(fake_model(tmp_path / "model"), tensor_parallel_size=2, **FAKE_RANKS)
        runtime.start_trace(first)
        async with runtime:
            await asyncio.gather(*(collect(runtime, [i], ids_only(40), request_id=f"r{i}") for i in range(4)))
            summary = await runtime.stop_trace()
            assert summary is not None
            assert (summary.path, summary.num_dropped, summary.is_full) == (str(first), 0, False)
            assert summary.num_bytes == first.stat().st_size
            assert summary.num_events == len(Trace.of(first).events)
            await collect(runtime, [7], ids_only(10), request_id="between")
            runtime.start_trace(second)
            task = asyncio.ensure_future(collect(runtime, [5], ids_only(600), request_id="survivor"))
            await until(lambda: runtime.stats().output_tokens > 200)
            os.kill(children("tpworker-rank1")[0].pid, signal.SIGKILL)
            await task
            cut = asyncio.ensure_future(collect(runtime, [6], ids_only(16000), request_id="cut"))
            await until(lambda: runtime.stats().running == 1)
        with pytest.raises(RuntimeStopped):
            await cut
        with pytest.raises(RuntimeStopped):
            runtime.start_trace(first)

    with caplog.at_level(logging.CRITICAL, "tpworker"):  # the loss is no news
        run(main)
    trace = Trace.of(first)
    check_steps(trace, 2)
    assert {e["args"]["request"] for e in trace.requests} == {"r0", "r1", "r2", "r3"}
    for request in trace.requests:
        assert request["phases"] == ["prepare", "queue", "prefill", "decode"]
        assert request["args"]["output tokens"] == 40
    assert trace.instants() == ["trace begins", "trace ends"]
    trace = Trace.of(second)
    check_steps(trace, 2)
    assert {generation for generation, _ in trace.named("rank 1: device")} == {0, 1}
    ended = {e["args"]["request"]: e["args"]["finish reason"] for e in trace.requests}
    assert ended == {"survivor": "length", "cut": "failed"}
    assert [name.split()[0] for name in trace.instants()] == [
        "trace", "lost", "recovering", "recovered", "trace",
    ]  # fmt: skip


def test_a_trace_that_cannot_be_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        runtime = Runtime(tmp_path, **FAKE_RANKS)
        with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
            runtime.start_trace(tmp_path)
        with pytest.raises(ConfigError, match="1048576 bytes at least"):
            runtime.start_trace(tmp_path / "trace", max_bytes=0)
        assert await runtime.stop_trace() is None
        runtime.start_trace(tmp_path / "trace")
        with pytest.raises(ConfigError, match="stop it first"):
            runtime.start_trace(tmp_path / "other")
        assert runtime.is_tracing
        await runtime.stop()
        assert not runtime.is_tracing

    run(main)
    assert Trace.of(tmp_path / "trace").instants() == ["trace begins", "trace ends"]
