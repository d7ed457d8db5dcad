"""CUDA as a device: streams, events, pinned buffers and graphs behind the interface of device.py.

    uploads   what a plan brings     pinned buffer ──► device buffer
    compute   the steps              one graph replay each, in steady decode
    copies    results                ring row ──► pinned buffer

Nothing is copied on the compute stream: a copy there costs 15 µs of GPU time a step (docs/notes.md).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpworker.rank.device import Event

logger = logging.getLogger(__name__)

_cuda: Any = torch.cuda  # its streams, events and graphs are typed in part only

POLL_SECONDS = 20e-6
"""How long a wait for an event sleeps in between. Blocking events wake up later (median 80 against 50 µs, p99
340 against 90); asking without a sleep keeps the GIL from the launch thread for a whole step."""

_CALIBRATIONS = 20
_WINDOW = 256  # times after which the clocks are compared again
_LATENCY_NS = 5_000  # from an event to the thread that asks for it, at its quickest
_LONGEST_NS = 1_000_000_000  # between two events: behind that, drift and rounding say more than the sum


class _Clock:
    """CLOCK_MONOTONIC of events, from the time between them, which is all that CUDA tells.

    Times are added up from event to event: a span since the start would soon be too long for the float32 that
    CUDA returns. The two clocks drift apart, so the sum is set right by the shortest delay seen of late
    between an event and the thread that saw it. After a pause, as where nobody wanted to know, it begins anew
    with that. Belongs to one thread, which asks in the order of the events, for the last when it is reached.
    """

    def __init__(self) -> None:
        best = 1 << 62
        for _ in range(_CALIBRATIONS):
            event = _cuda.Event(enable_timing=True)
            before = time.monotonic_ns()
            event.record()
            event.synchronize()
            after = time.monotonic_ns()
            if after - before < best:
                best, self._last, self._at = after - before, event, (before + after) // 2
        self._shortest = 1 << 62
        self._asked = 0

    def time_of(self, event: Any) -> int:
        """Of an event that has been reached, after the one that was asked for before."""
        since, now = round(self._last.elapsed_time(event) * 1e6), time.monotonic_ns()
        self._last = event
        self._at = self._at + since if since < _LONGEST_NS else now - _LATENCY_NS
        self._shortest = min(self._shortest, now - self._at)
        self._asked += 1
        if self._asked == _WINDOW or self._shortest < 0:
            self._at += self._shortest - _LATENCY_NS
            self._shortest, self._asked = 1 << 62, 0
        return self._at


class CudaEvent:
    """A place in a `CudaStream`.

    Args:
        event: of torch, recorded.
        clock: tells its time, if it is one of the compute stream.
    """

    __slots__ = ("_at", "_clock", "event")

    def __init__(self, event: Any, clock: _Clock | None) -> None:
        self.event = event
        self._clock = clock
        self._at = 0

    def synchronize(self) -> None:
        while not self.event.query():
            time.sleep(POLL_SECONDS)

    def time_ns(self) -> int:
        if not self._at:
            assert self._clock is not None, "events of this stream have no time"
            self._at = self._clock.time_of(self.event)
        return self._at


class _Start:
    """When a step starts: when the one before it has ended, or when it is launched, if that is later.

    An event of its own would be a second one in the compute stream every step, and cost the GPU microseconds.
    """

    __slots__ = ("_before", "_launched_ns")

    def __init__(self, before: CudaEvent | None) -> None:
        self._before = before
        self._launched_ns = time.monotonic_ns()

    def synchronize(self) -> None:
        if self._before is not None:
            self._before.synchronize()

    def time_ns(self) -> int:
        before = 0 if self._before is None else self._before.time_ns()
        return max(before, self._launched_ns)


class CudaStream:
    """A stream. `run` launches the work's kernels at once, on the calling thread.

    Args:
        clock: to time its events by; None: they have no time.
    """

    def __init__(self, device: torch.device, clock: _Clock | None = None) -> None:
        self.stream = _cuda.Stream(device)
        self._clock = clock
        self._last: CudaEvent | None = None

    def run(self, work: Callable[[], None]) -> None:
        with torch.inference_mode(), _cuda.stream(self.stream):
            work()

    def record(self) -> CudaEvent:
        event = _cuda.Event(enable_timing=self._clock is not None)
        event.record(self.stream)
        self._last = CudaEvent(event, self._clock)
        return self._last

    def record_start(self) -> Event:
        return _Start(self._last)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self.stream.wait_event(event.event)


class CudaDevice:
    """One GPU.

    Args:
        index: among those that CUDA shows to this process.
    """

    captures = True

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self.adopt_thread()
        self.compute = CudaStream(self.torch_device, _Clock())
        self.copies = CudaStream(self.torch_device)
        self.uploads = CudaStream(self.torch_device)
        # What is made from here on, weights too, is made in the order of the steps that use it.
        _cuda.set_stream(self.compute.stream)
        self._pool: Any = None
        self._warming: threading.Thread | None = None

    def adopt_thread(self) -> None:
        _cuda.set_device(self.torch_device)  # each thread has its own current device, at first GPU 0

    def host_buffer(self, num_bytes: int) -> Tensor:
        buffer = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        assert buffer.is_pinned(), "copies from and to it would wait"
        return buffer

    def upload_buffer(self, num_bytes: int) -> Tensor:
        # Memory is had in the order of a stream. In the compute stream's it may be what a step that is still
        # running has just given back, and uploads do not wait for that.
        with torch.inference_mode(False), _cuda.stream(self.uploads.stream):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def map_host(self, address: int, num_bytes: int) -> None:
        flags = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped
        status = _cuda.cudart().cudaHostRegister(address, num_bytes, flags)
        if int(status):
            raise RuntimeError(f"cudaHostRegister of {num_bytes} bytes failed with error {int(status)}")

    def free_bytes(self, num_ranks: int) -> int:
        """What is free on the GPU, which this rank has for itself."""
        _cuda.synchronize()
        _cuda.empty_cache()
        free: int = _cuda.mem_get_info(self.torch_device)[0]
        return free

    def warm_up(self) -> None:
        """Begins with what the first kernels and the first product of a process wait for, 0.1 s and more that
        the libraries need for themselves; returns at once."""
        self._warming = threading.Thread(target=self._warm_up, name="tpworker-warming", daemon=True)
        self._warming.start()

    def _warm_up(self) -> None:
        self.adopt_thread()
        # No capture: while there is one, nobody may wait for the device.
        with contextlib.suppress(RuntimeError), _cuda.stream(_cuda.Stream(self.torch_device)):
            torch.zeros(1, dtype=torch.int64, device=self.torch_device)
            matrix = torch.zeros(16, 16, dtype=torch.bfloat16, device=self.torch_device)
            torch.mm(matrix, matrix)

    def compile_ahead(self, work: Callable[[], None]) -> None:
        if self._warming is not None:
            self._warming.join()
        try:
            from tpworker.rank.rehearsal import rehearse
        except (ImportError, AttributeError) as error:  # another Triton, or none
            logger.warning("kernels are compiled only when they are needed: %s", error)
            return
        rehearse(partial(self._capture_in_vain, work), self.adopt_thread)
        _cuda.empty_cache()  # of memory that belonged to the graph

    def _capture_in_vain(self, work: Callable[[], None]) -> None:
        """Into a graph that is thrown away: none of the work's kernels runs."""
        matrix = torch.zeros(16, 16, dtype=torch.bfloat16, device=self.torch_device)
        torch.mm(matrix, matrix)  # the library's workspace is made now, or it would be one of the graph's
        graph = _cuda.CUDAGraph(keep_graph=True)  # made into nothing that could be launched
        pool = _cuda.graph_pool_handle()
        with torch.inference_mode(), _cuda.stream(self.compute.stream):
            # Kernels are loaded meanwhile, by this thread and others, and other threads may do as they like.
            graph.capture_begin(pool=pool, capture_error_mode="relaxed")
            try:
                work()
            finally:
                try:
                    graph.capture_end()
                except RuntimeError:
                    # torch does not tell its allocator of device memory that a broken capture has ended.
                    torch._C._cuda_endAllocateToPool(self.torch_device.index, pool)
                    torch._C._cuda_releasePool(self.torch_device.index, pool)
                    raise

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Runs the work twice, the second time into a graph. All graphs share one pool of memory: capture
        the largest first. Waits for the device."""
        self.compute.run(work)  # loads kernels and makes workspaces, which cannot be done in a capture
        _cuda.synchronize()
        # Other threads may go on with their copies meanwhile.
        return self._capture(work, "thread_local")

    def capture_late(self, work: Callable[[], None]) -> Callable[[], None]:
        # A kernel may be launched for the first time, and be loaded: the largest of its kind has not run.
        return self._capture(work, "relaxed")

    def _capture(self, work: Callable[[], None], error_mode: str) -> Callable[[], None]:
        # Not `torch.cuda.graph`, which waits for the device, collects garbage and empties caches.
        if self._pool is None:
            self._pool = _cuda.graph_pool_handle()
        graph = _cuda.CUDAGraph()
        with torch.inference_mode(), _cuda.stream(self.compute.stream):
            graph.capture_begin(pool=self._pool, capture_error_mode=error_mode)
            try:
                work()
            finally:
                graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay

    def synchronize(self) -> None:
        _cuda.synchronize()

    def close(self) -> None:
        """Streams have no threads here."""
