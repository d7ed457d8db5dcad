"""`Processes` with generations that do as they are told: faults at moments that real ones seldom hit."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.ipc.test_child import RANK_BOOT, SCHEDULER_BOOT
from tpworker.ipc.child import Report
from tpworker.outputs import RuntimeEvent
from tpworker.runtime import processes
from tpworker.runtime.events import Events
from tpworker.runtime.faults import Fault, gpu_fault
from tpworker.runtime.generation import StartFailed
from tpworker.runtime.group import Group
from tpworker.runtime.listeners import EventListener
from tpworker.runtime.processes import Processes
from tpworker.runtime.recovery import Restarts
from tpworker.runtime.requests import Requests

KILLED = Fault("tpworker-rank0", "tpworker-rank0 was killed", is_external=True)


@dataclass
class Told:
    """What the owner of processes was told, and how each generation goes, by its number."""

    starts: dict[int, Callable[[FakeGeneration], None]] = field(default_factory=dict)
    heard: list[str] = field(default_factory=list)
    events: list[RuntimeEvent] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    kv_blocks: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)  # the memory that each generation finds: an inode
    processes: Processes | None = None

    def on_output(self, output: object) -> None:
        raise AssertionError("nobody says anything")

    def on_lost(self, fault: Fault) -> None:
        self.heard.append("lost")

    def on_recovered(self, generation: object) -> int:
        self.heard.append("recovered")
        return 0

    def on_suspended(self) -> None:
        self.heard.append("suspended")

    def on_failed(self, fault: Fault) -> None:
        self.heard.append(f"failed: {fault.summary}")

    def has_heard(self, word: str) -> bool:
        return any(word in one for one in self.heard)


class FakeGeneration:
    told: Told

    def __init__(
        self, group: Group, on_output: object, on_fault: Callable[[Fault], None], is_busy: object, *more: Any
    ) -> None:
        self.number, self.on_fault = group.generation, on_fault
        self.ranks: list[Any] = []
        self.num_kept_blocks = 0
        self.is_over = False
        self.leftovers: list[str] = []
        self.was_orderly = True
        self.told.models.append(group.model)
        self.told.kv_blocks.append(group.rank.num_kv_blocks)
        _, keeping = more
        self.told.kept.append(os.fstat(keeping.fd(0)).st_ino)
        if self.number == 7:
            raise OSError("too many open files")

    async def ready(self, timeout: float, progress: object) -> int:
        self.told.starts.get(self.number, lambda generation: None)(self)
        return 99

    async def stop(self) -> None:
        self.is_over = True
        await asyncio.sleep(0)

    def kill(self) -> None:
        """Nobody is there."""


def fail(fault: Fault) -> Callable[[FakeGeneration], None]:
    def start(generation: FakeGeneration) -> None:
        raise StartFailed(fault)

    return start


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    FakeGeneration.told = Told()
    monkeypatch.setattr(processes, "Generation", FakeGeneration)
    monkeypatch.setattr(processes, "FIRST_PAUSE_SECONDS", 0.0)
    return FakeGeneration.told


def run(
    told: Told, work: Callable[[Processes], Coroutine[Any, Any, None]], first: int = 0, most: int = 9
) -> None:
    async def main() -> None:
        group = Group(
            generation=first,
            num_ranks=1,
            model="/",
            scheduler=SCHEDULER_BOOT.settings,
            rank=RANK_BOOT.settings,
        )
        events = Events(EventListener(told.events.append))
        told.processes = Processes(group, Restarts(most, 300.0), Requests(), events, told)
        try:
            assert await told.processes.ready(lambda text, fraction: None) == 99
            await work(told.processes)
        finally:
            await told.processes.stop()

    asyncio.run(main())


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0)


def lose(processes: Processes, fault: Fault = KILLED) -> None:
    generation: Any = processes.generation
    generation.on_fault(fault)


def test_who_gives_up_at_the_moment_of_getting_ready_has_failed_for_good(told: Told) -> None:
    told.starts[1] = lambda generation: generation.on_fault(KILLED)

    async def work(processes: Processes) -> None:
        lose(processes)
        await until(lambda: told.has_heard("failed"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not processes.is_up

    run(told, work, most=1)
    assert told.heard[0] == "lost"
    assert len(told.heard) == 2, "it has not recovered besides"
    assert [event.kind for event in told.events] == ["lost", "recovering", "lost", "given_up"]


def test_who_is_lost_at_the_moment_of_getting_ready_is_replaced(told: Told) -> None:
    told.starts[1] = lambda generation: generation.on_fault(KILLED)

    async def work(processes: Processes) -> None:
        lose(processes)
        await until(lambda: told.has_heard("recovered"))
        assert processes.generation.number == 2

    run(told, work)
    assert told.heard == ["lost", "lost", "recovered"]


@pytest.mark.parametrize(
    ("fault", "is_kept"),
    [
        (KILLED, True),
        (Fault("tpworker-rank0", "tpworker-rank0 raised ValueError"), False),
        (gpu_fault(0, "Xid 79"), False),
    ],
)
def test_what_a_start_that_failed_has_found_is_found_again_only_if_it_was_killed(
    told: Told, fault: Fault, is_kept: bool
) -> None:
    told.starts[1] = fail(fault)

    async def work(processes: Processes) -> None:
        lose(processes)
        await until(lambda: told.has_heard("recovered"))

    run(told, work)
    assert told.kept[0] == told.kept[1], "a kill forfeits nothing"
    assert (told.kept[1] == told.kept[2]) is is_kept


@pytest.mark.parametrize("forfeits", [False, True])
def test_memory_that_a_fault_forfeits_is_forgotten(told: Told, forfeits: bool) -> None:
    async def work(processes: Processes) -> None:
        lose(processes, Fault("tpworker-rank0", "it is over", forfeits=forfeits))
        await until(lambda: told.has_heard("recovered"))

    run(told, work)
    assert (told.kept[0] != told.kept[1]) is forfeits


def test_memory_that_a_process_may_still_write_to_is_forgotten(told: Told) -> None:
    async def work(processes: Processes) -> None:
        processes.generation.leftovers.append("tpworker-rank0")
        lose(processes)
        await until(lambda: told.has_heard("recovered"))

    run(told, work)
    assert told.kept[0] != told.kept[1]


def test_all_generations_have_as_many_blocks_as_the_first(told: Told) -> None:
    async def work(processes: Processes) -> None:
        lose(processes)
        await until(lambda: told.has_heard("recovered"))

    run(told, work)
    assert told.kv_blocks == [RANK_BOOT.settings.num_kv_blocks, 99]


def test_starts_that_always_fail_come_to_an_end(told: Told) -> None:
    told.starts.update({number: fail(KILLED) for number in range(1, 20)})

    async def work(processes: Processes) -> None:
        times = iter(range(0, 100_000, 1000))  # each start takes longer than the window
        processes.restarts._now = lambda: float(next(times))
        lose(processes)
        await until(lambda: told.has_heard("failed"))

    run(told, work, most=4)
    assert len(told.kept) == 5, "the first one, and as many as may be"


def test_who_cannot_be_started_any_more_is_given_up(told: Told) -> None:
    async def work(processes: Processes) -> None:
        lose(processes)
        await until(lambda: told.has_heard("failed"))

    run(told, work, first=6)  # see `FakeGeneration`
    assert "too many open files" in told.heard[-1]
    assert [event.kind for event in told.events] == ["lost", "recovering", "given_up"]


def test_who_is_lost_while_it_is_stopped_is_no_fault(told: Told) -> None:
    async def work(processes: Processes) -> None:
        stopping = asyncio.ensure_future(processes.stop())
        await asyncio.sleep(0)
        lose(processes)
        await stopping

    run(told, work, most=0)
    assert (told.heard, told.events) == ([], [])


REFUSED = Fault("tpworker-rank0", "no such weights", Report("ModelError", "no such weights", "", (), ()))


def kinds(told: Told) -> list[str]:
    return [event.kind for event in told.events]


def test_a_generation_that_is_ended_and_begun_by_wish_is_no_fault(told: Told) -> None:
    async def work(processes: Processes) -> None:
        before = processes.generation
        await processes.suspend()
        assert before.is_over
        assert (processes.is_suspended, processes.is_up) == (True, False)
        await processes.suspend()
        await processes.resume()
        assert (processes.is_suspended, processes.is_up) == (False, True)
        assert (processes.generation.number, processes.num_restarts) == (1, 0)
        await processes.resume()
        lose(processes)
        await until(lambda: told.heard.count("recovered") == 2)
        assert (processes.generation.number, processes.num_restarts) == (2, 1)

    run(told, work, most=1)
    assert told.heard == ["suspended", "recovered", "lost", "recovered"]
    assert len(set(told.kept)) == 1, "nothing is forgotten but by who wants it"


def test_who_is_lost_while_it_is_ended_by_wish_is_not_replaced_before_that_is_wished(told: Told) -> None:
    async def work(processes: Processes) -> None:
        suspending = asyncio.ensure_future(processes.suspend())
        await asyncio.sleep(0)
        lose(processes, Fault("tpworker-rank0", "it is over", forfeits=True))
        await suspending
        for _ in range(10):
            await asyncio.sleep(0)
        assert processes.generation.number == 0
        await processes.resume()

    run(told, work)
    assert told.heard == ["lost", "suspended", "recovered"]
    assert told.kept[0] != told.kept[1], "and what it forfeits is forgotten"


def test_memory_of_processes_that_do_not_end_in_order_is_forgotten(told: Told) -> None:
    async def work(processes: Processes) -> None:
        generation: Any = processes.generation
        generation.was_orderly = False
        await processes.suspend()
        await processes.resume()

    run(told, work)
    assert told.kept[0] != told.kept[1]


def test_an_end_by_wish_comes_after_a_recovery_that_is_under_way(told: Told) -> None:
    async def work(processes: Processes) -> None:
        lose(processes)
        await asyncio.sleep(0)
        await processes.suspend()
        assert processes.generation.number == 1

    run(told, work)
    assert told.heard == ["lost", "recovered", "suspended"]


@pytest.mark.parametrize("how", ["in its start", "at once"])
def test_who_is_lost_when_it_is_wanted_again_is_replaced(told: Told, how: str) -> None:
    told.starts[1] = fail(KILLED) if how == "in its start" else lambda generation: generation.on_fault(KILLED)

    async def work(processes: Processes) -> None:
        await processes.suspend()
        await processes.resume()
        assert processes.is_up
        assert (processes.generation.number, processes.num_restarts) == (2, 1)

    run(told, work)
    assert told.heard == ["suspended", "lost", "recovered"]
    assert kinds(told) == ["lost", "recovering", "recovered"]


def test_what_a_process_refuses_is_said_and_may_be_tried_again(told: Told) -> None:
    told.starts[1] = fail(REFUSED)

    async def work(processes: Processes) -> None:
        await processes.suspend()
        with pytest.raises(StartFailed, match="no such weights"):
            await processes.resume()
        assert processes.is_suspended
        await processes.resume()
        assert (processes.is_up, processes.num_restarts) == (True, 0)

    run(told, work, most=0)
    assert told.heard == ["suspended", "recovered"]


@pytest.mark.parametrize("then", ["they are there", "one is killed", "they are gone too"])
def test_what_a_process_refuses_gives_way_to_what_was(told: Told, then: str) -> None:
    told.starts[1] = fail(REFUSED)
    if then != "they are there":
        told.starts |= dict.fromkeys(range(2, 9), fail(REFUSED)) if then == "they are gone too" else {}
        told.starts[2] = fail(KILLED if then == "one is killed" else REFUSED)

    async def work(processes: Processes) -> None:
        old = processes.group
        await processes.suspend()
        processes.group = replace(old, model="/new")
        with pytest.raises(StartFailed, match="no such weights"):
            await processes.resume(lambda: setattr(processes, "group", old))
        assert processes.is_up is (then != "they are gone too")

    run(told, work, most=3)
    assert set(told.models[:2]) == {"/", "/new"}
    assert set(told.models[2:]) == {"/"}
    assert told.has_heard("failed") is (then == "they are gone too")


def test_an_end_by_wish_that_is_under_way_gives_way_to_a_stop(told: Told) -> None:
    async def work(processes: Processes) -> None:
        task = processes.change(processes.suspend())
        await asyncio.sleep(0)
        await processes.stop()
        assert task.cancelled()
        assert processes.is_over
        await processes.suspend()
        await processes.resume()

    run(told, work)
    assert told.heard == []
