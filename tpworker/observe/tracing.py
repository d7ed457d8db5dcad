"""A runtime's trace: what all processes did and when, written to a file while it is on.

    rings (ipc/trace.py) ─────┐
    requests, events, spans ──┼─► a thread: drains, makes JSON of it (timeline.py), writes ─► FILE
    (event loop) ── a deque ──┘

The file is whole after a stop, and whatever has become of other processes; when this one is killed, it lacks
its last bracket, which Perfetto and chrome://tracing do without. It grows up to a limit, then the trace ends.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tpworker.errors import ConfigError
from tpworker.ipc.streams import open_standard_descriptors
from tpworker.ipc.trace import RUNTIME_RING, Rings, Teller
from tpworker.observe.timeline import Args, Timeline
from tpworker.outputs import Listener, RequestRecord, RuntimeEvent, TraceSummary

logger = logging.getLogger(__name__)

MAX_BYTES = 256 << 20
"""Of a file, unless somebody says otherwise: what Perfetto opens without ado."""
TICK_SECONDS = 0.02
"""How often the rings are looked at; they hold 4096 steps."""
_MOST_WAITING = 1 << 16  # requests, events and spans that the thread has not come to
_AT_ONCE = 32  # records of which JSON is made before other threads get a turn
_TURN_SECONDS = 20e-6  # which they do not take by themselves within 5 ms
_LEAST_BYTES = 1 << 20


class Tracing(Listener):
    """Traces a runtime, again and again, into a file each time. Belongs to its event loop.

    Args:
        num_ranks: TP size.
    """

    def __init__(self, num_ranks: int) -> None:
        self.last: TraceSummary | None = None
        """Of the last trace that was written to its end."""
        self._num_ranks = num_ranks
        self._rings: Rings | None = None
        self._writer: _Writer | None = None
        self._lost_at: int | None = None  # since when there are no processes
        self._lock = threading.Lock()  # of `last`, `_writer` and `_rings`, which any thread may set

    @property
    def is_on(self) -> bool:
        """Whether a file is being written, and is not full."""
        return self._writer is not None and not self._writer.is_over

    @property
    def fd(self) -> int:
        """For the processes to inherit."""
        return self._opened().fd

    def _opened(self) -> Rings:
        if self._rings is None:
            open_standard_descriptors()  # or the memory could become one that is closed, and be written to
            self._rings = Rings.create(self._num_ranks)
        return self._rings

    def teller(self, generation: int) -> Teller:
        """For the event loop's thread, of this generation on."""
        return self._opened().teller(RUNTIME_RING, generation)

    def start(self, path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> None:
        """Writes a trace from now on.

        Raises:
            ConfigError: one is being written, or the file cannot be.
        """
        if self.is_on:
            raise ConfigError("a trace is being written already: stop it first")
        if max_bytes < _LEAST_BYTES:
            raise ConfigError(f"max_bytes={max_bytes}: a trace takes {_LEAST_BYTES} bytes at least")
        self.stop()
        open_standard_descriptors()
        try:
            file = Path(path).open("wb", buffering=0)  # noqa: SIM115  # the writer's, until it closes it
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"the trace {os.fspath(path)} cannot be written: {why}") from error
        with self._lock:
            self._writer = _Writer(file, os.fspath(path), self._opened(), self._num_ranks, max_bytes)
        logger.info("writing a trace to %s", os.fspath(path))

    def stop(self) -> TraceSummary | None:
        """Writes what there is and ends the file, which takes some hundredths of a second. Returns what has
        become of the last one; None: there was none."""
        writer = self._writer  # which it stays until it is over: no other one may begin before
        if writer is not None:
            summary = writer.stop()
            with self._lock:
                if self._writer is writer:
                    self._writer, self.last = None, summary
        return self.last

    def close(self) -> None:
        """Stops, and gives the memory back, once there are no processes. Two may do so at once: who stops a
        runtime that starts, and the start that was stopped."""
        self.stop()
        with self._lock:
            rings, self._rings = self._rings, None
        if rings is not None:
            rings.close()

    # --------------------------------------------------------------------- from the event loop

    def on_request_end(self, record: RequestRecord) -> None:
        """See `Listener`."""
        if self._writer is not None:
            self._writer.add(partial(Timeline.request, record=record))

    def cut(self, record: RequestRecord) -> None:
        """A request is open still, when the trace is about to end."""
        if self._writer is not None:
            self._writer.add(partial(Timeline.request, record=record, is_open=True))

    def span(self, group: str, name: str, begun: int, ended: int, args: Args) -> None:
        """Something took from `begun` to `ended`, ns of CLOCK_MONOTONIC."""
        if self._writer is not None:
            self._writer.add(
                partial(Timeline.span, group=group, name=name, begun=begun, ended=ended, args=args)
            )

    def on_event(self, event: RuntimeEvent) -> None:
        """See `Listener`."""
        now = time.monotonic_ns()
        if event.kind == "lost" and self._lost_at is None:
            self._lost_at = now
        begun = self._lost_at if self._lost_at is not None else now
        if event.kind in ("recovered", "given_up"):
            self._lost_at = None
        if self._writer is None:
            return
        args = {"process": event.process, "summary": event.summary, "generation": event.generation}
        self._writer.add(partial(Timeline.instant, now=now, name=f"{event.kind} {event.process}", args=args))
        if event.kind in ("recovered", "given_up"):
            args = {**args, "ended": event.kind, "requests": event.requests}
            self._writer.add(partial(Timeline.recovery, begun=begun, ended=now, args=args))


class _Writer:
    """One file, and the thread that writes it."""

    def __init__(self, file: BinaryIO, path: str, rings: Rings, num_ranks: int, max_bytes: int) -> None:
        self.is_over = False
        self._file = file
        self._path = path
        self._rings = rings
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_dropped = 0
        self._is_full = False
        self._lost_before = rings.lost()
        self._num_events = 0
        self._timeline = Timeline(num_ranks, time.monotonic_ns())
        self._others: deque[Callable[[Timeline], str]] = deque()
        self._stopping = threading.Event()
        rings.switch(True)
        self._thread = threading.Thread(target=self._run, name="tpworker-trace", daemon=True)
        self._thread.start()

    def add(self, make: Callable[[Timeline], str]) -> None:
        """Something besides what is in the rings."""
        if self.is_over or len(self._others) >= _MOST_WAITING:
            self._num_dropped += 1
        else:
            self._others.append(make)

    def stop(self) -> TraceSummary:
        """Waits for the end of the file. Nobody adds anything meanwhile."""
        self._stopping.set()
        self._thread.join()
        return TraceSummary(self._path, self._num_events, self._num_lost, self._num_bytes, self._is_full)

    @property
    def _num_lost(self) -> int:
        return self._num_dropped + self._rings.lost() - self._lost_before

    # ----------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            with self._file:
                self._write(self._timeline.header(os.getpid()))
                while not self._is_full and not self._stopping.wait(TICK_SECONDS):
                    self._take()
                self._rings.switch(False)
                for _ in range(0 if self._is_full else 2):  # what was in the making
                    time.sleep(TICK_SECONDS)
                    self._take()
                self._num_dropped += len(self._others)
                footer = self._timeline.footer(time.monotonic_ns(), self._num_lost, self._is_full)
                self._write(footer, is_last=True)
            self._say()
        except Exception as error:
            self._rings.switch(False)
            logger.error("the trace %s ends, as it cannot be written: %s", self._path, error)
        finally:
            self.is_over = True

    def _take(self) -> None:
        """Writes what has come since the last time."""
        parts: list[str] = []
        for number, text in enumerate(self._texts(), 1):
            parts.append(text)
            if number % _AT_ONCE == 0:
                self._write("".join(parts))
                parts.clear()
                if self._is_full:
                    return
                time.sleep(_TURN_SECONDS)
        if parts:
            self._write("".join(parts))

    def _texts(self) -> Iterator[str]:
        for record in self._rings.drain():
            yield self._timeline.of(record)
        for _ in range(len(self._others)):
            try:
                yield self._others.popleft()(self._timeline)
            except (TypeError, ValueError):  # what a caller has given is nothing that JSON can say
                self._num_dropped += 1

    def _write(self, text: str, is_last: bool = False) -> None:
        data, num_events = text.encode(), text.count("},\n") + is_last
        if not is_last and self._num_bytes + len(data) > self._max_bytes - _LEAST_BYTES // 2:
            self._is_full = True
            self._num_dropped += num_events
            return
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._num_bytes += len(data)
        self._num_events += num_events

    def _say(self) -> None:
        name, size = self._path, self._num_bytes / (1 << 20)
        if self._is_full:
            logger.warning("the trace %s is full with %.1f MiB: what comes now is not in it", name, size)
        elif self._num_lost:
            lost = self._num_lost
            logger.warning("of the trace %s, %d records were dropped: they came too quickly", name, lost)
        logger.info("the trace %s has %d events, %.1f MiB", name, self._num_events, size)
