"""The CPU as a device: in order, asynchronous, and wrong in the same ways as a GPU when misused."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tpworker.rank.device import CpuDevice, StreamBroken
from tpworker.testing.fake_device import FakeDevice


@pytest.fixture
def device() -> CpuDevice:
    return CpuDevice()


def test_work_runs_in_order_and_the_caller_does_not_wait(device: CpuDevice) -> None:
    gate, done = threading.Event(), []
    device.compute.run(lambda: gate.wait(10) and None)
    for number in range(100):
        device.compute.run(lambda n=number: done.append(n))
    assert not done, "the launch thread has waited for the device"
    event = device.compute.record()
    gate.set()
    event.synchronize()
    assert done == list(range(100))
    device.close()


def test_an_event_is_reached_after_all_that_was_queued_before_it(device: CpuDevice) -> None:
    x = torch.zeros(1)
    device.compute.run(lambda: (time.sleep(0.02), x.fill_(1))[0])
    event = device.compute.record()
    before = time.monotonic_ns()
    event.synchronize()
    assert x.item() == 1
    assert event.time_ns() >= before
    device.close()


def test_a_stream_waits_for_an_event_of_another(device: CpuDevice) -> None:
    gate, x, y = threading.Event(), torch.zeros(1), torch.zeros(1)
    device.compute.run(lambda: (gate.wait(10), x.fill_(7))[0] and None)
    device.copies.wait(device.compute.record())
    device.copies.run(lambda: (y.copy_(x), None)[1])
    copied = device.copies.record()
    gate.set()
    copied.synchronize()
    assert y.item() == 7
    device.close()


def test_what_raises_breaks_the_stream_for_good(device: CpuDevice) -> None:
    def wrong() -> None:
        raise ValueError("a bad kernel")

    after = []
    before = device.compute.record()
    device.compute.run(wrong)
    device.compute.run(lambda: after.append(1))
    event = device.compute.record()
    before.synchronize()
    with pytest.raises(StreamBroken, match="ValueError: a bad kernel") as caught:
        event.synchronize()
    assert isinstance(caught.value.__cause__, ValueError)
    assert not after
    device.close()


def test_a_stream_that_waits_for_a_broken_one_breaks_too(device: CpuDevice) -> None:
    device.compute.run(lambda: [][1])
    device.copies.wait(device.compute.record())
    with pytest.raises(StreamBroken):
        device.copies.record().synchronize()
    device.close()


def test_jitter_delays_and_close_drops_what_is_queued() -> None:
    delays = iter([0.05, 0.05])
    device = CpuDevice(lambda: next(delays))
    started = time.monotonic_ns()
    device.compute.run(lambda: None)
    event = device.compute.record()
    event.synchronize()
    assert event.time_ns() - started >= 50_000_000
    device.close()
    assert not [t for t in threading.enumerate() if t.name in ("compute", "copies") and not t.daemon]


def test_inference_mode_holds_on_the_stream(device: CpuDevice) -> None:
    seen = []
    device.compute.run(lambda: seen.append(torch.is_inference_mode_enabled()))
    device.compute.record().synchronize()
    assert seen == [True]
    device.close()


def test_memory_is_shared_out(device: CpuDevice) -> None:
    assert 0 < device.free_bytes(4) <= device.free_bytes(2) + 2**30
    assert device.host_buffer(32).shape == (32,)
    device.close()


def test_the_fake_device_keeps_a_clock_of_its_own() -> None:
    device = FakeDevice(0.001)
    device.compute.run(lambda: None)
    device.compute.run(lambda: None)
    second = device.compute.record()
    device.compute.run(lambda: None)
    third = device.compute.record()
    assert third.time_ns() - second.time_ns() == 1_000_000, "queued in time: no gap at all"
    third.synchronize()
    assert time.monotonic_ns() >= third.time_ns()
    device.copies.wait(third)
    assert device.copies.record().time_ns() >= third.time_ns()
    idle = device.compute.record()
    assert idle.time_ns() >= third.time_ns()
    device.close()
