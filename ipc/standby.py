"""A standby: a process that has imported what others like it need, and is forked for each of them.

    parent                                           standby
      ├── control socket (its stdin): requests ───────►│  a message each, with descriptors
      │◄── control socket: that it is ready ───────────┤  or why it never will be
      │                                                ├── fork ──► child
      │◄── status socket, one a child: pid, status ────┤              │  PDEATHSIG: it ends with the standby
      ├── lifeline and report pipe, one a child ───────┼──────────────┤  nothing else comes from either
      │    … the status socket is shut ───────────────►│  and only now the child is reaped

So its pid is nobody else's for as long as the parent may want to send it a signal. A standby has one thread,
which sleeps in the kernel; forking it is safe, and takes milliseconds where importing torch takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from tpworker.ipc.codec import MessageError, Within, pack_dataclass, unpack_dataclass
from tpworker.ipc.joining import BYE
from tpworker.ipc.outside import Outside
from tpworker.ipc.streams import leave

MAX_BOOT_BYTES = 1 << 16

_MAX_DESCRIPTORS = 64
_MAX_REQUEST_BYTES = MAX_BOOT_BYTES + (1 << 14)


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """What a standby is asked: a child, with its boot message and the CPUs that it keeps to (none: any).

    With it come a status socket, the lifeline, the report pipe, and the descriptors of the boot message.
    """

    boot: Annotated[bytes, Within(1, MAX_BOOT_BYTES)]
    cpus: tuple[Annotated[int, Within(0, 1 << 16)], ...] = ()

    def send(self, control: socket.socket, descriptors: list[int]) -> None:
        """Asks. Raises OSError: the standby is gone, or too many requests wait for it already."""
        if len(descriptors) > _MAX_DESCRIPTORS:
            raise ValueError(f"{len(descriptors)} descriptors; the limit is {_MAX_DESCRIPTORS}")
        socket.send_fds(control, [pack_dataclass(self)], descriptors)


@dataclass(frozen=True, slots=True)
class Forked:
    """What a child has, right after it was forked."""

    request: ForkRequest
    standby: int  # its parent's pid
    lifeline: int
    report_fd: int
    descriptors: list[int]  # in the order of the boot message's fields


def take_control() -> socket.socket:
    """The control socket that is our stdin, which is /dev/null from now on.

    Raises:
        MessageError: it is none.
    """
    try:
        control = socket.socket(fileno=os.dup(0))
        control.getpeername()
    except OSError:
        raise MessageError("no control socket on stdin: only tpworker itself starts this program") from None
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # nothing else shall read from the socket
    os.close(null)
    return control


def serve(
    control: socket.socket, refuse: Callable[[int, BaseException], None], outside: Outside | None = None
) -> Forked:
    """The life of a standby. It returns in the children only: the standby ends in here, with its parent.

    Args:
        refuse: told why there will be no child, and the report pipe that the child would have had.
        outside: of a standby that somebody else has started.
    """
    return _ForkServer(control, refuse, outside).serve()


@dataclass(eq=False, slots=True)
class _Record:
    """A child that is not reaped."""

    pid: int
    status: socket.socket | None  # None: nobody wants to know any more
    is_told: bool = False  # that it has ended


class _ForkServer:
    def __init__(
        self, control: socket.socket, refuse: Callable[[int, BaseException], None], outside: Outside | None
    ) -> None:
        self._control = control
        self._refuse = refuse
        self._outside = outside
        self._records: list[_Record] = []
        self._wake_receiver, self._wake_sender = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._wake_sender, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._poll = select.poll()
        self._poll.register(self._control, select.POLLIN)
        self._poll.register(self._wake_receiver, select.POLLIN)
        self._launcher_fd = None if outside is None else outside.launcher_fd
        if self._launcher_fd is not None:
            self._poll.register(self._launcher_fd, select.POLLIN)

    def serve(self) -> Forked:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._wake_receiver:
                    os.read(fd, 1 << 12)
                    self._tell_endings()
                elif fd == self._launcher_fd and self._outside is not None:
                    self._outside.lose_launcher()
                elif fd != self._control.fileno():
                    self._release(fd)
                elif (forked := self._take_request()) is not None:
                    return forked

    def _take_request(self) -> Forked | None:
        """Forks. In the child: what it has; in the standby: None."""
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._control, _MAX_REQUEST_BYTES, _MAX_DESCRIPTORS)
        except ConnectionResetError:  # the parent has not even read what we said
            data, descriptors, flags = b"", [], 0
        if not data or data.startswith(BYE):  # the parent is gone; the kernel ends our children
            if self._outside is not None:
                self._outside.end(data)
            leave(0)
        for fd in descriptors:
            os.set_inheritable(fd, False)  # EOF must mean that a child is gone, not what it has started
        try:
            return self._fork(data, descriptors, bool(flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)))
        except (OSError, MessageError) as error:
            if len(descriptors) > 2:
                self._refuse(descriptors[2], error)
            for fd in descriptors:
                os.close(fd)
            return None

    def _fork(self, data: bytes, descriptors: list[int], is_cut: bool) -> Forked | None:
        if is_cut or len(descriptors) < 3:
            raise MessageError("a request that has lost descriptors: too many files are open (ulimit -n)")
        request = unpack_dataclass(ForkRequest, data)
        status = socket.socket(fileno=os.dup(descriptors[0]))
        if _is_shut(status):  # whoever asked does not want it any more
            status.close()
            for fd in descriptors:
                os.close(fd)
            return None
        standby = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            status.close()
            raise
        if pid == 0:
            self._forget(status, descriptors[0])
            return Forked(request, standby, descriptors[1], descriptors[2], descriptors[3:])
        for fd in descriptors:
            os.close(fd)
        _tell(status, pid)
        self._records.append(_Record(pid, status))
        self._poll.register(status, select.POLLIN)
        return None

    def _forget(self, status: socket.socket, fd: int) -> None:
        """In a child: closes what belongs to the standby and to other children."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._outside is not None:
            self._outside.leave_to_parent()
        for record in self._records:
            if record.status is not None:
                record.status.close()
        for other in (self._wake_receiver, self._wake_sender, fd):
            os.close(other)
        status.close()
        self._control.close()

    def _tell_endings(self) -> None:
        for record in list(self._records):
            if record.is_told:
                continue
            ended = os.waitid(os.P_PID, record.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                continue
            record.is_told = True
            if record.status is None:
                self._reap(record)
            else:
                has_left = ended.si_code == os.CLD_EXITED
                _tell(record.status, ended.si_status if has_left else -ended.si_status)

    def _release(self, fd: int) -> None:
        """The parent has shut a child's status socket: it sends no more signals to it."""
        self._poll.unregister(fd)
        for record in list(self._records):
            if record.status is not None and record.status.fileno() == fd:
                record.status.close()
                record.status = None
                if record.is_told:
                    self._reap(record)

    def _reap(self, record: _Record) -> None:
        os.waitpid(record.pid, 0)
        self._records.remove(record)


def _is_shut(status: socket.socket) -> bool:
    poll = select.poll()
    poll.register(status, select.POLLIN)
    return bool(poll.poll(0))  # nothing is ever sent to us by it


def _tell(status: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the parent is gone
        status.send(number.to_bytes(8, "little", signed=True), socket.MSG_DONTWAIT)


def read_told(data: bytes) -> int:
    """A number that came through a status socket: first the child's pid, then its status."""
    return int.from_bytes(data, "little", signed=True)
