"""Looks after the ranks' GPUs while they serve: readings when somebody asks, critical errors when they come.

One thread waits for errors, in the driver; it costs a wake-up every few seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpworker.observe.nvml import Gpu, Nvml, NvmlUnavailable, Reading

logger = logging.getLogger(__name__)

FRESH_SECONDS = 1.0
"""A reading that is younger is given again: asking a GPU takes 3 ms."""
WAIT_SECONDS = 2.0
"""How long the thread waits for an error before it looks whether it shall end."""

_XIDS = {
    13: "graphics engine exception: the program's fault, or the memory's",
    31: "memory page fault: the program's fault, or the memory's",
    43: "stopped processing",
    45: "work was removed, after an earlier error",
    48: "memory error that cannot be corrected",
    62: "internal micro-controller halted",
    63: "memory row was remapped",
    64: "memory row could not be remapped",
    74: "NVLink error",
    79: "has fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "system processor (GSP) does not answer",
    120: "system processor (GSP) error",
    140: "memory error that was not recovered",
}
"""The more frequent ones, from NVIDIA's Xid catalogue."""


@dataclass(frozen=True, slots=True)
class GpuState:
    """A rank's GPU, and how it does."""

    rank: int
    gpu: Gpu
    reading: Reading
    num_xids: int | None
    """Critical errors since the start; None: the driver does not tell of them."""


class GpuWatch:
    """Watches from its making on. Methods may be called from any thread.

    Args:
        gpus: the ranks', in their order.
        nvml: a connection, which is then the watch's to close. None: one is made; without a driver there is
            nothing to be seen.
    """

    def __init__(self, gpus: Sequence[Gpu], nvml: Nvml | None = None) -> None:
        self._ranks = {gpu.uuid: rank for rank, gpu in enumerate(gpus)}
        self._gpus = tuple(gpus)
        self._xids: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._read_at = float("-inf")
        self._readings: dict[str, Reading] = {}
        self._thread: threading.Thread | None = None
        if nvml is None:
            try:
                nvml = Nvml.connect()
            except NvmlUnavailable as error:
                logger.info("GPUs are not watched: %s", error)
                self._closed.set()
                return
        self._nvml = nvml
        events = nvml.watch_xids(list(self._ranks))
        self._has_events = events is not None
        if events is not None:
            self._thread = threading.Thread(
                target=self._watch, args=(events,), name="tpworker-gpus", daemon=True
            )
            self._thread.start()

    def states(self) -> tuple[GpuState, ...]:
        """How each GPU does, at most FRESH_SECONDS old; none once it is closed."""
        with self._lock:
            if self._closed.is_set():
                return ()
            if time.monotonic() - self._read_at >= FRESH_SECONDS:
                self._readings = {gpu.uuid: self._nvml.read(gpu.uuid) for gpu in self._gpus}
                self._read_at = time.monotonic()  # afterwards: a sick GPU may have kept us for seconds
            return tuple(
                GpuState(
                    self._ranks[gpu.uuid],
                    gpu,
                    self._readings[gpu.uuid],
                    self._xids[gpu.uuid] if self._has_events else None,
                )
                for gpu in self._gpus
            )

    def close(self) -> None:
        """Ends it; the thread follows within seconds. Once is enough."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            if self._thread is None:
                self._nvml.close()

    # ------------------------------------------------------------------------------ its thread

    def _watch(self, events: Any) -> None:
        while not self._closed.is_set():
            asked = time.monotonic()
            event = self._nvml.next_xid(events, round(WAIT_SECONDS * 1000))
            if event is not None:
                self._note(*event)
            elif time.monotonic() - asked < WAIT_SECONDS / 2:  # it did not wait: the driver has gone wrong
                self._closed.wait(WAIT_SECONDS)
        self._nvml.free(events)
        self._nvml.close()

    def _note(self, uuid: str | None, xid: int) -> None:
        told = _XIDS.get(xid, "see NVIDIA's catalogue of Xid errors")
        rank = self._ranks.get(uuid or "")
        if uuid is None or rank is None:
            logger.error("a GPU reports critical error Xid %d: %s", xid, told)
            return
        logger.error("GPU %d of rank %d (%s) reports critical error Xid %d: %s",
                     self._gpus[rank].index, rank, uuid, xid, told)  # fmt: skip
        with self._lock:
            self._xids[uuid] += 1
