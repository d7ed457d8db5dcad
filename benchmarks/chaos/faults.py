"""What is done to a server's processes, at random but for a seed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

KINDS = ("kill", "stop", "slow")
"""SIGKILL; SIGSTOP, for a deadline to find; SIGSTOP and after a moment SIGCONT, which must be no fault."""
SLOW_SECONDS = (0.05, 0.5)


@dataclass(frozen=True)
class Fault:
    """One that was made."""

    kind: str
    process: str  # 'rank', 'scheduler', 'rank-standby', 'scheduler-standby' or 'keeper'
    time: float  # time.monotonic()


def members(server: int) -> dict[str, psutil.Process]:
    """A server's processes, by the names that `ps` shows, without 'tpworker-'."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(server).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                name = child.cmdline()[0]
                if name.startswith("tpworker-") and child.status() != psutil.STATUS_ZOMBIE:
                    found[name.removeprefix("tpworker-")] = child
    return found


def kind_of(name: str) -> str:
    """'rank' of 'rank3'."""
    return name.rstrip("0123456789")


async def disturb(
    server: int, draw: random.Random, every: float, until: float, kinds: Sequence[str], victims: Sequence[str]
) -> list[Fault]:
    """Makes faults until then, time.monotonic().

    Args:
        server: its process.
        every: seconds between two faults, on the mean; exponentially distributed.
        kinds: some of `KINDS`.
        victims: kinds of processes, see `Fault`.
    """
    faults = []
    while True:
        pause = draw.expovariate(1 / every)
        if time.monotonic() + pause >= until:
            return faults
        await asyncio.sleep(pause)
        there = {name: one for name, one in members(server).items() if kind_of(name) in victims}
        wanted = draw.choice(victims)  # first the kind: of ranks there may be many
        names = sorted(name for name in there if kind_of(name) == wanted) or sorted(there)
        kind = draw.choice(kinds)
        slow = draw.uniform(*SLOW_SECONDS)
        if not names:
            continue
        name = draw.choice(names)
        with contextlib.suppress(psutil.Error):
            there[name].send_signal(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            faults.append(Fault(kind, kind_of(name), time.monotonic()))
        if kind == "slow":
            await asyncio.sleep(slow)
            with contextlib.suppress(psutil.Error):
                there[name].send_signal(signal.SIGCONT)
