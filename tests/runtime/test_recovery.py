"""Recovery, with real processes that echo: whatever is lost, each request gets its tokens, each once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.children import odd_scheduler
from tests.runtime.test_runtime import MakeRuntime, collect, ids_only, rest_of, run, tokens_of
from tests.runtime.told import Told
from tpworker import (
    RequestFailed,
    Runtime,
    RuntimeEvent,
    RuntimeFailed,
    RuntimeStopped,
    SamplingParams,
    StepRecord,
)
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.messages import Sampling, SchedulerLoad, StepOutput, StepTiming, Submit
from tpworker.runtime.recovery import PARTS, Quarantine, Restarts
from tpworker.runtime.requests import Request
from tpworker.runtime.steps import Steps

needs_processes = pytest.mark.usefixtures("nothing_left")


# ---------------------------------------------------------------------------------- how often


def test_restarts_are_counted_within_a_window() -> None:
    times = iter([0.0, 1.0, 9.0, 10.0, 10.5, 11.0, 30.0])
    restarts = Restarts(2, 10.0, lambda: next(times))
    allowed = [restarts.allow() for _ in range(7)]
    assert allowed == [True, True, False, True, False, True, True]
    assert restarts.num == 5
    assert "--max-restarts" in restarts.why_not()
    assert restarts.are_allowed
    none = Restarts(0, 10.0)
    assert not none.allow(in_a_row=True)
    assert not none.are_allowed  # so nothing is kept for them
    assert not none.allow()


def test_starts_that_fail_in_a_row_count_however_long_they_take() -> None:
    times = iter([0.0, 100.0, 200.0, 300.0, 300.5])
    restarts = Restarts(3, 10.0, lambda: next(times))
    assert restarts.allow()
    assert [restarts.allow(in_a_row=True) for _ in range(3)] == [True, True, False]
    assert "in a row" in restarts.why_not()
    assert restarts.allow(), "a fault of one that had got ready"


# -------------------------------------------------------------------------------- whose fault


def request(number: int) -> Request:
    return Request(number, str(number))


def go_on(requests: list[Request], tokens: int) -> None:
    for each in requests:
        for _ in range(tokens):
            each.received.append(1)


@given(st.integers(1, 300), st.data())
def test_the_one_that_ends_the_processes_is_found(count: int, data: st.DataObject) -> None:
    """It does so whenever it runs; none else is ever blamed, and all others run in the end."""
    enough = 5
    quarantine = Quarantine(enough)
    requests = [request(i) for i in range(count)]
    poison = requests[data.draw(st.integers(0, count - 1))]
    open_ones = set(requests)
    num_crashes = 0
    while poison in open_ones:
        running = [r for r in requests if r in open_ones and quarantine.admits(r)]
        if poison not in running:
            assert running, "those that run apart come further, or the next ones would never run"
            go_on([r for r in running if quarantine.admits(r)], enough)
            assert quarantine.advance(open_ones.__contains__)
            continue
        go_on(running, data.draw(st.integers(0, enough - 1)))
        num_crashes += 1
        blamed = quarantine.crashed(running)
        assert blamed in (None, poison)
        if blamed is not None:
            open_ones.discard(blamed)
    levels = 0
    while PARTS**levels < count:
        levels += 1
    assert num_crashes <= 2 + levels + 1
    assert poison.num_crashes >= 2
    for _ in requests:
        go_on([r for r in open_ones if quarantine.admits(r)], enough)
        quarantine.advance(open_ones.__contains__)
    assert quarantine.is_empty


def test_crashes_that_are_far_from_each_other_make_nobody_suspect() -> None:
    quarantine = Quarantine(5)
    requests = [request(i) for i in range(3)]
    for _ in range(10):
        assert quarantine.crashed(requests) is None
        assert quarantine.is_empty
        go_on(requests, 5)


def test_one_alone_is_blamed_for_the_second_crash_and_not_for_the_first() -> None:
    quarantine = Quarantine(5)
    alone = request(0)
    assert quarantine.crashed([alone]) is None
    assert quarantine.crashed([alone]) is alone


def test_who_leaves_while_running_apart_lets_the_others_run() -> None:
    quarantine = Quarantine(5)
    requests = [request(i) for i in range(PARTS)]
    quarantine.crashed(requests)
    quarantine.crashed(requests)
    assert [quarantine.admits(r) for r in requests] == [True] + [False] * (PARTS - 1)
    assert quarantine.advance(lambda r: r is not requests[0])
    assert quarantine.admits(requests[1])
    assert not quarantine.admits(requests[2])


# ------------------------------------------------------------------------- what is told again


def test_a_request_is_told_again_with_all_that_it_has_got() -> None:
    sampling = Sampling(0.0, 1.0, 0, 7, 50, 3, b"", num_logprobs=2)
    told = request(5)
    told.submit = Submit(0, 5, pack_int32([1, 2, 3]), 0, sampling, 4, -3, "salt", "grammar")
    assert told.resubmit(1) == Submit(1, 5, pack_int32([1, 2, 3]), 0, sampling, 4, -3, "salt", "grammar")
    go_on([told], 2)
    again = told.resubmit(7)
    assert (again.generation, again.num_delivered) == (7, 2)
    assert unpack_int32(again.tokens).tolist() == [1, 2, 3, 1, 1]
    assert (again.sampling, again.group, again.priority) == (sampling, 4, -3)
    assert (again.salt, again.grammar) == ("salt", "grammar")
    told.take()
    assert told.resubmit(8).num_delivered == 2, "what its consumer has taken is still its own"


def test_counts_go_on_with_another_scheduler() -> None:
    def output(step: int, load: SchedulerLoad) -> StepOutput:
        return StepOutput(0, step, b"", b"", b"", (), (), 0, 1, StepTiming(1, 2, 3), load)

    steps = Steps()
    steps.add(output(0, SchedulerLoad(9, 1, 10, 5, (3,), (2,))))
    steps.add(output(1, SchedulerLoad(9, 2, 20, 6, (4,), (3,))))
    steps.restart()
    steps.restart()  # another one, before any step
    steps.add(output(0, SchedulerLoad(8, 0, 7, 1, (1,), (1,))))
    load = steps.load
    assert load is not None
    assert (load.free_blocks, load.preemptions, load.prompt_tokens, load.cached_tokens) == (8, 2, 27, 7)
    assert (load.drafts, load.accepted) == ((5,), (4,))
    assert [record.step for record in steps.recent] == [0, 1, 2]


def test_the_last_steps_can_be_had_while_one_is_added() -> None:
    class Busy(deque[StepRecord]):
        """Grows while it is looked at for the first time."""

        def __iter__(self) -> Iterator[StepRecord]:
            looked = super().__iter__()
            if len(self) == 1:
                self.append(self[0]._replace(step=1))
            return looked

    steps = Steps()
    steps.recent = Busy([StepRecord(0, 0, 1, 1, 2, 3)])
    assert [record.step for record in steps.last()] == [0, 1]


# ------------------------------------------------------------------------------- processes


def members(name: str) -> list[psutil.Process]:
    """Processes of the group whose names hold `name`."""
    found = psutil.Process().children(recursive=True)
    return [child for child in found if name in child.name() and "standby" not in child.name()]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.01)


async def goes_on(runtime: Runtime) -> None:
    """A request gets its tokens, though a rank is killed meanwhile."""
    task = asyncio.ensure_future(collect(runtime, [5], ids_only(500)))
    await until(lambda: runtime.stats().output_tokens > 5)
    members("rank0")[0].send_signal(signal.SIGKILL)
    assert tokens_of(await task) == [5] * 500


@needs_processes
@pytest.mark.parametrize("name", ["tpworker-scheduler", "tpworker-rank0", "tpworker-rank1"])
def test_open_requests_go_on_when_a_process_dies(fake_runtime: MakeRuntime, name: str) -> None:
    events: list[RuntimeEvent] = []

    async def main() -> None:
        async with fake_runtime(tensor_parallel_size=2, on_event=events.append, max_num_seqs=2) as runtime:
            runtime.add_listener(ends := Told())
            prompts = [[5 + i, 6, 7] for i in range(4)]  # two of them wait for slots
            tasks = [asyncio.ensure_future(collect(runtime, prompt, ids_only(480))) for prompt in prompts]
            await until(lambda: runtime.stats().output_tokens > 50)
            members(name)[0].send_signal(signal.SIGKILL)
            await until(lambda: runtime.health().state == "recovering")
            assert name in runtime.health().summary
            late = asyncio.ensure_future(collect(runtime, [9], ids_only(3)))  # it is taken meanwhile
            for prompt, task in zip(prompts, tasks, strict=True):
                outputs = await task
                assert tokens_of(outputs) == prompt * 160
                assert outputs[-1].finish_reason == "length"
                assert [o.num_output_tokens for o in outputs][-1] == 480
            assert tokens_of(await late) == [9] * 3
            stats, health = runtime.stats(), runtime.health()
            assert (health.state, health.error) == ("ready", None)
            assert (stats.open, stats.running, stats.waiting, stats.finished) == (0, 0, 0, 5)
            assert (stats.restarts, stats.resumed_requests) == (1, 5)
            assert stats.lost == ((name.removeprefix("tpworker-").rstrip("01"), 1),)
            assert stats.last_recovery_seconds is not None
            assert stats.output_tokens == 4 * 480 + 3
            assert [record.step for record in stats.recent_steps] == sorted(
                {record.step for record in stats.recent_steps}
            )
            assert runtime.events == tuple(events)
            assert sum(record.num_resumed for record in ends.records) == 4  # the late one began behind it
            assert sum(number for number, _ in ends.intervals) == 4 * 479 + 2

    run(main)
    assert [(e.kind, e.process) for e in events] == [(k, name) for k in ("lost", "recovering", "recovered")]
    assert [e.generation for e in events] == [0, 1, 1]
    assert "was killed by SIGKILL" in events[0].summary
    assert events[1].requests in (4, 5), "the late one may have come"
    assert events[2].requests == 5
    assert events[2].seconds is not None


@needs_processes
def test_many_losses_at_random_lose_and_repeat_no_token(fake_runtime: MakeRuntime) -> None:
    draw = random.Random(3)

    async def main() -> None:
        options: dict[str, Any] = {"tensor_parallel_size": 3, "max_num_seqs": 4, "max_restarts": 100}
        async with fake_runtime(**options) as runtime:
            params = [ids_only(480, logprobs=1), ids_only(480, n=3), ids_only(500), ids_only(300)]
            tasks = [
                asyncio.ensure_future(collect(runtime, [5, 6 + i], each)) for i, each in enumerate(params)
            ]
            for _ in range(5):
                await asyncio.sleep(draw.uniform(0, 0.5))
                await until(lambda: len(members("tpworker-")) > 1)
                for victim in draw.sample(members("tpworker-"), draw.choice([1, 1, 2])):
                    victim.send_signal(signal.SIGKILL)
            for i, task in enumerate(tasks):
                outputs = await task
                for index in range(params[i].n):
                    mine = [output for output in outputs if output.index == index]
                    assert tokens_of(mine) == [5, 6 + i] * (len(tokens_of(mine)) // 2)
                    assert len(tokens_of(mine)) == params[i].max_tokens
                    assert all(len(o.logprobs or ()) == len(o.token_ids) for o in mine if params[i].logprobs)
            assert runtime.stats().restarts >= 2
            assert (runtime.stats().open, runtime.stats().finished) == (0, 6)

    run(main)


@needs_processes
def test_a_request_that_ends_the_processes_fails_alone(fake_runtime: MakeRuntime) -> None:
    """The scheduler raises at the sight of a token, whenever it comes."""

    async def main() -> None:
        options = {"scheduler_module": "tests.children.poisonable_scheduler", "max_restarts": 20}
        async with fake_runtime(**options) as runtime:
            good = [asyncio.ensure_future(collect(runtime, [5, 20 + i], ids_only(400))) for i in range(12)]
            await until(lambda: runtime.stats().output_tokens > 50)
            with pytest.raises(RequestFailed, match="'bad' failed: the model's processes ended") as caught:
                await collect(runtime, [odd_scheduler.RAISE, 100], ids_only(), request_id="bad")
            assert "the scheduler is at a loss" in str(caught.value)
            for i, task in enumerate(good):
                assert tokens_of(await task) == [5, 20 + i] * 200
            assert 3 <= runtime.stats().restarts <= 5
            assert runtime.health().state == "ready"
            assert tokens_of(await collect(runtime, [5], ids_only(3))) == [5] * 3

    run(main)


@needs_processes
def test_kills_from_outside_are_held_against_nobody(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            outputs = runtime.generate([5], ids_only(500))
            await anext(outputs)
            for number in range(1, 5):
                members("rank0")[0].send_signal(signal.SIGKILL)
                await until(
                    lambda number=number: (
                        runtime.stats().restarts == number and runtime.health().state == "ready"
                    )
                )
            got = 1 + len(tokens_of(await rest_of(outputs)))
            assert 490 <= got <= 501, "the first output had a token, or some"

    run(main)


@needs_processes
def test_it_gives_up_after_too_many_and_says_why(fake_runtime: MakeRuntime) -> None:
    events: list[RuntimeEvent] = []

    async def main() -> None:
        async with fake_runtime(max_restarts=2, on_event=events.append) as runtime:
            task = asyncio.ensure_future(collect(runtime, [5], ids_only()))
            for number in range(1, 4):
                await until(lambda: runtime.health().state == "ready")
                members("rank0")[0].send_signal(signal.SIGKILL)
                await until(lambda number=number: len([e for e in events if e.kind == "lost"]) == number)
            with pytest.raises(
                RuntimeFailed, match=r"rank0 was killed by SIGKILL.*2 restarts within"
            ) as caught:
                await task
            assert caught.value.process == "tpworker-rank0"
            assert runtime.health().state == "failed"
            assert "--max-restarts" in runtime.health().summary
            with pytest.raises(RuntimeFailed):
                await collect(runtime, [5], ids_only(1))

    run(main)
    assert [e.kind for e in events][-2:] == ["lost", "given_up"]


@needs_processes
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.3])
def test_stop_while_it_recovers(fake_runtime: MakeRuntime, delay: float) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            task = asyncio.ensure_future(collect(runtime, [5], ids_only()))
            await until(lambda: runtime.stats().output_tokens > 5)
            members("rank0")[0].send_signal(signal.SIGKILL)
            await until(lambda: runtime.health().state == "recovering")
            await asyncio.sleep(delay)
            await runtime.stop()
            with pytest.raises(RuntimeStopped):
                await task
            assert runtime.health().state == "stopped"

    run(main)


@needs_processes
@pytest.mark.parametrize("name", ["scheduler", "rank0"])
def test_a_stop_does_not_wait_for_those_who_wait_for_one_that_was_lost(
    fake_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tpworker.runtime.generation.STOP_SECONDS", 1000.0)

    async def main() -> None:
        async with fake_runtime(tensor_parallel_size=2):
            members(name)[0].send_signal(signal.SIGKILL)  # nobody has noticed when it is stopped

    run(main)


@needs_processes
def test_drain_while_it_recovers(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            task = asyncio.ensure_future(collect(runtime, [5], ids_only(300)))
            await until(lambda: runtime.stats().output_tokens > 5)
            members("rank0")[0].send_signal(signal.SIGKILL)
            await until(lambda: runtime.health().state == "recovering")
            await runtime.drain(20)
            assert tokens_of(await task) == [5] * 300

    run(main)


@needs_processes
@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_a_stop_that_is_cancelled_while_it_recovers(fake_runtime: MakeRuntime, delay: float) -> None:
    async def main() -> None:
        runtime = fake_runtime()
        await runtime.start()
        members("rank0")[0].send_signal(signal.SIGKILL)
        await until(lambda: runtime.health().state == "recovering")
        await asyncio.sleep(delay)
        stopping = asyncio.ensure_future(runtime.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(stopping, 10)
        assert not psutil.Process().children(recursive=True)

    run(main)


@needs_processes
def test_who_does_not_get_ready_again_is_tried_again(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it raises, and once it hangs."""
    (model_folder / "tpworker-rank0.early").write_text(
        "fail(MemoryError('something else has it still')) if boot.generation == 1 else "
        "time.sleep(1000) if boot.generation == 2 else None"
    )
    monkeypatch.setattr("tpworker.runtime.processes.SHORTEST_START_SECONDS", 1.0)
    monkeypatch.setattr("tpworker.runtime.processes.START_PATIENCE", 0.0)
    monkeypatch.setattr("tpworker.runtime.generation.START_MARGIN_SECONDS", 0.5)
    events: list[RuntimeEvent] = []

    async def main() -> None:
        async with fake_runtime(on_event=events.append) as runtime:
            await goes_on(runtime)
            assert runtime.stats().restarts == 3

    run(main)
    lost = [event.summary for event in events if event.kind == "lost"]
    assert len(lost) == 3
    assert "was killed by SIGKILL" in lost[0]
    assert "something else has it still" in lost[1]
    assert "rank0" in lost[2], "it hangs"
    assert events[-1].kind == "recovered"
    assert (events[-1].generation, events[-1].requests) == (3, 1)


@needs_processes
@pytest.mark.parametrize("name", ["tpworker-rank0", "tpworker-rank-standby"])
def test_who_is_stopped_while_others_wait_for_it_to_get_ready_is_replaced(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tpworker.runtime.generation.STOPPED_SECONDS", 0.5)
    events: list[RuntimeEvent] = []
    whom = "os.getpid()" if name == "tpworker-rank0" else "os.getppid()"
    (model_folder / "tpworker-rank0.early").write_text(
        f"(os.kill({whom}, signal.SIGSTOP), time.sleep(9)) if boot.generation == 1 else None"
    )

    async def main() -> None:
        async with fake_runtime(on_event=events.append) as runtime:
            await goes_on(runtime)
            assert runtime.stats().restarts == 2

    run(main)
    lost = [(event.process, event.summary) for event in events if event.kind == "lost"]
    assert lost[1][0] == name
    assert "is stopped" in lost[1][1]


@needs_processes
def test_aborts_while_it_recovers(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            task = asyncio.ensure_future(collect(runtime, [5], ids_only(), request_id="a"))
            await until(lambda: runtime.stats().output_tokens > 5)
            members("scheduler")[0].send_signal(signal.SIGKILL)
            await until(lambda: runtime.health().state == "recovering")
            runtime.abort("a")
            assert (await task)[-1].finish_reason == "abort"
            assert tokens_of(await collect(runtime, [7], ids_only(5))) == [7] * 5
            assert (runtime.stats().aborted, runtime.stats().finished, runtime.stats().open) == (1, 1, 0)

    run(main)


@needs_processes
def test_a_listener_that_raises_harms_nobody(fake_runtime: MakeRuntime) -> None:
    def broken(event: RuntimeEvent) -> None:
        raise ValueError("the orchestrator is at a loss")

    async def main() -> None:
        async with fake_runtime(on_event=broken) as runtime:
            task = asyncio.ensure_future(collect(runtime, [5], ids_only(300)))
            await until(lambda: runtime.stats().output_tokens > 5)
            os.kill(members("rank0")[0].pid, signal.SIGKILL)
            assert tokens_of(await task) == [5] * 300

    run(main)


@needs_processes
def test_text_and_stop_strings_go_on(fake_runtime: MakeRuntime, model_folder: Path) -> None:
    from tests.server.fake_runtime import byte_tokenizer

    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))

    async def main(runtime: Runtime) -> None:
        async with runtime:
            params = SamplingParams(max_tokens=477, stop=["never to be seen"])
            task = asyncio.ensure_future(collect(runtime, "grüße! ", params))
            await until(lambda: runtime.stats().output_tokens > 100)
            members("rank0")[0].send_signal(signal.SIGKILL)
            text = "".join(output.text for output in await task)
            assert text == "grüße! " * 53

    run(lambda: main(fake_runtime()))


# ------------------------------------------------------------------------- what may go wrong


@needs_processes
def test_a_listener_may_be_told_of_a_cancelled_future(fake_runtime: MakeRuntime) -> None:
    """The exception is none of `Exception`, and would cancel what replaces the processes."""
    told: list[str] = []

    def broken(event: RuntimeEvent) -> None:
        told.append(event.kind)
        raise asyncio.CancelledError

    async def main() -> None:
        async with fake_runtime(on_event=broken) as runtime:
            for number in (1, 2):
                members("rank0")[0].send_signal(signal.SIGKILL)
                await until(lambda number=number: len(told) == 3 * number)
                assert tokens_of(await collect(runtime, [5], ids_only(3))) == [5] * 3

    run(main)
    assert told == ["lost", "recovering", "recovered"] * 2


@needs_processes
def test_a_listener_finds_the_runtime_as_the_event_says(fake_runtime: MakeRuntime) -> None:
    seen: list[tuple[str, str, bool]] = []

    async def main() -> None:
        def look(event: RuntimeEvent) -> None:
            health = runtime.health()
            seen.append((event.kind, health.state, event.summary in health.summary))

        runtime = fake_runtime(max_restarts=1, on_event=look)
        async with runtime:
            members("rank0")[0].send_signal(signal.SIGKILL)
            await until(lambda: len(seen) == 3)
            members("rank0")[0].send_signal(signal.SIGKILL)
            await until(lambda: runtime.health().state == "failed")

    run(main)
    assert seen == [
        ("lost", "recovering", True),
        ("recovering", "recovering", True),
        ("recovered", "ready", False),
        ("lost", "failed", True),
        ("given_up", "failed", True),
    ]


@needs_processes
@pytest.mark.parametrize("when", ["before the loss", "while it recovers"])
def test_nobody_waits_for_a_recovery_that_was_cancelled(fake_runtime: MakeRuntime, when: str) -> None:
    """Some programs cancel all tasks of their loop when they end."""
    events: list[RuntimeEvent] = []

    def cancel_recovery() -> None:
        for task in asyncio.all_tasks():
            if task.get_name() == "tpworker-recovery":
                task.cancel()

    async def main() -> None:
        async with fake_runtime(on_event=events.append) as runtime:
            task = asyncio.ensure_future(collect(runtime, [5], ids_only(500)))
            await until(lambda: runtime.stats().output_tokens > 5)
            if when == "before the loss":
                cancel_recovery()
            members("rank0")[0].send_signal(signal.SIGKILL)
            if when == "before the loss":
                assert tokens_of(await asyncio.wait_for(task, 20)) == [5] * 500
                return
            await until(lambda: runtime.health().state == "recovering")
            cancel_recovery()
            with pytest.raises(RuntimeFailed, match="cannot be replaced"):
                await asyncio.wait_for(task, 20)
            assert runtime.health().state == "failed"
            assert events[-1].kind == "given_up"

    run(main)
