"""Looks after the ranks' GPUs while they serve: readings when somebody asks, critical errors when they come.

One thread waits for errors, in the driver; it costs a wake-up every few seconds. Those after which a GPU's
work is lost, or its memory not to be trusted, are the end of its rank, also if the rank has not noticed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
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
    46: "stopped processing, and wants to be reset",
    48: "memory error that cannot be corrected",
    62: "internal micro-controller halted",
    63: "memory row was remapped",
    64: "memory row could not be remapped",
    74: "NVLink error",
    79: "has fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
    109: "context switch timed out",
    110: "security fault",
    119: "system processor (GSP) does not answer",
    120: "system processor (GSP) error",
    140: "memory error that was not recovered",
    158: "fatal timeout",
    171: "memory error (DRAM) that cannot be corrected",
    172: "memory error (SRAM) that cannot be corrected",
}
"""The more frequent ones, from NVIDIA's Xid catalogue."""

FATAL_XIDS = frozenset({46, 48, 62, 79, 94, 95, 109, 110, 119, 120, 140, 158, 171, 172})
"""After these no work on the GPU goes on, or none is to be trusted. In NVIDIA's Xid catalogue, for H100
(docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html), the immediate action is RESET_GPU or
RESTART_BM, or they report memory whose content is lost (48, with 171 or 172; 94, after which the program
that it hit must be restarted). Left out: links (74, 136, 144 to 150, 155) and what fails at a start
(143), which show in what uses them; memory that is set aside (63, 64, 156), as the error itself has a
number of its own; and the program's own errors (13, 31, 43), which its process is told of. 45 comes with
every process that is killed."""

MEMORY_SECONDS = 10.0
"""How often memory errors are counted: there are drivers that tell of no Xids."""


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
        on_fault: called from the watch's thread with a rank whose GPU has failed, and what happened, in a
            line that begins with the GPU; not after `close`.
    """

    def __init__(
        self,
        gpus: Sequence[Gpu],
        nvml: Nvml | None = None,
        on_fault: Callable[[int, str], None] | None = None,
    ) -> None:
        self._on_fault = on_fault
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
        self._uncorrected = {uuid: nvml.uncorrected_errors(uuid) for uuid in self._ranks}
        self._counted_at = time.monotonic()
        events = nvml.watch_xids(list(self._ranks))
        self._has_events = events is not None
        if events is not None or on_fault is not None:
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
            event = None
            if self._has_events:
                event = self._nvml.next_xid(events, round(WAIT_SECONDS * 1000))
            if event is not None:
                self._note(*event)
            elif time.monotonic() - asked < WAIT_SECONDS / 2:  # there are none, or the driver has gone wrong
                self._closed.wait(WAIT_SECONDS)
            if self._on_fault is not None and time.monotonic() - self._counted_at >= MEMORY_SECONDS:
                self._count_memory_errors()
        if self._has_events:
            self._nvml.free(events)
        self._nvml.close()

    def _note(self, uuid: str | None, xid: int) -> None:
        told = _XIDS.get(xid, "see NVIDIA's catalogue of Xid errors")
        if uuid is None and len(self._gpus) == 1:  # no other GPU is watched
            uuid = self._gpus[0].uuid
        rank = self._ranks.get(uuid or "")
        if uuid is None or rank is None:
            logger.error("a GPU reports critical error Xid %d: %s", xid, told)
            return
        summary = f"{self._name(rank)} reports critical error Xid {xid}: {told}"
        logger.error("%s", summary)
        with self._lock:
            self._xids[uuid] += 1
        if xid in FATAL_XIDS:
            self._blame(rank, summary)

    def _count_memory_errors(self) -> None:
        self._counted_at = time.monotonic()
        for uuid, rank in self._ranks.items():
            before, now = self._uncorrected[uuid], self._nvml.uncorrected_errors(uuid)
            if now is None:
                continue
            self._uncorrected[uuid] = now
            if before is not None and now > before:
                summary = f"{self._name(rank)} reports {now - before} memory errors that cannot be corrected"
                logger.error("%s", summary)
                self._blame(rank, summary)

    def _name(self, rank: int) -> str:
        gpu = self._gpus[rank]
        return f"GPU {gpu.index} of rank {rank} ({gpu.uuid})"

    def _blame(self, rank: int, summary: str) -> None:
        if self._on_fault is not None and not self._closed.is_set():
            self._on_fault(rank, summary)
