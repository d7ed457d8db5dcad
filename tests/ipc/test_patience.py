"""Time in which the waiter did not run does not count; time in which it did, does."""

from __future__ import annotations

import math
import threading
import time

import pytest

from tpworker.ipc import patience as module
from tpworker.ipc.barrier import Barrier, BarrierTimeout
from tpworker.ipc.channels import Channel, ChannelError, accept_all, new_address
from tpworker.ipc.patience import Patience


class Clock:
    """`time.monotonic`, set by hand."""

    def __init__(self) -> None:
        self.now = 1e6

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize("seconds", [0.05, 1.0, 60.0, 600.0])
def test_who_waits_in_slices_waits_as_long_as_was_said(clock: Clock, seconds: float) -> None:
    patience, began, looks = Patience(seconds), clock.now, 0
    while wait := patience.slice():
        assert 0 < wait <= 0.25
        clock.now += wait
        looks += 1
    assert clock.now - began == pytest.approx(seconds, abs=1e-6)
    assert looks >= min(16, seconds / 0.011)
    assert patience.left() == 0.0


@pytest.mark.parametrize("seconds", [1.0, 60.0])
def test_a_pause_counts_for_two_slices_however_long_it_was(clock: Clock, seconds: float) -> None:
    patience = Patience(seconds)
    for pause in (14.0, 86400.0):
        before = patience.left()
        clock.now += pause
        assert patience.left() == pytest.approx(before - 2 * min(0.25, seconds / 16))


def test_a_slice_that_comes_late_counts_as_it_was(clock: Clock) -> None:
    """A busy machine wakes a waiter late: that is no pause."""
    patience = Patience(16.0)
    clock.now += 1.5 * patience.slice()
    assert patience.left() == pytest.approx(16.0 - 0.375)


def test_it_can_begin_again(clock: Clock) -> None:
    patience = Patience(0.1)
    while wait := patience.slice():
        clock.now += wait
    clock.now += 100.0
    patience.restart()
    assert patience.left() == 0.1


def test_no_patience_and_no_end_of_it(clock: Clock) -> None:
    assert Patience(0.0).left() == 0.0
    endless = Patience(math.inf)
    clock.now += 1e9
    assert endless.left() == math.inf
    assert endless.slice() == 0.25


class Frozen(Clock):
    """A clock that leaps, once: as if all had been paused at its third look."""

    def __init__(self, leap: float) -> None:
        super().__init__()
        self.looks = 0
        self.leap = leap

    def monotonic(self) -> float:
        self.looks += 1
        return time.monotonic() + (self.leap if self.looks > 2 else 0.0)


def test_a_barrier_blames_nobody_for_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", Frozen(1000.0))
    monkeypatch.setattr("tpworker.ipc.barrier.time", Frozen(1000.0))
    barrier = Barrier.create(2, spin=0.0)
    late = threading.Timer(0.2, lambda: barrier.wait(1, 0, 7, 5.0))
    late.start()
    barrier.wait(0, 0, 7, 5.0)
    late.join()
    with pytest.raises(BarrierTimeout, match="rank 1"):  # and who does not come is named nevertheless
        barrier.wait(0, 1, 7, 0.05)
    barrier.close()


def test_a_channel_gives_up_nobody_for_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", Frozen(1000.0))
    address = new_address("test")
    bound = Channel.bind(address)
    others: list[Channel] = []
    late = threading.Timer(0.2, lambda: others.append(Channel.connect(address, "peer", 3)))
    late.start()
    accept_all([(bound, "peer")], 3, 5.0)
    with pytest.raises(ChannelError, match="peer did not connect"):
        accept_all([(bound, "peer")], 3, 0.05)
    late.join()
    for channel in (bound, *others):
        channel.close()


def test_what_was_spent_is_what_has_counted(clock: Clock) -> None:
    patience = Patience(5.0)
    assert patience.spent() == 0
    clock.now += 0.25
    assert patience.spent() == pytest.approx(0.25)
    clock.now += 3600.0  # nobody ran
    assert patience.spent() == pytest.approx(0.75)
    patience.restart()
    assert patience.spent() == 0
