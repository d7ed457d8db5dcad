"""What a server's own log says of its recoveries, and whether each of them had a reason."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from benchmarks.chaos.faults import Fault

_LINE = re.compile(r"^(\S+ \S+),(\d{3}) tpworker \w+ recovered in ([\d.]+) s: (\d+) requests", re.MULTILINE)
CLOCKS = 0.3
"""Seconds between two events within which a log's times do not tell which of them was first."""


@dataclass(frozen=True)
class Recovery:
    """One that a server tells of."""

    noticed: float  # that something was lost; time.monotonic()
    seconds: float  # from there on
    num_requests: int  # that went on


def recoveries(log: str) -> list[Recovery]:
    """All that the log tells of, in their order. It must have been written since this machine's start."""
    offset = time.time() - time.monotonic()
    found = []
    for at, milliseconds, seconds, num_requests in _LINE.findall(log):
        ended = datetime.strptime(at, "%Y-%m-%d %H:%M:%S").timestamp() + int(milliseconds) / 1000
        found.append(Recovery(ended - offset - float(seconds), float(seconds), int(num_requests)))
    return found


def without_reason(told: Iterable[Recovery], faults: Sequence[Fault]) -> list[str]:
    """The recoveries that no fault explains; that a process was slow is none. A fault explains one recovery,
    and several may be behind one."""
    unused = sorted(fault.time for fault in faults if fault.kind != "slow")
    found = []
    for recovery in told:
        own = next((at for at in unused if at <= recovery.noticed + CLOCKS), None)
        if own is None:
            found.append(f"a recovery of {recovery.seconds:.2f} s had no reason")
            continue
        unused.remove(own)
        unused = [at for at in unused if at > recovery.noticed - CLOCKS]
    return found
