from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from tests.runtime.test_recovery import until
from tests.runtime.test_requests import step
from tests.runtime.test_runtime import MakeRuntime, collect, ids_only, run
from tests.runtime.told import Told
from tpworker import Listener, Runtime, SamplingParams, StepRecord
from tpworker.runtime.listeners import Listeners
from tpworker.runtime.requests import Requests


class Broken(Listener):
    """Raises, one way and another."""

    def on_tokens(self, intervals: Sequence[tuple[int, float]]) -> None:
        raise ValueError("tokens are beyond it")

    def on_step(self, step: StepRecord) -> None:
        raise asyncio.CancelledError


@asynccontextmanager
async def listened(
    make: MakeRuntime, *others: Listener, **options: int
) -> AsyncIterator[tuple[Runtime, Told]]:
    async with make(**options) as runtime:
        told = Told()
        for listener in (*others, told):
            runtime.add_listener(listener)
        yield runtime, told


def test_each_choice_is_told_of_at_its_end_with_its_times(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with listened(fake_runtime) as (runtime, listener):
            params = SamplingParams(max_tokens=5, n=2, detokenize=False)
            await collect(runtime, [5, 6, 7], params)
            await until(lambda: len(listener.records) == 2)
            for index, record in enumerate(sorted(listener.records, key=lambda record: record.index)):
                assert (record.index, record.finish_reason, record.error) == (index, "length", None)
                counts = (record.num_prompt_tokens, record.num_output_tokens, record.num_resumed)
                assert counts == (3, 5, 0)
                assert record.sampling == params
                times = (record.submitted, record.started, record.first_token, record.last_token)
                known = [record.arrived, *(time for time in times if time is not None), record.ended]
                assert len(known) == 6
                assert known == sorted(known)
            assert {record.request_id for record in listener.records} == {listener.records[0].request_id}
            firsts = [r.first_token - r.arrived for r in listener.records if r.first_token is not None]
            assert sorted(listener.waits) == sorted(firsts)
            assert sum(number for number, _ in listener.intervals) == 2 * 4  # all but the first ones
            assert [s.step for s in listener.steps] == [s.step for s in runtime.stats().recent_steps]

    run(main)


def test_who_leaves_is_told_of_and_who_is_refused_is_not(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with listened(fake_runtime) as (runtime, listener):
            stream = runtime.generate([5], ids_only(400))
            await anext(stream)
            await stream.aclose()
            with pytest.raises(ValueError, match="max_tokens"):
                await collect(runtime, [5] * 3, ids_only(10**6))
            assert [(r.finish_reason, r.error) for r in listener.records] == [("abort", None)]
            assert listener.records[0].num_output_tokens >= 1
            runtime.remove_listener(listener)
            await collect(runtime, [5], ids_only(2))
            assert len(listener.records) == 1

    run(main)


def test_a_stop_fails_requests_and_their_records_say_why(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with listened(fake_runtime) as (runtime, listener):
            task = asyncio.ensure_future(collect(runtime, [5], ids_only(400)))
            await until(lambda: runtime.stats().output_tokens > 0)
            await runtime.stop()
            await asyncio.wait([task])
            assert [(r.finish_reason, r.error) for r in listener.records] == [
                (None, "the runtime was stopped")
            ]

    run(main)


def test_what_a_listener_raises_is_logged_once_and_harms_nobody(
    fake_runtime: MakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with listened(fake_runtime, Broken()) as (runtime, listener):
            await collect(runtime, [5], ids_only(20))
            assert sum(number for number, _ in listener.intervals) == 19
            assert len(listener.steps) >= 20

    with caplog.at_level(logging.ERROR):
        run(main)
    assert [record.getMessage().partition(" of ")[0] for record in caplog.records] == ["on_step", "on_tokens"]


def test_several_tokens_of_a_step_are_one_interval() -> None:
    listeners, listener = Listeners(), Told()
    listeners.add(listener)
    requests = Requests(listeners)
    a, b = requests.open("a"), requests.open("b")
    requests.deliver(step((a, 0, 1), (a, 1, 2), (b, 0, 1)))
    assert listener.intervals == []
    assert len(listener.waits) == 2
    requests.deliver(step((a, 2, 3), (a, 3, 4), (a, 4, 5), (b, 1, 1)))
    requests.deliver(step((a, 4, 5), (b, 2, 1)))  # the first of these has come already
    assert [number for number, _ in listener.intervals] == [3, 1, 1]
    assert len(listener.waits) == 2, "there is one first token"
    assert all(seconds > 0 for _, seconds in listener.intervals)
