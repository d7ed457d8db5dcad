"""GPUs are looked after while they serve, and what a driver does wrong harms nobody."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

import pytest

from tests.conftest import eventually
from tests.observe.fake_nvml import FakeGpu, FakeNvml
from tpworker.observe import watch as watch_module
from tpworker.observe.nvml import Nvml, Reading, find_gpus
from tpworker.observe.watch import FATAL_XIDS, GpuWatch

UUIDS = ["GPU-1", "GPU-2"]

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "WAIT_SECONDS", 0.005)


def watching(library: FakeNvml, on_fault: Callable[[int, str], None] | None = None) -> GpuWatch:
    return GpuWatch(find_gpus(Nvml(library), {}).gpus, Nvml(library), on_fault)


def test_readings_are_fresh_but_not_asked_for_more_often_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml(UUIDS)
    watch = watching(library)
    first, second = watch.states()
    assert (first.rank, first.gpu.uuid, second.rank, second.gpu.uuid) == (0, "GPU-1", 1, "GPU-2")
    assert first.reading == Reading(34, 75.5, 1 << 30, 3, 0, 55)
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


class Faults(list[tuple[int, str]]):
    """What a watch tells of."""

    def note(self, rank: int, summary: str) -> None:
        assert threading.current_thread().name == "tpworker-gpus"
        self.append((rank, summary))


@pytest.mark.parametrize("xid", sorted(FATAL_XIDS))
def test_a_fatal_error_is_the_end_of_its_rank(xid: int) -> None:
    library, faults = FakeNvml(UUIDS), Faults()
    library.events = [(library.gpus[1], xid)]
    watch = watching(library, faults.note)
    eventually(lambda: bool(faults))
    assert faults[0][0] == 1
    assert faults[0][1].startswith(f"GPU 1 of rank 1 (GPU-2) reports critical error Xid {xid}: ")
    assert "catalogue" not in faults[0][1], "it has words of its own"
    watch.close()


def test_what_a_program_has_done_itself_is_not(caplog: pytest.LogCaptureFixture) -> None:
    """Its own process is told of it. 45 comes with each that is killed."""
    library, faults = FakeNvml(UUIDS), Faults()
    library.events = [(library.gpus[0], xid) for xid in (13, 31, 43, 45, 63, 74, 999)]
    with caplog.at_level(logging.ERROR):
        watch = watching(library, faults.note)
        eventually(lambda: "Xid 999" in caplog.text)
    assert faults == []
    watch.close()


def test_a_gpu_that_no_longer_says_who_it_is_is_known_by_its_handle() -> None:
    library, faults = FakeNvml(UUIDS), Faults()
    watch = watching(library, faults.note)
    library.refused = {"nvmlDeviceGetUUID"}
    library.events = [(library.gpus[1], 79)]
    eventually(lambda: bool(faults))
    assert [rank for rank, _ in faults] == [1]
    watch.close()


def test_the_only_gpu_that_is_watched_is_the_one() -> None:
    library, faults = FakeNvml(UUIDS[:1]), Faults()
    watch = watching(library, faults.note)
    library.refused = {"nvmlDeviceGetUUID"}
    library.events = [(FakeGpu("GPU-7"), 79)]
    eventually(lambda: bool(faults))
    assert faults[0][1].startswith("GPU 0 of rank 0 (GPU-1) reports critical error Xid 79: has fallen off")
    watch.close()


@pytest.mark.parametrize("refused", [[], ["nvmlEventSetCreate"]], ids=["events", "no events"])
def test_memory_errors_that_are_not_corrected_are_the_end_of_a_rank(
    refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "MEMORY_SECONDS", 0.01)
    library, faults = FakeNvml(UUIDS, refused=refused), Faults()
    library.gpus[0].ecc = (3, 5)  # of long ago
    watch = watching(library, faults.note)
    counted = library.calls.count("nvmlDeviceGetTotalEccErrors")
    eventually(lambda: library.calls.count("nvmlDeviceGetTotalEccErrors") > counted + 4)
    assert faults == []
    library.gpus[1].ecc = (3, 2)
    eventually(lambda: bool(faults))
    text = "GPU 1 of rank 1 (GPU-2) reports 2 memory errors that cannot be corrected"
    assert faults == [(1, text)], "each is told of once"
    watch.close()
    watch._thread.join(10)  # type: ignore[union-attr]
    assert library.freed == (not refused)


def test_a_gpu_that_does_not_count_is_not_taken_for_one_with_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "MEMORY_SECONDS", 0.01)
    library, faults = FakeNvml(UUIDS, refused=["nvmlDeviceGetTotalEccErrors"]), Faults()
    library.gpus[0].ecc = (0, 7)
    watch = watching(library, faults.note)
    library.refused.clear()
    counted = library.calls.count("nvmlDeviceGetTotalEccErrors")
    eventually(lambda: library.calls.count("nvmlDeviceGetTotalEccErrors") > counted + 4)
    assert faults == []
    watch.close()


def test_nothing_is_told_once_it_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    library, faults = FakeNvml(UUIDS), Faults()
    watch = watching(library, faults.note)
    watch.close()
    watch._note("GPU-1", 79)
    assert faults == []
    assert "Xid 79" in caplog.text
