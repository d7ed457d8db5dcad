"""One child process, as the runtime's process sees it. Its own side is ipc/child.py.

It is a standby's child, not ours: the standby tells its pid and its status through a socket (ipc/standby.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
from pathlib import Path
from typing import Protocol

from tpworker.ipc.child import STACKS_SIGNAL, Report, read_report
from tpworker.ipc.forks import close_in_forks
from tpworker.ipc.patience import Patience
from tpworker.ipc.standby import read_told
from tpworker.observe.processes import letter_of
from tpworker.runtime.faults import Ending

logger = logging.getLogger(__name__)

_STATES = {
    "": "gone", "R": "running", "S": "sleeping", "D": "in the kernel",
    "T": "stopped", "t": "traced", "Z": "dead",
}  # fmt: skip


def state_of(pid: int | None) -> str:
    """What the kernel says that a process does, e.g. 'sleeping'; 'stopped' by SIGSTOP; 'gone' of none."""
    letter = letter_of(pid)
    return _STATES.get(letter, letter)


def is_stopped(pid: int | None) -> bool:
    """Whether somebody has stopped a process: SIGSTOP, or a debugger."""
    return state_of(pid) in ("stopped", "traced")


class Parent(Protocol):
    """What a child needs of the standby that it is forked from."""

    name: str
    is_ready: bool

    @property
    def over(self) -> bool: ...

    @property
    def is_alive(self) -> bool: ...

    def read(self) -> None: ...

    def kill(self) -> None: ...


class Child:
    """A process that a standby was asked for, until it is reaped. Belongs to one thread.

    Make it with `Standby.fork`.

    Args:
        status: told its pid, then its exit status. Non-blocking.
        report_fd: the read end of its report pipe. Non-blocking.
        lifeline: it ends when this is closed.
    """

    def __init__(
        self, name: str, parent: Parent, status: socket.socket, report_fd: int, lifeline: int
    ) -> None:
        self.name = name
        self.parent = parent
        self.status_socket = status
        self.report_fd = report_fd
        self._lifeline: int | None = lifeline
        self.pid: int | None = None
        """None while it is not known. While its standby lives, and before `close`, it is nobody else's."""
        self.status: int | None = None
        """Its exit status, negative the signal that killed it; None while it is not known."""
        self.is_lost = False
        """Nobody will tell its status any more: its standby has died, or has not forked it at all."""
        self.silent = False
        """Nothing will come out of its pipe any more."""
        self._data = b""
        self._oom_kills = count_oom_kills()
        close_in_forks(self)

    def leave_to_parent(self) -> None:
        """See `forks.Holder`."""
        self.status_socket.close()
        self._close_descriptors()
        self.pid, self.is_lost, self.silent = None, True, True  # no signal of ours reaches it

    @property
    def report(self) -> Report | None:
        """What it said of its end, as soon as that is here whole."""
        return read_report(self._data)[0]

    @property
    def stacks(self) -> str:
        """What it wrote of its stacks, when asked to."""
        return read_report(self._data)[1]

    @property
    def over(self) -> bool:
        """Whether it has ended, or has said why it is about to."""
        return self.silent or self.report is not None or self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether its status is known, or never will be."""
        return self.status is not None or self.is_lost

    @property
    def is_orphan(self) -> bool:
        """Whether it was lost, without a word, since its standby has ended."""
        return self.is_lost and self.report is None and self.parent.over

    @property
    def ending(self) -> Ending:
        """How it ended, as far as it is known."""
        return Ending(self.name, self.status, self.report, oom_kills_since(self._oom_kills))

    def read(self) -> None:
        """Takes what is in its pipe, at EOF of which it is `silent`, and what its standby has told of it."""
        while not self.silent:
            try:
                data = os.read(self.report_fd, 1 << 16)
            except BlockingIOError:
                break
            self._data += data
            self.silent = not data
        while not self.has_ended:
            try:
                told = self.status_socket.recv(64)
            except BlockingIOError:
                break
            except ConnectionError:
                told = b""
            if not told:
                self.is_lost = True
            elif self.pid is None:
                self.pid = read_told(told)
            else:
                self.status = read_told(told)

    def kill_parent(self) -> None:
        """Its standby, which does not tell how it has ended: it hangs."""
        if self.parent.is_alive:
            logger.error("%s hangs, and will be killed", self.parent.name)
            self.parent.kill()

    def wait(self, timeout: float) -> bool:
        """Whether it has ended, within `timeout` seconds, and its status come, if it ever will."""
        patience = Patience(timeout)
        poll = select.poll()
        poll.register(self.status_socket, select.POLLIN)
        self.read()
        while not self.has_ended and patience.left():
            poll.poll(patience.slice() * 1000)
            self.read()
        return self.has_ended

    def kill(self) -> None:
        """SIGKILL; nothing if it is dead already. If it is not forked yet, it never is, or ends at once."""
        self.read()
        if self.pid is not None and not self.is_lost:
            self._signal(signal.SIGKILL)
            return
        self._release()
        if self.is_lost:
            return  # the kernel has killed it with its standby
        self.parent.read()
        if not self.parent.is_ready:  # it has not looked at the request: when it does, it sees that we went
            self.is_lost = True

    def ask_for_stacks(self) -> None:
        """It will write the stacks of its threads into its pipe, even if it hangs (not if it is stopped)."""
        self._signal(STACKS_SIGNAL)

    def _signal(self, number: int) -> None:
        if self.pid is not None and not self.has_ended:
            with contextlib.suppress(ProcessLookupError):  # its standby has died, and it with it
                os.kill(self.pid, number)

    @property
    def state(self) -> str:
        """What the kernel says that it does, e.g. 'sleeping'; 'stopped' by SIGSTOP."""
        return state_of(self.pid)

    @property
    def stopped(self) -> bool:
        """See `is_stopped`."""
        return is_stopped(self.pid)

    @property
    def is_gone(self) -> bool:
        """Whether it runs no more, and has no memory any more, whether or not that has been told."""
        return self.has_ended if self.pid is None else self.state in ("dead", "gone")

    def close(self) -> None:
        """Frees what is held for it here, and has it reaped. If it lives still, it ends with its lifeline."""
        self._release()
        self.status_socket.close()
        self._close_descriptors()

    def _release(self) -> None:
        """From now on it is sent no signals."""
        with contextlib.suppress(OSError):  # its standby is gone
            self.status_socket.shutdown(socket.SHUT_WR)  # which tells, whoever else has been forked with it
        self._close_lifeline()

    def _close_lifeline(self) -> None:
        lifeline, self._lifeline = self._lifeline, None  # first: in a fork the number may soon be another's
        if lifeline is not None:
            os.close(lifeline)

    def _close_descriptors(self) -> None:
        self._close_lifeline()
        report_fd, self.report_fd = self.report_fd, -1
        if report_fd >= 0:
            os.close(report_fd)


def count_oom_kills() -> int | None:
    """How many processes the kernel has killed for want of memory since the machine was started."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def oom_kills_since(before: int | None) -> int | None:
    """How many more it is now than `count_oom_kills` was; None: the kernel does not tell."""
    now = count_oom_kills()
    return None if before is None or now is None else now - before
