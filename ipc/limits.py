"""How much memory and how many cores this process may use: the machine's, within all limits of containers.

A container's limits belong to control groups (cgroups), of version 1 or 2, which lie within one another: what
the tightest of them leaves is all there is. `free`, /proc/meminfo and the CPU affinity know nothing of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_ROOT = Path("/")


class _Group(NamedTuple):
    """A control group that this process is in, itself or by one within it."""

    folder: Path
    version: int  # 1 or 2


def available_bytes(root: Path = _ROOT) -> int:
    """Memory that can be had without swapping: what the kernel says, or less if a control group leaves less.

    What a group has cached of files, e.g. of checkpoints that were read, counts as available.

    Args:
        root: where proc and sys lie, for tests.
    """
    with (root / "proc/meminfo").open() as meminfo:
        fields = dict(line.split(":", 1) for line in meminfo)
    rooms = [int(fields["MemAvailable"].split()[0]) * 1024]
    rooms += (room for group in _groups(root, "memory") if (room := _room(group)) is not None)
    return max(0, min(rooms))


def usable_cores(root: Path = _ROOT) -> int:
    """Whole cores that this process may keep busy, at least 1: those it may run on, within `cpu_quota`."""
    quota = cpu_quota(root)
    cores = len(os.sched_getaffinity(0))
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that control groups leave to this process; None: no limit.

    Args:
        root: where proc and sys lie, for tests.
    """
    return min((quota for group in _groups(root, "cpu") if (quota := _quota(group))), default=None)


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    """This process's group and all around it that can be seen, of each hierarchy with that controller."""
    own = _memberships(root)
    for line in _lines(root / "proc/self/mountinfo"):
        where, _, what = line.partition(" - ")
        kind, _, options = what.split(" ")[:3]
        if kind == "cgroup2":
            version, path = 2, own.get("")
        elif kind == "cgroup" and controller in options.split(","):
            version, path = 1, own.get(controller)
        else:
            continue
        if path is None:
            continue
        mounted, mount_point = map(PurePosixPath, where.split(" ")[3:5])
        # Without a cgroup namespace a container may be shown paths that are not below what is mounted there.
        inside = path.relative_to(mounted) if path.is_relative_to(mounted) else PurePosixPath()
        if ".." in inside.parts:
            inside = PurePosixPath()
        top = root / mount_point.relative_to("/")
        for part in (inside, *inside.parents):
            yield _Group(top / part, version)


def _memberships(root: Path) -> dict[str, PurePosixPath]:
    """By controller, and under '' by version 2, the path of this process's group."""
    paths: dict[str, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), PurePosixPath(path))
    return paths


def _room(group: _Group) -> int | None:
    """Bytes that a group may still take; None: as many as it likes."""
    folder = group.folder
    kinds = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    if group.version == 2:
        # Above memory.high it is not killed, but slowed down until it has hardly a use.
        limits = [_number(folder / "memory.max"), _number(folder / "memory.high")]
        current, total = _number(folder / "memory.current"), ""
    else:
        # The latter is that of groups around it too, of which a container is shown nothing.
        limits = [
            _number(folder / "memory.limit_in_bytes"), _integer(kinds.get("hierarchical_memory_limit")),
        ]  # fmt: skip
        current, total = _number(folder / "memory.usage_in_bytes"), "total_"
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is None or current is None:
        return None
    cached = sum(_integer(kinds.get(f"{total}{name}")) or 0 for name in ("active_file", "inactive_file"))
    return limit - current + cached


def _quota(group: _Group) -> float | None:
    """Cores' worth of time that a group may take; None: no limit."""
    if group.version == 2:  # "150000 100000" or "max 100000"
        quota, _, period = _first_line(group.folder / "cpu.max").partition(" ")
    else:
        quota, period = (_first_line(group.folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    of_time, in_time = _integer(quota), _integer(period)
    return of_time / in_time if of_time and in_time and of_time > 0 else None


def _lines(path: Path) -> list[str]:
    """None, if there is no such file, or it may not be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _first_line(path: Path) -> str:
    return "".join(_lines(path)[:1])


def _number(path: Path) -> int | None:
    return _integer(_first_line(path))


def _integer(text: str | None) -> int | None:
    """None for what is no number: 'max', or nothing."""
    try:
        return int(text or "")
    except ValueError:
        return None
