"""What a process has used, from /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage(NamedTuple):
    """Since the process started. None: it is gone, or is not the one that was asked for."""

    cpu_seconds: float | None = None
    memory_bytes: int | None = None
    """Resident, what it shares with others included."""


def usage_of(pid: int, name: str = "", proc: Path = PROC) -> Usage:
    """What a process has used.

    Args:
        pid: as this process sees it.
        name: how the command line of that process begins; '': however it does. A pid that was read somewhere
            may be another process' here, if it comes out of a container.
        proc: for tests.
    """
    folder = proc / str(pid)
    with suppress(OSError, ValueError, IndexError):
        if name and not (folder / "cmdline").read_bytes().startswith(name.encode()):
            return Usage()
        fields = _stat(folder)
        pages = int((folder / "statm").read_text().split()[1])
        return Usage((int(fields[11]) + int(fields[12])) / _TICKS, pages * _PAGE)
    return Usage()


def started(pid: int, proc: Path = PROC) -> int | None:
    """When a process started, in the kernel's ticks: tells it from another that gets its number. None: there
    is none."""
    with suppress(OSError, ValueError, IndexError):
        return int(_stat(proc / str(pid))[19])
    return None


def letter_of(pid: int | None, proc: Path = PROC) -> str:
    """What the kernel calls its state, as 'S'; '' if there is no such process."""
    with suppress(OSError, IndexError):
        return _stat(proc / str(pid))[0]
    return ""


def inner_pid(pid: int, proc: Path = PROC) -> int:
    """What a process takes its own pid for: another than ours where it is in a container. 0: not known."""
    numbers = _status(pid, "NSpid:", proc)
    return numbers[-1] if numbers else 0


def user_of(pid: int, proc: Path = PROC) -> int | None:
    """The effective user of a process; None: not known."""
    numbers = _status(pid, "Uid:", proc)
    return numbers[1] if len(numbers) > 1 else None


def _status(pid: int, field: str, proc: Path) -> list[int]:
    with suppress(OSError, ValueError):
        for line in (proc / str(pid) / "status").read_text().splitlines():
            if line.startswith(field):
                return [int(number) for number in line.split()[1:]]
    return []


def _stat(folder: Path) -> list[str]:
    """The fields behind its name, which may hold anything."""
    return (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
