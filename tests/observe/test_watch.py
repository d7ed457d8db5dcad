"""GPUs are looked after while they serve, and what a driver does wrong harms nobody."""

from __future__ import annotations

import logging
import sys
import threading
import time

import pytest

from tests.conftest import eventually
from tests.observe.fake_nvml import FakeGpu, FakeNvml
from tpworker.observe import watch as watch_module
from tpworker.observe.nvml import Nvml, Reading, find_gpus
from tpworker.observe.watch import GpuWatch

UUIDS = ["GPU-1", "GPU-2"]

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "WAIT_SECONDS", 0.005)


def watching(library: FakeNvml) -> GpuWatch:
    return GpuWatch(find_gpus(Nvml(library), {}).gpus, Nvml(library))


def test_readings_are_fresh_but_not_asked_for_more_often_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml(UUIDS)
    watch = watching(library)
    first, second = watch.states()
    assert (first.rank, first.gpu.uuid, second.rank, second.gpu.uuid) == (0, "GPU-1", 1, "GPU-2")
    assert first.reading == Reading(34, 75.5, 1 << 30, 3, 0)
    library.gpus[0].temperature = 50
    assert watch.states()[0].reading.temperature == 34, "a moment old"
    now = time.monotonic()
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now + 1.1)
    assert watch.states()[0].reading.temperature == 50
    watch.close()
    assert watch.states() == ()


def test_critical_errors_are_counted_and_logged_with_their_rank(caplog: pytest.LogCaptureFixture) -> None:
    library = FakeNvml(UUIDS)
    stranger = FakeGpu("GPU-9")
    library.events = [(library.gpus[1], 79), (library.gpus[1], 999), (stranger, 48)]
    with caplog.at_level(logging.ERROR):
        watch = watching(library)
        eventually(lambda: "Xid 48" in caplog.text)
    assert [state.num_xids for state in watch.states()] == [0, 2]
    assert "GPU 1 of rank 1 (GPU-2) reports critical error Xid 79: has fallen off the bus" in caplog.text
    assert "Xid 999: see NVIDIA's catalogue" in caplog.text
    watch.close()
    watch.close()
    eventually(lambda: library.freed == 1 and library.num_open == 1)  # the other one is `find_gpus`'


def test_without_events_there_is_no_thread() -> None:
    library = FakeNvml(UUIDS, refused=["nvmlEventSetCreate"])
    before = threading.active_count()
    watch = watching(library)
    assert threading.active_count() == before
    assert [state.num_xids for state in watch.states()] == [None, None]
    watch.close()
    assert library.num_open == 1


def test_a_driver_that_does_not_wait_is_not_asked_in_a_loop() -> None:
    library = FakeNvml(UUIDS, refused=["nvmlEventSetWait"])
    started = time.monotonic()
    watch = watching(library)
    time.sleep(0.05)
    num_asked = library.calls.count("nvmlEventSetWait")
    assert num_asked <= 2 + (time.monotonic() - started) / watch_module.WAIT_SECONDS
    watch.close()


def test_a_gpu_that_is_lost_gives_no_figures() -> None:
    library = FakeNvml(UUIDS)
    watch = watching(library)
    library.refused = {name for name in dir(FakeNvml) if name.startswith("nvmlDeviceGet")}
    assert watch.states()[0].reading == Reading(None, None, None, None, None)
    watch.close()


def test_without_a_driver_there_is_nothing_to_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=False))
    gpus = find_gpus(Nvml(FakeNvml(UUIDS)), {}).gpus
    watch = GpuWatch(gpus)
    assert watch.states() == ()
    watch.close()
