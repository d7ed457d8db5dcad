"""Processes to fork others from, which live as long as the runtime: one for schedulers, one for ranks.

A standby is started by exec and imports what its children need, which takes seconds. A child is forked from
it in milliseconds, has those imports, and shares the memory that they take. A standby's own side is
ipc/standby.py. Those of ranks that are started from outside are in joining.py.

    Runtime ── Standbys ──┬── tpworker-scheduler-standby ──► tpworker-scheduler     one a generation
                          └── tpworker-rank-standby ───────► tpworker-rank0…N
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from typing import Protocol

from tpworker.ipc.child import (
    READY,
    RankBoot,
    Report,
    SchedulerBoot,
    descriptors_of,
    pack_boot,
)
from tpworker.ipc.codec import unpack_dataclass
from tpworker.ipc.forks import GUARD, close_in_forks
from tpworker.ipc.patience import Patience
from tpworker.ipc.spawn import child_environment, log_descriptor
from tpworker.ipc.standby import ForkRequest
from tpworker.logs import format_in_use
from tpworker.runtime.children import Child, count_oom_kills, is_stopped, oom_kills_since
from tpworker.runtime.faults import Ending

logger = logging.getLogger(__name__)

KILL_SECONDS = 10.0
"""How long a standby that was killed may take to end."""
STOPPED_SECONDS = 1.0
"""How long a standby may stand still, by SIGSTOP, when it is needed."""

_MAX_ANNOUNCED = 1 << 17
_SEND_BUFFER = 1 << 20  # bytes, as many as the kernel allows: the ranks' requests while it still imports


class Process(Protocol):
    """What standbys need of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class AnyStandby:
    """A standby process, whoever has started it.

    `fork`, `read`, `over` and `ending` belong to one thread at a time: that of the generation that is there.

    Args:
        name: what it is called.
        control: a socket whose other end is its control socket.
    """

    process: Process
    cpus: AbstractSet[int] | None = None
    """Those that it may use; None: as many as this process."""
    gpu = ""
    """The UUID of its GPU; '': as its children are numbered."""

    def __init__(self, name: str, control: socket.socket) -> None:
        self.name = name
        self.is_ready = False
        """Whether it has imported everything."""
        self.report: Report | None = None
        """Why it will never be ready."""
        self.silent = False
        """Nothing more will come from it: it ends, or has."""
        self._is_killed = False  # by us: it may live for a moment, and is of no use
        self._oom_kills = count_oom_kills()
        self._control = control
        self._control.setblocking(False)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def fileno(self) -> int:
        """Readable when there is something to `read`."""
        return self._control.fileno()

    def fork(self, boot: SchedulerBoot | RankBoot, cpus: AbstractSet[int] | None = None) -> Child:
        """Asks for a child, and returns before it is there. If the standby is dead, so is the child.

        Args:
            boot: what the child is told. The descriptors that it names, in all fields `*_fd`, are those of
                this process here, and the child's own there; `report_fd` is filled in.
            cpus: the CPUs that the child keeps to; None: those that the standby was started on.

        Raises:
            OSError: no pipe or socket can be made, or the standby takes no more requests.
        """
        self._oom_kills = count_oom_kills()
        with GUARD, contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            status, their_status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.callback(status.close)
            theirs.callback(their_status.close)
            their_lifeline, lifeline = os.pipe2(os.O_CLOEXEC)
            theirs.callback(os.close, their_lifeline)
            ours.callback(os.close, lifeline)
            report_fd, their_report = os.pipe2(os.O_CLOEXEC)
            theirs.callback(os.close, their_report)
            ours.callback(os.close, report_fd)
            request = ForkRequest(pack_boot(boot), tuple(sorted(cpus or ())))
            descriptors = [their_status.fileno(), their_lifeline, their_report, *descriptors_of(boot)]
            with contextlib.suppress(ConnectionError):  # dead, as everybody will see who looks
                request.send(self._control, descriptors)
            status.setblocking(False)
            os.set_blocking(report_fd, False)
            ours.pop_all()
            return Child(boot.name, self, status, report_fd, lifeline)

    def num_sharing(self, ranks: Sequence[AnyStandby]) -> int:
        """How many of the ranks that have these standbys may run on CPUs where this one's may."""
        return sum(1 for other in ranks if not (self.cpus and other.cpus) or self.cpus & other.cpus)

    def read(self) -> None:
        """Takes what it says of itself."""
        while not self.silent:
            try:
                data = self._control.recv(_MAX_ANNOUNCED)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it has ended over requests that it never read; what it said before comes next
            if not data:
                self.silent = True
            else:
                self._take(data)

    def _take(self, data: bytes) -> None:
        if data == READY:
            self.is_ready = True
        else:
            self.report = unpack_dataclass(Report, data)

    @property
    def over(self) -> bool:
        """Whether it has ended, or is about to."""
        return self.silent or self.report is not None or self.process.poll() is not None

    @property
    def is_alive(self) -> bool:
        """Whether children can still be forked from it. May be asked from any thread."""
        return not self.over and not self._is_killed

    def stands_still(self) -> bool:
        """Whether somebody has stopped it, and does not let it go on within `STOPPED_SECONDS`."""
        patience = Patience(STOPPED_SECONDS)
        while is_stopped(self.process.pid):
            if not patience.left():  # to wait for a child of its would take a whole start's deadline
                logger.error("%s is stopped (SIGSTOP or a debugger), and will be killed", self.name)
                return True
            time.sleep(patience.slice())
        return False

    @property
    def ending(self) -> Ending:
        """How it ended, as far as it is known."""
        return Ending(self.name, self.process.poll(), self.report, oom_kills_since(self._oom_kills))

    def wait(self, timeout: float) -> bool:
        """Whether it has been reaped, within `timeout` seconds."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, and the kernel ends its children with it; nothing if it is dead already."""
        self._is_killed = True
        self.process.kill()


class Standby(AnyStandby):
    """A standby process of ours, started at once. `close` it.

    Args:
        name: what it is called.
        module: what it runs (`python -m`): imports, then `run_child`.
        device: 'cpu' or 'cuda': what its children will use.
        arguments: more of the command line.
        descriptors: which it inherits, by the same numbers.
        environment: variables that it has besides ours.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        name: str,
        module: str,
        device: str,
        arguments: Sequence[str] = (),
        descriptors: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._closing = threading.Event()
        with GUARD:
            control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            super().__init__(name, control)
            try:
                command = [module, name, device, *_log_arguments(), *arguments]
                variables = child_environment(device) | dict(environment or {})
                self._start(lambda: _execute(command, descriptors, theirs, variables))
            finally:
                theirs.close()
            close_in_forks(self)

    def _start(self, execute: Callable[[], subprocess.Popen[bytes]]) -> None:
        """Has a thread start the process."""
        started: Future[subprocess.Popen[bytes]] = Future()

        def stay() -> None:
            """PDEATHSIG ends a process with the *thread* that started it: so this one stays."""
            try:
                started.set_result(execute())
            except BaseException as error:
                started.set_exception(error)
            else:
                self._closing.wait()

        self._thread = threading.Thread(target=stay, name=self.name, daemon=True)
        self._thread.start()
        try:
            self._popen = self.process = started.result()
        except BaseException:
            self._thread.join()
            self._control.close()
            raise

    def leave_to_parent(self) -> None:
        """See `forks.Holder`."""
        self._control.close()
        self._popen.returncode = 0  # a process of the parent's: not to be waited for here, and not killed

    def close(self) -> None:
        """Ends it, and what is left of its children; waits until it is gone. Once more does no harm."""
        self.kill()
        if not self.wait(KILL_SECONDS):
            logger.error("%s (pid %d) was killed, but does not end", self.name, self.process.pid)
        self._closing.set()
        self._thread.join()
        self._control.close()


def _log_arguments() -> list[str]:
    return [format_in_use(), str(logging.getLogger("tpworker").getEffectiveLevel())]


def _execute(
    command: Sequence[str], descriptors: Sequence[int], control: socket.socket, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    log = log_descriptor()
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *command],
        stdin=control.fileno(),
        stdout=log,  # our own standard output may be somebody's data
        stderr=log,
        pass_fds=descriptors,
        env=environment,
        # Keys typed in a terminal (Ctrl-C, Ctrl-Z) are signals to all of a session: they are for us.
        start_new_session=True,
    )
