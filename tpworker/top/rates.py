"""What happens in a second, from counters of several instants."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tpworker.observe.snapshot import Process, Rank, Snapshot

WINDOW_SECONDS = 3.0
"""Rates are those of at least so long, once they can be: the scheduler writes some of its
counters ten times a second only, and a window evens that out."""


@dataclass(frozen=True, kw_only=True)
class RankRates:
    """Of one rank. None: nothing to tell it from."""

    cpu: float | None = None
    """Percent of a core."""
    barrier_share: float | None = None
    """Share of the time for which it waited at barriers."""
    last_share: float | None = None
    """Share of the steps to whose barrier it came last."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of all. None: nothing to tell it from, as no step was done."""

    seconds: float = 0.0
    """That they are about; 0: there is nothing to compare with yet."""
    steps: float | None = None
    """A second; as the two that follow."""
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    gap_seconds: float | None = None
    """For which the device had nothing to do before a step that decodes, on average."""
    busy_share: float | None = None
    """Share of the time for which rank 0's device ran steps."""
    skew_seconds: float | None = None
    """For how long the rank that waited most waited for the others at a barrier, on average."""
    publish_seconds: float | None = None
    """From a step's end on the device until its tokens were sent, on average."""
    acceptance: float | None = None
    """Share of the drafts that were right."""
    cached_share: float | None = None
    """Share of the prompts' tokens, of requests that got a slot, that were found in the prefix cache."""
    runtime_cpu: float | None = None
    """Percent of a core; as the next."""
    scheduler_cpu: float | None = None
    ranks: tuple[RankRates, ...] = ()


class History:
    """The snapshots of the last seconds."""

    def __init__(self) -> None:
        self._snapshots: deque[Snapshot] = deque()

    def add(self, snapshot: Snapshot) -> Rates:
        """One more; returns the rates that it brings."""
        snapshots = self._snapshots
        if snapshots and not _is_same(snapshots[-1], snapshot):
            snapshots.clear()  # counters have begun anew
        snapshots.append(snapshot)
        while len(snapshots) > 2 and snapshot.clock - snapshots[1].clock >= WINDOW_SECONDS:
            snapshots.popleft()
        return rates_of(snapshots[0], snapshot)


def _is_same(before: Snapshot, after: Snapshot) -> bool:
    """Whether both are of one generation of one runtime, on one clock."""
    return (
        before.runtime.pid == after.runtime.pid
        and before.generation == after.generation
        and len(before.ranks) == len(after.ranks)
        and before.clock <= after.clock
        and before.scheduler.completed <= after.scheduler.completed
    )


def rates_of(before: Snapshot, after: Snapshot) -> Rates:
    """What has happened from one snapshot to a later one of the same generation."""
    seconds = after.clock - before.clock
    if seconds <= 0:
        return Rates(ranks=(RankRates(),) * len(after.ranks))
    was, now = before.scheduler, after.scheduler
    barriers = [
        (new.barriers - old.barriers, new.barrier_seconds - old.barrier_seconds)
        for old, new in zip(before.ranks, after.ranks, strict=True)
    ]
    return Rates(
        seconds=seconds,
        steps=(now.completed - was.completed) / seconds,
        prompt_tokens=(now.prefilled_tokens - was.prefilled_tokens) / seconds,
        output_tokens=(now.output_tokens - was.output_tokens) / seconds,
        gap_seconds=_share(now.gap_seconds - was.gap_seconds, now.gaps - was.gaps),
        busy_share=min(1.0, (now.busy_seconds - was.busy_seconds) / seconds),
        skew_seconds=_skew(barriers),
        publish_seconds=_share(now.publish_seconds - was.publish_seconds, now.publishes - was.publishes),
        acceptance=_share(now.accepted - was.accepted, now.drafts - was.drafts),
        cached_share=_share(now.cached_tokens - was.cached_tokens, now.prompt_tokens - was.prompt_tokens),
        runtime_cpu=_cpu(before.runtime, after.runtime, seconds),
        scheduler_cpu=_cpu(was, now, seconds),
        ranks=tuple(_rank(old, new, seconds) for old, new in zip(before.ranks, after.ranks, strict=True)),
    )


def _rank(before: Rank, after: Rank, seconds: float) -> RankRates:
    num_barriers = after.barriers - before.barriers
    return RankRates(
        cpu=_cpu(before, after, seconds),
        barrier_share=max(0.0, after.barrier_seconds - before.barrier_seconds) / seconds,
        last_share=_share(after.last_arrivals - before.last_arrivals, num_barriers),
    )


def _skew(barriers: Sequence[tuple[int, float]]) -> float | None:
    if len(barriers) < 2:
        return None
    return max((waited / count for count, waited in barriers if count > 0), default=None)


def _cpu(before: Process, after: Process, seconds: float) -> float | None:
    if before.cpu_seconds is None or after.cpu_seconds is None or before.pid != after.pid:
        return None
    return max(0.0, 100 * (after.cpu_seconds - before.cpu_seconds) / seconds)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
