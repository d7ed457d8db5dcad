"""What containers leave of the machine: fake trees of /proc and /sys, as container engines make them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tpworker.ipc.limits import available_bytes, cpu_quota, usable_cores

GIB = 1 << 30
NO_LIMIT_V1 = 0x7FFFFFFFFFFFF000

V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs rw,mode=755\n"
    "31 30 0:27 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:28 {root} /sys/fs/cgroup/memory rw master:9 - cgroup cgroup rw,memory\n"
)


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


class Tree:
    """A machine of 64 GiB, 60 of them available."""

    def __init__(self, root: Path, mounts: str, groups: str) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {64 * GIB >> 10} kB\nMemAvailable: {60 * GIB >> 10} kB")
        self.write("proc/self/mountinfo", f"1 0 8:1 / / rw - ext4 /dev/sda rw\n{mounts.rstrip()}".rstrip())
        self.write("proc/self/cgroup", groups.rstrip())

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n" if text != "" else "")

    def v2(self, group: str, **files: object) -> None:
        for name, value in files.items():
            self.write(f"sys/fs/cgroup/{group}/{name.replace('_', '.', 1)}", value)

    def v1_memory(self, group: str, limit: int, usage: int, stat: str = "") -> None:
        for name, value in (("limit_in_bytes", limit), ("usage_in_bytes", usage), ("stat", stat)):
            self.write(f"sys/fs/cgroup/memory/{group}/memory.{name}", value)

    def v1_cpu(self, group: str, quota: int, period: int = 100_000) -> None:
        self.write(f"sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_quota_us", quota)
        self.write(f"sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_period_us", period)

    def found(self) -> tuple[float, float | None, int]:
        """GiB available, the quota of cores, usable cores."""
        return available_bytes(self.root) / GIB, cpu_quota(self.root), usable_cores(self.root)


def test_without_control_groups_it_is_the_machine(tmp_path: Path) -> None:
    assert Tree(tmp_path, "", "").found() == (60, None, 8)


def test_without_limits_it_is_the_machine(tmp_path: Path) -> None:
    tree = Tree(tmp_path, V2.format(root="/"), "0::/user.slice\n")
    tree.v2("user.slice", memory_max="max", memory_high="max", memory_current=GIB, cpu_max="max 100000")
    assert tree.found() == (60, None, 8)
    (tmp_path / "one").mkdir()
    tree = Tree(tmp_path / "one", V1.format(root="/"), "4:memory:/\n1:cpu,cpuacct:/\n")
    tree.v1_memory("", NO_LIMIT_V1, GIB, f"hierarchical_memory_limit {NO_LIMIT_V1}")
    tree.v1_cpu("", -1)
    assert tree.found() == (60, None, 8)


def test_version_2_in_a_namespace_of_its_own(tmp_path: Path) -> None:
    """What docker and containerd show: the container's group is the root of what is mounted."""
    tree = Tree(tmp_path, V2.format(root="/"), "0::/\n")
    tree.v2("", memory_max=4 * GIB, memory_current=3 * GIB, cpu_max="250000 100000")
    tree.v2("", memory_stat=f"anon 7\nactive_file {GIB}\ninactive_file {GIB // 2}\nshmem 5")
    assert tree.found() == (2.5, 2.5, 2)


def test_version_1_without_a_namespace(tmp_path: Path) -> None:
    """The path is the host's, and so is the root of what is mounted."""
    own = "/docker/0123abc"
    tree = Tree(tmp_path, V1.format(root=own), f"4:memory:{own}\n1:cpu,cpuacct:{own}\n0::/\n")
    tree.v1_memory("", 4 * GIB, 3 * GIB, f"active_file 9\ntotal_active_file {GIB}\ntotal_inactive_file 0")
    tree.v1_cpu("", 150_000)
    assert tree.found() == (2, 1.5, 1)


def test_version_1_where_what_is_mounted_is_not_around_the_group(tmp_path: Path) -> None:
    tree = Tree(tmp_path, V1.format(root="/pod/one"), "4:memory:/../two\n1:cpu,cpuacct:/elsewhere\n")
    tree.v1_memory("", 2 * GIB, GIB)
    tree.v1_cpu("", 300_000)
    assert tree.found() == (1, 3, 3)


@pytest.mark.parametrize("tightest", [0, 1, 2])
@pytest.mark.parametrize("version", [1, 2])
def test_of_nested_groups_the_tightest_counts(tmp_path: Path, version: int, tightest: int) -> None:
    path = "kubepods/pod7/container"
    groups = {1: f"4:memory:/{path}\n1:cpu,cpuacct:/{path}\n", 2: f"0::/{path}\n"}[version]
    tree = Tree(tmp_path, {1: V1, 2: V2}[version].format(root="/"), groups)
    for depth, group in enumerate(("kubepods", "kubepods/pod7", path)):
        limit, cores = (5 * GIB, 3) if depth == tightest else (50 * GIB, 7)
        if version == 2:
            tree.v2(group, memory_max=limit, memory_current=GIB, cpu_max=f"{cores * 50_000} 50000")
        else:
            tree.v1_memory(group, limit, GIB)
            tree.v1_cpu(group, cores * 50_000, 50_000)
    assert tree.found() == (4, 3, 3)


def test_the_room_counts_and_not_the_limit(tmp_path: Path) -> None:
    """A wide group that its other members fill leaves less than a narrow one that is empty."""
    tree = Tree(tmp_path, V2.format(root="/"), "0::/slice/unit\n")
    tree.v2("slice", memory_max=20 * GIB, memory_current=19 * GIB)
    tree.v2("slice/unit", memory_max=4 * GIB, memory_current=0)
    assert tree.found()[0] == 1
    tree.v2("slice", memory_current=21 * GIB)
    assert tree.found()[0] == 0


def test_above_memory_high_nothing_runs_any_more(tmp_path: Path) -> None:
    tree = Tree(tmp_path, V2.format(root="/"), "0::/unit\n")
    tree.v2("unit", memory_max=9 * GIB, memory_high=3 * GIB, memory_current=GIB)
    assert tree.found()[0] == 2


def test_version_1_tells_of_groups_that_are_not_shown(tmp_path: Path) -> None:
    tree = Tree(tmp_path, V1.format(root="/pod"), "4:memory:/pod\n")
    tree.v1_memory("", NO_LIMIT_V1, GIB, f"hierarchical_memory_limit {3 * GIB}")
    assert tree.found()[0] == 2


def test_both_versions_at_once(tmp_path: Path) -> None:
    """systemd's hybrid: controllers in version 1, and a tree of version 2 without any."""
    unified = "33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    tree = Tree(tmp_path, unified + V1.format(root="/"), "4:memory:/a\n1:cpu,cpuacct:/a\n0::/b\n")
    tree.v1_memory("a", 3 * GIB, GIB)
    tree.v1_cpu("a", 200_000)
    assert tree.found() == (2, 2, 2)


def test_less_than_a_core_is_one(tmp_path: Path) -> None:
    tree = Tree(tmp_path, V2.format(root="/"), "0::/\n")
    tree.v2("", cpu_max="50000 100000")
    assert tree.found()[1:] == (0.5, 1)


@pytest.mark.parametrize("text", ["", "max", "many of them", "0 0", "-1 100000"])
def test_what_says_nothing_is_no_limit(tmp_path: Path, text: str) -> None:
    tree = Tree(tmp_path, V2.format(root="/"), "0::/\n")
    tree.v2("", cpu_max=text, memory_max=text, memory_current=text)
    assert tree.found() == (60, None, 8)


def test_this_machine() -> None:
    assert available_bytes() > 1 << 20
    assert usable_cores() >= 1
