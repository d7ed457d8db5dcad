"""A device on which every step takes a given time, on a clock of its own.

Work is done at once, on the calling thread (the runner that goes with it has next to nothing to do), and
counts as done later. A piece of work begins when it was queued, or when the one before it ends, whichever
is later, and ends a fixed time after that: arithmetic, no thread and no sleeping. So what a runtime costs
the host, and whether the host keeps the device fed, can be measured without a GPU. A gap between two
steps on this clock means that the second was launched after the first had ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tpworker.rank.device import Event


class FakeEvent:
    """A moment on the virtual clock."""

    def __init__(self, at_ns: int) -> None:
        self._at_ns = at_ns

    def synchronize(self) -> None:
        """Sleeps until the moment has come."""
        while (left := self._at_ns - time.monotonic_ns()) > 0:
            time.sleep(left / 1e9)

    def time_ns(self) -> int:
        return self._at_ns


class FakeStream:
    """Work that takes `seconds` each, one after the other."""

    def __init__(self, seconds: float) -> None:
        self._work_ns = round(seconds * 1e9)
        self._busy_until_ns = 0

    def run(self, work: Callable[[], None]) -> None:
        """Does the work now and says that it took its time."""
        work()
        self._busy_until_ns = max(self._busy_until_ns, time.monotonic_ns()) + self._work_ns

    def record(self) -> Event:
        return FakeEvent(max(self._busy_until_ns, time.monotonic_ns()))

    def record_start(self) -> Event:
        return self.record()

    def wait(self, event: Event) -> None:
        self._busy_until_ns = max(self._busy_until_ns, event.time_ns())


class FakeDevice:
    """A device whose every step takes `step_seconds`, and whose copies take no time."""

    torch_device = torch.device("cpu")
    captures = False

    def __init__(self, step_seconds: float) -> None:
        self.compute = FakeStream(step_seconds)
        self.copies = FakeStream(0.0)
        self.uploads = FakeStream(0.0)

    def adopt_thread(self) -> None:
        """Any thread may use it."""

    def host_buffer(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def upload_buffer(self, num_bytes: int) -> Tensor:
        with torch.inference_mode(False):  # may be written to in any mode
            return torch.zeros(num_bytes, dtype=torch.uint8)

    def map_host(self, address: int, num_bytes: int) -> None:
        """It can anyway."""

    def free_bytes(self, num_ranks: int) -> int:
        return 1 << 34

    def compile_ahead(self, work: Callable[[], None]) -> None:
        """Nothing is compiled here."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def capture_late(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def synchronize(self) -> None:
        """Work is done when it is queued."""

    def close(self) -> None:
        """Nothing runs here."""
