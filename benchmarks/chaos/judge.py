"""Whether a server has come through: answers, pauses, and what it has left behind."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.chaos.faults import Fault, members
from benchmarks.chaos.load import Answer, Case
from benchmarks.common.report import quantile

MADE_WHEN_NEEDED = 8
"""Descriptors, or threads, that a server may have more: pools fill. What each recovery leaves is beyond."""
MOST_GROWTH = 96 << 20
"""Bytes that a server's process may grow by: caches of prompts' pieces and grammars fill."""


@dataclass(frozen=True)
class Quiet:
    """A server that has nothing to do."""

    descriptors: int
    memfds: int
    threads: int
    bytes: int  # that its process has resident
    processes: tuple[str, ...]
    metrics: dict[str, float]

    @classmethod
    def of(cls, server: int, url: str) -> Quiet:
        """As it is now."""
        process, folder = psutil.Process(server), Path(f"/proc/{server}/fd")
        links = []
        for entry in folder.iterdir():
            try:
                links.append(os.readlink(entry))
            except OSError:
                continue
        clients = process.net_connections("tcp")  # whose connections are kept open
        return cls(
            len(links) - len(clients),
            sum("memfd:" in link for link in links),
            process.num_threads(),
            process.memory_info().rss,
            tuple(sorted(members(server))),
            metrics_of(url),
        )


def metrics_of(url: str) -> dict[str, float]:
    """By name, what /metrics says; of those with labels the sum."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def leaks(before: Quiet, after: Quiet) -> list[str]:
    """What a server has now that it had not, and should not have."""
    found = []
    for name in ("descriptors", "memfds", "threads"):
        was, now = getattr(before, name), getattr(after, name)
        if now > was + (0 if name == "memfds" else MADE_WHEN_NEEDED):
            found.append(f"{name}: {was} before, {now} after")
    if after.processes != before.processes:
        found.append(f"processes: {before.processes} before, {after.processes} after")
    if after.bytes > before.bytes + MOST_GROWTH:
        found.append(f"memory: {before.bytes >> 20} MiB before, {after.bytes >> 20} MiB after")
    free, total = (after.metrics[f"tpworker_{name}"] for name in ("free_kv_blocks", "kv_blocks"))
    if free != total:
        found.append(f"KV blocks: {free:g} of {total:g} are free")
    for name in ("open_requests", "running_requests", "waiting_requests"):
        if after.metrics[f"tpworker_{name}"]:
            found.append(f"{name}: {after.metrics[f'tpworker_{name}']:g}")
    return found


def wrong_answers(answers: Iterable[tuple[Case, bool, Answer]], right: dict[Case, Answer]) -> list[str]:
    """Of each that is not what it should be, in what."""
    found = []
    for case, _, answer in answers:
        why = answer.differs_from(right[case])
        if why:
            found.append(f"{case.name}: {why}")
    return found


def pauses(answers: Iterable[tuple[Case, bool, Answer]], faults: Sequence[Fault]) -> list[float]:
    """Of each fault and each stream that was under way, the longest time without a chunk from there on."""
    found = []
    for _, is_streamed, answer in answers:
        if not is_streamed:
            continue
        gaps = list(zip(answer.chunks, answer.chunks[1:], strict=False))
        for fault in faults:
            here = [last - fault.time for first, last in gaps if first <= fault.time < last]
            found += here[:1]
    return found


@dataclass
class Verdict:
    """All of it."""

    seconds: float
    faults: dict[str, int]  # by kind and process
    restarts: int
    num_answers: int
    num_left: int  # clients that hung up
    wrong: list[str]
    leaks: list[str]
    pauses: list[float]
    growth: int  # bytes
    left_behind: list[str] = field(default_factory=list)  # processes, after its end
    status: int | None = None

    @property
    def is_good(self) -> bool:
        """Whether nobody lost anything, and nothing is left."""
        return not (self.wrong or self.leaks or self.left_behind or self.status)

    def as_json(self) -> dict[str, Any]:
        """For --json; the pauses as quantiles."""
        values = asdict(self)
        values["pauses"] = {f"p{round(100 * at)}": quantile(self.pauses, at) for at in (0.5, 0.99, 1.0)}
        return {**values, "is_good": self.is_good}
