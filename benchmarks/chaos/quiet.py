"""A server that has nothing to do: what it holds, and what it holds more than before."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.chaos.faults import members

MADE_WHEN_NEEDED = 8
"""Descriptors, or threads, that a process may have more: pools fill. What each recovery leaves is beyond."""
MOST_GROWTH = 96 << 20
"""Bytes that a server's process may grow by: caches of prompts' pieces and grammars fill."""
MOST_GPU_GROWTH = 512 << 20
"""Bytes of a GPU's memory: graphs and workspaces are made when they are needed first."""
_MAPPED_MEMFD = re.compile(r" \S+ \S+ (\d+) +/memfd:")


@dataclass(frozen=True)
class Quiet:
    """A server that has nothing to do."""

    descriptors: dict[str, int]  # of each process that outlives faults; the server's is named 'server'
    memory: tuple[int, int]  # shared by all processes: how many pieces (memfds), and their bytes in all
    threads: int
    bytes: int  # that the server's process has resident
    processes: tuple[str, ...]
    metrics: dict[str, float]

    @classmethod
    def of(cls, server: int, url: str) -> Quiet:
        """As it is now."""
        process, there = psutil.Process(server), members(server)
        clients = process.net_connections("tcp")  # whose connections are kept open
        descriptors = {"server": process.num_fds() - len(clients)}
        descriptors |= {
            name: one.num_fds() for name, one in there.items() if name.endswith(("standby", "keeper"))
        }
        return cls(
            descriptors,
            shared_memory([server, *(one.pid for one in there.values())]),
            process.num_threads(),
            process.memory_info().rss,
            tuple(sorted(there)),
            metrics_of(httpx.get(f"{url}/metrics", timeout=30).text),
        )


def shared_memory(processes: list[int]) -> tuple[int, int]:
    """The memfds that these have open or mapped: how many, and their bytes in all, of those that are open."""
    pieces: dict[int, int] = {}
    for process in processes:
        with contextlib.suppress(OSError):
            for inode in _MAPPED_MEMFD.findall(Path(f"/proc/{process}/maps").read_text()):
                pieces.setdefault(int(inode), 0)
            for entry in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if "/memfd:" in os.readlink(entry):
                        status = entry.stat()
                        pieces[status.st_ino] = status.st_size
    return len(pieces), sum(pieces.values())


def metrics_of(text: str) -> dict[str, float]:
    """By name, what /metrics says; of those with labels the sum."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def leaks(before: Quiet, after: Quiet) -> list[str]:
    """What a server has now that it had not, and should not have."""
    found = []
    for name, count in after.descriptors.items():
        if count > before.descriptors.get(name, count) + MADE_WHEN_NEEDED:
            found.append(f"descriptors of {name}: {before.descriptors[name]} before, {count} after")
    if after.threads > before.threads + MADE_WHEN_NEEDED:
        found.append(f"threads: {before.threads} before, {after.threads} after")
    if after.memory != before.memory:
        found.append(f"shared memory (pieces, bytes): {before.memory} before, {after.memory} after")
    if after.processes != before.processes:
        found.append(f"processes: {before.processes} before, {after.processes} after")
    if after.bytes > before.bytes + MOST_GROWTH:
        found.append(f"memory: {before.bytes >> 20} MiB before, {after.bytes >> 20} MiB after")
    gpu = [quiet.metrics.get("tpworker_gpu_memory_used_bytes", 0.0) for quiet in (before, after)]
    if gpu[1] > gpu[0] + MOST_GPU_GROWTH:
        found.append(f"GPU memory: {gpu[0] / (1 << 20):.0f} MiB before, {gpu[1] / (1 << 20):.0f} MiB after")
    free, total = (after.metrics[f"tpworker_{name}"] for name in ("free_kv_blocks", "kv_blocks"))
    if free != total:
        found.append(f"KV blocks: {free:g} of {total:g} are free")
    for name in ("open_requests", "running_requests", "waiting_requests"):
        if after.metrics[f"tpworker_{name}"]:
            found.append(f"{name}: {after.metrics[f'tpworker_{name}']:g}")
    return found
