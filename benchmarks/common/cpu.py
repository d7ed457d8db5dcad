"""What processes cost, from /proc: CPU time, waits for a core, and how often they slept."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a process's threads together, since they began; or, as a difference, of a while."""

    cpu: float
    """Seconds on a core."""
    queued: float
    """Seconds for which a thread could have run, and had no core."""
    sleeps: int
    """How often a thread went to sleep, that is, will have to be woken."""

    @classmethod
    def of(cls, pid: int) -> Usage:
        """What a process has used so far. Threads that have ended are not counted."""
        cpu = queued = sleeps = 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                ran, waited, _ = (task / "schedstat").read_text().split()
                status = (task / "status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            cpu += int(ran)
            queued += int(waited)
            sleeps += int(status.rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])
        return cls(cpu / 1e9, queued / 1e9, sleeps)

    def __sub__(self, before: Usage) -> Usage:
        return Usage(self.cpu - before.cpu, self.queued - before.queued, self.sleeps - before.sleeps)


class Others:
    """How much of the machine other programs took while we measured. Every child must have been reaped."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._busy, self._ours = busy_seconds(), _ours()

    def share(self) -> float:
        """Cores that the others kept busy on average, since this was made."""
        busy, ours = busy_seconds() - self._busy, _ours() - self._ours
        return max(0.0, busy - ours) / (time.monotonic() - self._since)


def busy_seconds() -> float:
    """Seconds for which the cores, all together, were not idle. Only differences mean something."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    idle = (int(fields[3]) + int(fields[4])) / os.sysconf("SC_CLK_TCK")  # the kernel's own clock, no samples
    return time.monotonic() * os.sysconf("SC_NPROCESSORS_ONLN") - idle


def _ours() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
