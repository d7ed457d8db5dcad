"""The rank's loop: invariants 1 to 3, with a runner that only writes down what it is given."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tpworker.ipc.barrier import Barrier, BarrierDiverged, BarrierTimeout
from tpworker.ipc.board import BOUNDS_NS, Board, Field, Span
from tpworker.ipc.channels import Channel, ChannelError, new_address
from tpworker.ipc.codec import MessageError
from tpworker.ipc.messages import BatchPlan, Message, Stop
from tpworker.rank.loop import PlanOutOfOrder, RankLoop


class Recorder:
    """Runner and publisher in one."""

    def __init__(self) -> None:
        self.launched: list[int] = []
        self.published: list[int] = []
        self.caught_up: list[tuple[int, int]] = []  # after so many launched and published

    def launch(self, plan: BatchPlan) -> Any:
        self.launched.append(plan.step)
        return plan.step

    def publish(self, launched: Any) -> None:
        self.published.append(launched)

    def catch_up(self) -> None:
        self.caught_up.append((len(self.launched), len(self.published)))


class Group:
    """`size` rank loops in threads, and the scheduler's ends of their channels."""

    def __init__(self, size: int, timeout: float = 10.0) -> None:
        self.barrier = Barrier.create(size)
        self.board = Board.create([f"rank{rank}" for rank in range(size)])
        self.ranks = [Recorder() for _ in range(size)]
        self.errors: list[BaseException | None] = [None] * size
        self.plans: list[Channel] = []
        self.threads = []
        self.timeout = timeout
        for rank in range(size):
            address = new_address("test")
            self.plans.append(Channel.bind(address))
            self.threads.append(threading.Thread(target=self._run, args=(rank, address)))
            self.threads[-1].start()
            self.plans[-1].accept(f"rank{rank}", 0, 10)

    def _run(self, rank: int, address: str) -> None:
        channel = Channel.connect(address, f"rank{rank}", 0)
        recorder: Any = self.ranks[rank]
        row = self.board.rows()[rank]
        loop = RankLoop(rank, 0, channel, self.barrier, row, recorder, recorder, lambda: self.timeout)
        try:
            loop.run()
        except BaseException as error:
            self.errors[rank] = error
        finally:
            channel.close()

    def send(self, *messages: Message, to: list[int] | None = None) -> None:
        for message in messages:
            for rank in range(len(self.plans)) if to is None else to:
                self.plans[rank].send(message)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def make_group() -> Iterator[Any]:
    groups: list[Group] = []

    def make(*args: Any, **kwargs: Any) -> Group:
        groups.append(Group(*args, **kwargs))
        return groups[-1]

    yield make
    for group in groups:
        group.barrier.abort()
        for rank in range(len(group.plans)):
            with contextlib.suppress(ChannelError):  # it has ended
                group.send(Stop(0), to=[rank])
        group.join()
        for channel in group.plans:
            channel.close()
        group.barrier.close()
        group.board.close()


def plan(step: int, **changes: Any) -> BatchPlan:
    return BatchPlan(**{"generation": 0, "step": step, **changes})


@pytest.mark.parametrize("size", [1, 2, 4])
def test_plans_are_launched_and_published_in_order(make_group: Any, size: int) -> None:
    group = make_group(size)
    group.send(*(plan(step) for step in range(50)), Stop(0))
    group.join()
    for rank in group.ranks:
        assert rank.launched == rank.published == list(range(50))
        assert rank.caught_up == [(number, number) for number in range(1, 51)]
    for row in group.board.rows():
        assert row[Field.RECEIVED] == row[Field.ADMITTED] == row[Field.LAUNCHED] == 50
        assert sum(row.times(Span.BARRIER).counts) == 50
    assert sum(row[Field.LAST_ARRIVALS] for row in group.board.rows()) > 0
    assert group.errors == [None] * size


def test_who_is_waited_for_is_on_the_board(make_group: Any) -> None:
    group = make_group(3)
    late, others = group.board.rows()[1], group.board.rows()[::2]
    for step in range(5):
        group.send(plan(step), to=[0, 2])
        while any(group.barrier.position(rank) != step for rank in (0, 2)):
            time.sleep(0.001)
        time.sleep(0.01)
        group.send(plan(step), to=[1])
    group.send(Stop(0))
    group.join()
    assert late[Field.LAST_ARRIVALS] == 5
    assert [row[Field.LAST_ARRIVALS] for row in others] == [0, 0]
    for row in others:
        times = row.times(Span.BARRIER)
        assert times.total_ns >= 5 * 9_000_000
        assert sum(times.counts[BOUNDS_NS.index(8_192_000) :]) == sum(times.counts) == 5


@pytest.mark.parametrize("steps", [[1], [0, 2], [0, 0], [0, 1, 0]], ids=str)
def test_a_gap_or_a_repeat_is_an_error(make_group: Any, steps: list[int]) -> None:
    """Invariant 1."""
    group = make_group(1)
    group.send(*(plan(step) for step in steps))
    group.join()
    assert isinstance(group.errors[0], PlanOutOfOrder)
    assert f"plan of step {steps[-1]}" in str(group.errors[0])
    assert group.ranks[0].launched == steps[:-1]


def test_a_plan_of_another_generation_is_an_error(make_group: Any) -> None:
    group = make_group(1)
    group.send(plan(0, generation=1))
    group.join()
    assert isinstance(group.errors[0], PlanOutOfOrder)


def test_no_rank_launches_what_the_others_have_not_got(make_group: Any) -> None:
    """Invariant 2: late."""
    group = make_group(3)
    group.send(plan(0))
    group.send(plan(1), to=[0, 2])
    group.threads[0].join(0.2)
    assert [rank.launched for rank in group.ranks] == [[0], [0], [0]]
    group.send(plan(1), to=[1])
    group.send(Stop(0))
    group.join()
    assert [rank.launched for rank in group.ranks] == [[0, 1]] * 3


def test_no_rank_launches_what_the_others_have_otherwise(make_group: Any) -> None:
    """Invariant 2: divergent."""
    group = make_group(3)
    group.send(plan(0), to=[0, 2])
    group.send(plan(0, released=(1,)), to=[1])
    group.join()
    assert [rank.launched for rank in group.ranks] == [[], [], []]
    for error in group.errors:
        assert isinstance(error, BarrierDiverged)
        assert error.minority == [1]


def test_a_rank_that_does_not_come_is_named(make_group: Any) -> None:
    group = make_group(2, timeout=0.1)
    group.send(plan(0), to=[0])
    group.threads[0].join(20)
    assert isinstance(group.errors[0], BarrierTimeout)
    assert group.errors[0].missing == [1]
    assert group.ranks[0].launched == []


def test_what_is_no_plan_is_an_error(make_group: Any) -> None:
    group = make_group(1)
    group.plans[0].send_encoded(b"\x80\x04rubbish")
    group.join()
    assert isinstance(group.errors[0], MessageError)
