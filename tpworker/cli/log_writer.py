"""The handler that writes the command line's log: whoever logs never waits for who reads.

    any thread ─► emit: one line more, or one more lost ─► [up to MAX_BYTES] ─► a thread of its own ─► stderr

A pipe whose reader has stopped, a terminal held by Ctrl-S and a disk that is full stop that thread and nobody
else. How many lines were lost meanwhile is written when there is room again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Sequence
from itertools import accumulate

MAX_BYTES = 4 << 20
"""Of lines that wait to be written: some 10,000. What comes on top is lost, and counted."""
_TOGETHER = 64 << 10  # bytes that are written with one call
_END_S = 1.0  # how long the end waits for lines that are not written yet
_POLL_MS = 1000
_FULL_S = 0.2  # between two attempts at a disk that is full, or whatever else refuses what is written


class LogWriter(logging.Handler):
    """Writes lines to a descriptor, in order. `close` it; its thread starts with the first line.

    Args:
        fd: open for as long as this is.
        max_bytes: see MAX_BYTES.
    """

    def __init__(self, fd: int, max_bytes: int = MAX_BYTES) -> None:
        super().__init__()
        self._fd = fd
        self._max_bytes = max_bytes
        self._changed = threading.Condition(threading.Lock())
        self._lines: list[bytes] = []
        self._num_bytes = 0  # of these, and of those that are being written
        self._num_lost = 0  # since that was told
        self._is_closed = False
        self._is_torn = False  # the last line that was written has no end
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record's line, or counts it as lost. Never waits."""
        try:
            line = self.format(record).encode(errors="backslashreplace") + b"\n"
        except Exception:
            self.handleError(record)
            return
        with self._changed:
            if self._is_closed or self._num_bytes + len(line) > self._max_bytes:
                self._num_lost += 1
                return
            self._num_bytes += len(line)
            self._lines.append(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tpworker-log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all lines are written; a second at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or not self._num_bytes, _END_S)

    def close(self) -> None:
        """Writes what waits, if that takes no longer than a second; takes no more."""
        self.flush()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        super().close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._is_closed)
                if not self._lines:
                    return
                lines, self._lines = self._lines, []
            while lines:
                num_now = _num_together(lines)
                self._write(lines[:num_now])
                del lines[:num_now]

    def _write(self, lines: Sequence[bytes]) -> None:
        """Some of the lines that were taken, and behind them how many could not be."""
        num_written = self._write_all(lines)
        with self._changed:
            self._num_lost += len(lines) - num_written
            num_lost, self._num_lost = (self._num_lost, 0) if num_written else (0, self._num_lost)
        if num_lost and not self._write_all([self._told(num_lost)]):
            with self._changed:
                self._num_lost += num_lost
        with self._changed:
            self._num_bytes -= sum(map(len, lines))
            self._changed.notify_all()

    def _write_all(self, lines: Sequence[bytes]) -> int:
        """How many of the lines got through as a whole."""
        before = b"\n" if self._is_torn else b""
        data = before + b"".join(lines)
        num_written = 0
        while num_written < len(data):
            try:
                num_written += os.write(self._fd, memoryview(data)[num_written:])
            except BlockingIOError:  # whoever gave us the descriptor wants that nobody waits on it
                _wait_for_room(self._fd)
            except OSError:  # nobody reads any more, the disk is full
                time.sleep(_FULL_S)  # so that a flood of lines does not become one of attempts
                break
        if num_written:
            self._is_torn = data[num_written - 1] != ord("\n")
        ends = accumulate(map(len, lines), initial=len(before))
        return sum(end <= num_written for end in ends) - 1 if num_written else 0

    def _told(self, num_lost: int) -> bytes:
        lines = "1 line" if num_lost == 1 else f"{num_lost} lines"
        text = (
            f"{lines} of the log could not be written: whoever reads it did not keep up, or the disk is full"
        )
        record = logging.LogRecord("tpworker.logs", logging.WARNING, __file__, 0, text, None, None)
        return self.format(record).encode(errors="backslashreplace") + b"\n"


def _num_together(lines: Sequence[bytes]) -> int:
    """How many of the first are written with one call."""
    num_bytes = 0
    for number, line in enumerate(lines):
        num_bytes += len(line)
        if num_bytes > _TOGETHER:
            return max(1, number)
    return len(lines)


def _wait_for_room(fd: int) -> None:
    poll = select.poll()
    with contextlib.suppress(OSError):
        poll.register(fd, select.POLLOUT)
        poll.poll(_POLL_MS)
