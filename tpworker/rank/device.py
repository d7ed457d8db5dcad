"""What a rank asks of its device: in-order streams, events between them, buffers on the host.

The interface is CUDA's, cut down to what the runtime needs, so that one code path serves both kinds of
device: work is queued on a stream and the call returns at once; an event marks a place in a stream;
another stream, or a thread of the host, can wait for it.

The CPU device is the same machine in miniature. Each of its streams is a thread that runs what it is
given in order. Nothing that the launch thread does waits for it, so overlap is real on the CPU too, and a
buffer that is reused too early goes wrong here as it would on a GPU. `jitter` makes that likely: it
delays every piece of work, on both streams, at random, and must change no output.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tpworker.ipc.limits import available_bytes


class Event(Protocol):
    """A place in a stream."""

    def synchronize(self) -> None:
        """Sleeps, without spinning, until the stream has come to this place. Raises what went wrong there."""

    def time_ns(self) -> int:
        """When it did, CLOCK_MONOTONIC in ns. Only after `synchronize`."""


class Stream(Protocol):
    """A queue of work that runs in order."""

    def run(self, work: Callable[[], None]) -> None:
        """Queues work: on CUDA, the kernels that it launches; on the CPU, the call itself."""

    def record(self) -> Event:
        """An event behind everything queued so far."""

    def record_start(self) -> Event:
        """Its time is when what is queued next starts to run."""

    def wait(self, event: Event) -> None:
        """What is queued from here on runs after the event, which belongs to another stream."""


class Device(Protocol):
    """Where a rank computes."""

    @property
    def torch_device(self) -> torch.device:
        """For tensors that live on it."""

    @property
    def compute(self) -> Stream:
        """Deltas, forward, sampling: everything that touches the slot table, in plan order."""

    @property
    def copies(self) -> Stream:
        """Copies of results to the host."""

    @property
    def uploads(self) -> Stream:
        """Copies of what a plan brings to the device."""

    @property
    def captures(self) -> bool:
        """Whether work is captured into graphs, so that sizes are best rounded up to a few."""

    def adopt_thread(self) -> None:
        """Comes first in every thread that uses the device."""

    def host_buffer(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the host; copies from and to it are asynchronous (pinned, on CUDA)."""

    def upload_buffer(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the device, which only the upload stream writes to."""

    def map_host(self, address: int, num_bytes: int) -> None:
        """From now on, as long as the process lives, work may read this memory of the host where it is."""

    def free_bytes(self, num_ranks: int) -> int:
        """Memory that this rank may plan with, given that `num_ranks` share the machine."""

    def compile_ahead(self, work: Callable[[], None]) -> None:
        """Compiles what work of the compute stream will launch, all of it at the same time, where kernels are
        compiled when they are first launched. Does not do the work, which must keep nothing that it makes."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Work of the compute stream that does the same every time, made quick to repeat: `run` what it
        returns instead. May run the work, and wait for it."""

    def capture_late(self, work: Callable[[], None]) -> Callable[[], None]:
        """As `capture`, of work that has run, or whose like has: does not run it, and waits for nothing.
        Steps may be on their way, and other threads do what they like meanwhile."""

    def synchronize(self) -> None:
        """Waits for everything that is queued. Not while steps are served."""

    def close(self) -> None:
        """Ends the streams' threads, if there are any. Work that is still queued is dropped."""


class StreamBroken(RuntimeError):
    """An earlier piece of work in this stream raised; everything behind it is dropped, as on CUDA."""


class CpuEvent:
    """An event of a `CpuStream`."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._time_ns = 0
        self._error: BaseException | None = None

    def reach(self, error: BaseException | None) -> None:
        """Called by the stream's thread."""
        self._time_ns = time.monotonic_ns()
        self._error = error
        self._reached.set()

    def synchronize(self) -> None:
        self._reached.wait()
        if self._error is not None:
            raise StreamBroken(f"{type(self._error).__name__}: {self._error}") from self._error

    def time_ns(self) -> int:
        assert self._reached.is_set()
        return self._time_ns


class CpuStream:
    """A thread that runs what it is given, in order."""

    def __init__(self, name: str, jitter: Callable[[], float] | None = None) -> None:
        self._jitter = jitter
        self._error: BaseException | None = None
        self._queue: queue.SimpleQueue[Callable[[], None] | CpuEvent | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def record(self) -> CpuEvent:
        event = CpuEvent()
        self._queue.put(event)
        return event

    def record_start(self) -> CpuEvent:
        return self.record()

    def wait(self, event: Event) -> None:
        self._queue.put(event.synchronize)

    def close(self) -> None:
        self._error = StreamBroken("the stream was closed")
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        with torch.inference_mode():
            while (item := self._queue.get()) is not None:
                if isinstance(item, CpuEvent):
                    item.reach(self._error)
                elif self._error is None:
                    try:
                        if self._jitter is not None:
                            time.sleep(self._jitter())
                        item()
                    except BaseException as error:
                        self._error = error


class CpuDevice:
    """The CPU as a device.

    Args:
        jitter: seconds to delay each piece of work by, drawn anew for each; for tests.
    """

    torch_device = torch.device("cpu")
    captures = False

    def __init__(self, jitter: Callable[[], float] | None = None) -> None:
        self.compute = CpuStream("compute", jitter)
        self.copies = CpuStream("copies", jitter)
        self.uploads = CpuStream("uploads", jitter)

    def adopt_thread(self) -> None:
        """Any thread may use it."""

    def host_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def upload_buffer(self, num_bytes: int) -> Tensor:
        with torch.inference_mode(False):  # may be written to in any mode
            return torch.empty(num_bytes, dtype=torch.uint8)

    def map_host(self, address: int, num_bytes: int) -> None:
        """It can anyway."""

    def free_bytes(self, num_ranks: int) -> int:
        """A rank's share of half of what is available: the other half stays with the rest of the machine."""
        return available_bytes() // 2 // num_ranks

    def compile_ahead(self, work: Callable[[], None]) -> None:
        """Nothing is compiled here."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def capture_late(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def synchronize(self) -> None:
        for stream in (self.uploads, self.compute, self.copies):
            stream.record().synchronize()

    def close(self) -> None:
        for stream in (self.uploads, self.compute, self.copies):
            stream.close()
