"""The life of a standby that somebody else has started, beside what every standby does (standby.py).

It ends with the runtime, with whoever started it, and when it is told to (SIGTERM); it says why to those who
may want to know, and by its status: 0 where that was asked for, 1 where the runtime failed or is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from types import FrameType
from typing import NoReturn

from tpworker.ipc.joining import BYE, LEFT
from tpworker.ipc.streams import leave

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Any of them means that it is to leave."""

_MAX_BYTES = 1 << 17


class Outside:
    """What is particular to such a standby. From its making on signals end the process, and so does the end
    of its launcher, for whoever polls `launcher_fd`.

    Args:
        control: the connection to the runtime.
        launcher: the pid of the process that started this one; 0: nobody's end is of interest.
    """

    def __init__(self, control: socket.socket, launcher: int) -> None:
        self._control = control
        self._launcher = launcher
        self._pid = os.getpid()
        self.launcher_fd: int | None = None
        """Readable once the launcher has ended; None: there is none."""
        if launcher:
            with contextlib.suppress(OSError):  # it cannot be seen from here, or has ended: see below
                self.launcher_fd = os.pidfd_open(launcher)
            if os.getppid() != launcher:
                self.lose_launcher()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see cli/rank.py

    def lose_launcher(self) -> NoReturn:
        """Ends the process, as whoever started it has ended."""
        self.leave(f"pid {self._launcher}, which started it, has ended")

    def leave(self, why: str) -> NoReturn:
        """Ends the process, which the runtime is told; unless that has ended before, which counts then."""
        with contextlib.suppress(BlockingIOError):
            while (data := self._read()) and not data.startswith(BYE):
                pass  # a child that nobody gets any more
            self.end(data)
        with contextlib.suppress(OSError):
            self._control.send(LEFT + why.encode(), socket.MSG_DONTWAIT)
        logger.warning("leaves: %s", why)
        leave(0)

    def end(self, data: bytes) -> NoReturn:
        """Ends the process, as the runtime has ended: it said so (`BYE`), or is gone without a word (b'')."""
        if not data:
            logger.error("the runtime is gone: the connection to it is closed")
            leave(1)
        if reason := data.removeprefix(BYE).decode(errors="replace"):
            logger.error("the runtime has failed: %s", reason)
            leave(1)
        logger.info("the runtime has been stopped")
        leave(0)

    def leave_to_parent(self) -> None:
        """In a child that was forked: its ends are not this one's."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.launcher_fd is not None:
            os.close(self.launcher_fd)

    def _read(self) -> bytes:
        try:
            return self._control.recv(_MAX_BYTES, socket.MSG_DONTWAIT)
        except ConnectionError:
            return b""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:  # and not a child that has not forgotten it yet
            self.leave(f"it was sent {signal.Signals(number).name}")
