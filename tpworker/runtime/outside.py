"""A rank's standby that somebody else has started, as the runtime sees it. Its own side is ipc/outside.py."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess

from tpworker.ipc.child import OUTSIDE_STANDBY
from tpworker.ipc.codec import MessageError
from tpworker.ipc.forks import close_in_forks
from tpworker.ipc.joining import BYE, LEFT, Hello
from tpworker.runtime.children import oom_kills_since
from tpworker.runtime.faults import Ending
from tpworker.runtime.standby import KILL_SECONDS, AnyStandby

logger = logging.getLogger(__name__)

STARTING_SECONDS = 0.5
"""How long one that still imports may take to end before it is left to itself."""

_MAX_REASON = 1000  # characters


class OutsideProcess:
    """A process that somebody else has started, and reaps: as much of `subprocess.Popen` as standbys need."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)  # which no later process of that number is meant by

    def poll(self) -> int | None:
        """None while it runs; 0 when it has ended, whichever its status is, which nobody here is told."""
        return 0 if self._fd < 0 or self._ends_within(0) else None

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end. Raises subprocess.TimeoutExpired."""
        if self._fd >= 0 and not self._ends_within(timeout):
            raise subprocess.TimeoutExpired([f"pid {self.pid}"], timeout or 0)
        return 0

    def kill(self) -> None:
        """SIGKILL; nothing if it is dead already."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Nothing happens if it is dead already."""
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        """From now on it counts as ended."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _ends_within(self, timeout: float | None) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))


class OutsideStandby(AnyStandby):
    """The standby of one rank, which has joined. `close` it.

    Args:
        rank: its rank.
        hello: what it said of itself.
        gpu: the UUID of its GPU; '': it needs none.
        control: the connection to it.

    Raises:
        OSError: it is gone.
    """

    def __init__(self, rank: int, hello: Hello, gpu: str, control: socket.socket) -> None:
        super().__init__(OUTSIDE_STANDBY.format(rank), control)
        self.rank = rank
        self.gpu = gpu
        self.reachable = frozenset(hello.reachable)
        self.cpus = frozenset(hello.cpus)
        self.why_left = ""
        """What it said when it left."""
        self.process = self._outside = OutsideProcess(hello.pid)
        close_in_forks(self)

    def leave_to_parent(self) -> None:
        """See `forks.Holder`."""
        self._control.close()
        self._outside.close()

    def _take(self, data: bytes) -> None:
        if data.startswith(LEFT):
            self.why_left = data.removeprefix(LEFT).decode(errors="replace")[:_MAX_REASON]
            self.silent = True
        else:
            super()._take(data)

    @property
    def ending(self) -> Ending:
        if self.report is not None:
            return super().ending
        how = (
            f"has left: {self.why_left}"
            if self.why_left
            else "has ended without a word: it was killed, perhaps"
        )
        left = f"(pid {self.process.pid}, started from outside) {how}"
        return Ending(self.name, None, None, oom_kills_since(self._oom_kills), left=left)

    def dismiss(self, why: str) -> None:
        """Tells it that the runtime has ended, and, if that failed, why; '': it did not."""
        with contextlib.suppress(OSError):  # it is gone
            self._control.send(BYE + why.encode()[:_MAX_REASON])
        with contextlib.suppress(OSError, MessageError):
            self.read()
        if not self.is_ready:  # it imports, and hears a signal only
            self._outside.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """To be called after `dismiss`, or when it has ended. One that still imports is not waited for: it
        has nothing of ours, and will find that the runtime has ended."""
        is_gone = self.wait(KILL_SECONDS if self.is_ready else STARTING_SECONDS)
        if not is_gone and self.is_ready:
            logger.error("%s (pid %d) does not end, and is killed", self.name, self.process.pid)
            self.kill()
            self.wait(KILL_SECONDS)
        self._control.close()
        self._outside.close()
