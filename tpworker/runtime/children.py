"""One child process, as its parent sees it. Its own side is ipc/child.py."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path

from tpworker.ipc.child import (
    STACKS_SIGNAL,
    RankBoot,
    Report,
    SchedulerBoot,
    pack_boot,
    read_report,
)
from tpworker.ipc.patience import Patience
from tpworker.ipc.spawn import log_descriptor
from tpworker.runtime.faults import Ending

logger = logging.getLogger(__name__)

_STATES = {"R": "running", "S": "sleeping", "D": "in the kernel", "T": "stopped", "t": "traced", "Z": "dead"}


class Child:
    """A process that was started, until it is reaped. Belongs to one thread. Make it with `spawn`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], report_fd: int) -> None:
        self.name = name
        self.process = process
        self.report_fd = report_fd
        """The read end of its report pipe, non-blocking."""
        self.pidfd: int | None = None
        """Readable once it can be reaped. None where the kernel has no such thing: then the pipe must do."""
        with contextlib.suppress(OSError):
            self.pidfd = os.pidfd_open(process.pid)
        self.silent = False
        """Nothing will come out of its pipe any more."""
        self._data = b""
        self._oom_kills = _oom_kills()

    @classmethod
    def spawn(
        cls,
        module: str,
        boot: SchedulerBoot | RankBoot,
        descriptors: Sequence[int],
        environment: Mapping[str, str],
    ) -> Child:
        """Starts `python -m module` and hands it its boot message, in which `report_fd` is filled in here.

        The calling thread must live as long as the process shall (PDEATHSIG).

        Raises:
            OSError: it cannot be started.
        """
        log = log_descriptor()
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, boot.name],
                stdin=subprocess.PIPE,
                stdout=log,  # our own standard output may be somebody's data
                stderr=log,
                pass_fds=[*descriptors, write_end],
                env=environment,
                # Keys typed in a terminal (Ctrl-C, Ctrl-Z) are signals to all of a session: they are for us.
                start_new_session=True,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        os.set_blocking(read_end, False)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead already, which its report pipe will tell
            process.stdin.write(pack_boot(replace(boot, report_fd=write_end)))
            process.stdin.flush()
        return cls(boot.name, process, read_end)

    @property
    def status(self) -> int | None:
        """Its exit status, negative the signal that killed it; None while it is not reaped."""
        return self.process.poll()

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
        return self.silent or self.report is not None or self.status is not None

    @property
    def ending(self) -> Ending:
        """How it ended, as far as it is known."""
        before, now = self._oom_kills, _oom_kills()
        oom_kills = None if before is None or now is None else now - before
        return Ending(self.name, self.status, self.report, oom_kills)

    def read(self) -> None:
        """Takes what is in its pipe. At EOF it is `silent`."""
        while not self.silent:
            try:
                data = os.read(self.report_fd, 1 << 16)
            except BlockingIOError:
                return
            self._data += data
            self.silent = not data

    def wait(self, timeout: float) -> bool:
        """Whether it has been reaped, within `timeout` seconds."""
        patience = Patience(timeout)
        while True:
            try:
                self.process.wait(patience.slice())
                return True
            except subprocess.TimeoutExpired:
                if not patience.left():
                    return False

    def kill(self) -> None:
        """SIGKILL; nothing if it is dead already."""
        self.process.kill()

    def keep_to(self, cpus: AbstractSet[int]) -> None:
        """Has it run on these CPUs alone. Of threads that it has already only the first one will: call it
        right after `spawn`, while there is no other."""
        try:
            os.sched_setaffinity(self.process.pid, cpus)
        except OSError as error:  # they were taken from us meanwhile; or it is dead, as will be seen
            logger.warning("%s cannot be kept to its CPUs: %s", self.name, error)

    def ask_for_stacks(self) -> None:
        """It will write the stacks of its threads into its pipe, even if it hangs (not if it is stopped)."""
        self.process.send_signal(STACKS_SIGNAL)

    @property
    def state(self) -> str:
        """What the kernel says that it does, e.g. 'sleeping'; 'stopped' by SIGSTOP."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return "gone"
        letter = stat.rpartition(")")[2].split()[0]
        return _STATES.get(letter, letter)

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped it: SIGSTOP, or a debugger."""
        return self.state in ("stopped", "traced")

    def close(self) -> None:
        """Frees its descriptors; its lifeline too, so that it ends if it lives still."""
        os.close(self.report_fd)
        if self.pidfd is not None:
            os.close(self.pidfd)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def _oom_kills() -> int | None:
    """How many processes the kernel has killed for want of memory since the machine was started."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return None
