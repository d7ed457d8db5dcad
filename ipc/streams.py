"""Standard streams that cannot end a process, and the end of one that nothing can hold up.

A server outlives what it was started from: the terminal that its stderr goes to is closed, the disk fills up,
the program that reads its log ends, or stops reading. What is written then is lost, and nothing else is.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

STALL_SECONDS = 1.0
"""How long a reader that has stopped reading is waited for, once; then what finds no room is lost."""


def open_standard_descriptors() -> None:
    """Opens /dev/null as 0, 1 and 2, those of them that are closed. The next file to be opened would be one
    of them otherwise, shared memory or a socket of ours, and get what is written to the terminal."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def make_stderr_safe() -> None:
    """From now on nothing that is written to `sys.stderr` raises, or waits for longer than STALL_SECONDS."""
    open_standard_descriptors()
    sys.stderr = _safe_stream(2, sys.stderr)
    if sys.stdout is None:  # it was closed: whoever prints shall find what is there now
        sys.stdout = _safe_stream(1, None)


def make_output_safe() -> None:
    """The same for `sys.stdout` besides: for a process whose output is nothing but a log."""
    make_stderr_safe()
    sys.stdout = _safe_stream(1, sys.stdout)


def _safe_stream(fd: int, instead: TextIO | None) -> io.TextIOWrapper:
    encoding = "utf-8" if instead is None else instead.encoding
    binary = io.BufferedWriter(_Lossy(fd))
    return io.TextIOWrapper(binary, encoding, errors="backslashreplace", line_buffering=True)


def leave(status: int) -> NoReturn:
    """Ends the process once its logs are out, without running exit handlers: threads and native libraries
    that hang there would keep it alive."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # nobody listens at the other end any more
                stream.flush()
    os._exit(status)


class _Lossy(io.FileIO):
    """A descriptor that takes whatever is written to it; what does not get through is lost."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._patience = STALL_SECONDS

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        with contextlib.suppress(OSError):
            rest = view
            # A pipe that has room has it for so much: writing does not wait for its reader.
            while len(rest) and self._has_room():
                rest = rest[super().write(rest[: select.PIPE_BUF]) or len(rest) :]
        return len(view)

    def _has_room(self) -> bool:
        has_room = bool(self._poll.poll(self._patience * 1000))
        self._patience = STALL_SECONDS if has_room else 0.0
        return has_room
