"""The clock of CUDA events, with a GPU whose own clock drifts, and that tells spans in float32."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tpworker.rank import cuda

US = 1_000


class Machine:
    """Its clock, in ns; the GPU's is a little too quick, or too slow."""

    def __init__(self, drift: float) -> None:
        self.now = 0
        self.drift = drift

    def monotonic_ns(self) -> int:
        return self.now

    def event(self, enable_timing: bool = True) -> Event:
        return Event(self)


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.at = 0

    def record(self) -> None:
        self.at = self.machine.now
        self.machine.now += 4 * US

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return float(np.float32((other.at - self.at) * (1 + self.machine.drift) / 1e6))


@pytest.fixture(params=[-20e-6, 20e-6])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(request.param)
    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(Event=machine.event))
    monkeypatch.setattr(cuda, "time", machine)
    return machine


def ask(machine: Machine, clock: cuda._Clock, ns: int) -> int:
    """How far the clock is off for an event after so long, which is noticed some µs later."""
    machine.now += ns
    event = machine.event()
    event.record()
    machine.now += 6 * US
    return abs(clock.time_of(event) - event.at)


@pytest.mark.parametrize("pause_s", [0.5, 30, 86_400])
def test_times_are_right_at_once_after_a_pause(machine: Machine, pause_s: float) -> None:
    clock = cuda._Clock()
    for _ in range(1000):
        assert ask(machine, clock, 2_000 * US) < 40 * US
    assert ask(machine, clock, round(pause_s * 1e9)) < 40 * US
    for _ in range(300):
        assert ask(machine, clock, 2_000 * US) < 40 * US
