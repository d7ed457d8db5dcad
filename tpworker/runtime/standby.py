"""Processes to fork others from, which live as long as the runtime: one for schedulers, one for ranks.

A standby is started by exec and imports what its children need, which takes seconds. A child is forked from
it in milliseconds, has those imports, and shares the memory that they take. A standby's own side is
ipc/standby.py.

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
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future

from tpworker.ipc.child import (
    RANK_STANDBY,
    READY,
    SCHEDULER_STANDBY,
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


class Standby:
    """A standby process, started at once. `close` it.

    `fork`, `read`, `over` and `ending` belong to one thread at a time: that of the generation that is there.

    Args:
        name: what it is called.
        module: what it runs (`python -m`): imports, then `run_child`.
        device: 'cpu' or 'cuda': what its children will use.
        arguments: more of the command line.
        descriptors: which it inherits, by the same numbers.

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
    ) -> None:
        self.name = name
        self.is_ready = False
        """Whether it has imported everything."""
        self.report: Report | None = None
        """Why it will never be ready."""
        self.silent = False
        """Nothing more will come from it: it ends, or has."""
        self._is_killed = False  # by us: it may live for a moment, and is of no use
        self._oom_kills = count_oom_kills()
        self._closing = threading.Event()
        with GUARD:
            self._start(module, device, arguments, descriptors)
            close_in_forks(self)

    def _start(self, module: str, device: str, arguments: Sequence[str], descriptors: Sequence[int]) -> None:
        """Has a thread start the process."""
        name = self.name
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        started: Future[subprocess.Popen[bytes]] = Future()

        def stay() -> None:
            """PDEATHSIG ends a process with the *thread* that started it: so this one stays."""
            try:
                started.set_result(_execute(name, module, device, arguments, descriptors, theirs))
            except BaseException as error:
                started.set_exception(error)
            else:
                self._closing.wait()

        self._thread = threading.Thread(target=stay, name=name, daemon=True)
        self._thread.start()
        try:
            self.process = started.result()
        except BaseException:
            self._thread.join()
            self._control.close()
            raise
        finally:
            theirs.close()

    def leave_to_parent(self) -> None:
        """See `forks.Holder`."""
        self._control.close()
        self.process.returncode = 0  # a process of the parent's: not to be waited for here, and not killed

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

    def read(self) -> None:
        """Takes what it says of itself."""
        while not self.silent:
            try:
                data = self._control.recv(_MAX_ANNOUNCED)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it has ended over requests that it never read; what it said before comes next
            if data == READY:
                self.is_ready = True
            elif data:
                self.report = unpack_dataclass(Report, data)
            else:
                self.silent = True

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

    def close(self) -> None:
        """Ends it, and what is left of its children; waits until it is gone. Once more does no harm."""
        self.kill()
        if not self.wait(KILL_SECONDS):
            logger.error("%s (pid %d) was killed, but does not end", self.name, self.process.pid)
        self._closing.set()
        self._thread.join()
        self._control.close()


def _execute(
    name: str,
    module: str,
    device: str,
    arguments: Sequence[str],
    descriptors: Sequence[int],
    control: socket.socket,
) -> subprocess.Popen[bytes]:
    log = log_descriptor()
    log_level = logging.getLogger("tpworker").getEffectiveLevel()
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, name, device, format_in_use(), str(log_level), *arguments],
        stdin=control.fileno(),
        stdout=log,  # our own standard output may be somebody's data
        stderr=log,
        pass_fds=descriptors,
        env=child_environment(device),
        # Keys typed in a terminal (Ctrl-C, Ctrl-Z) are signals to all of a session: they are for us.
        start_new_session=True,
    )


class Standbys:
    """The standbys of a runtime. Nothing is started before `start`; `close` them.

    All methods may be called from any thread; but see `Standby`, which serves one generation at a time.

    Args:
        scheduler_module, rank_module: what they run.
        device: 'cpu' or 'cuda'.
    """

    def __init__(self, scheduler_module: str, rank_module: str, device: str) -> None:
        self._device = device
        self._modules = {SCHEDULER_STANDBY: scheduler_module, RANK_STANDBY: rank_module}
        self._standbys: dict[str, Standby] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def start(self) -> tuple[Standby, Standby]:
        """Starts those that do not live, or stand still, which may take some seconds to import; returns the
        schedulers' and the ranks'.

        Raises:
            OSError: one cannot be started; or they have been closed.
        """
        with self._lock:
            if self._is_closed:
                raise OSError("the standbys have been closed")
            for name, module in self._modules.items():
                standby = self._standbys.get(name)
                if standby is not None:
                    if standby.is_alive and not standby.stands_still():
                        continue
                    del self._standbys[name]
                    standby.close()
                self._standbys[name] = Standby(name, module, self._device)
            return self._standbys[SCHEDULER_STANDBY], self._standbys[RANK_STANDBY]

    def close(self) -> None:
        """Ends them, and waits until they are gone. Once more does no harm."""
        with self._lock:
            self._is_closed = True
            for standby in self._standbys.values():
                standby.close()
            self._standbys.clear()
