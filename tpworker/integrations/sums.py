"""The statistics of replicas, put together, those that are gone included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest

from tpworker.integrations.replica import Told
from tpworker.outputs import Stats

_GAUGES = ("running", "waiting", "free_blocks", "total_blocks")
_COUNTERS = (
    "steps",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "preemptions",
    "finished",
    "aborted",
    "restarts",
    "resumed_requests",
)
_NOTHING = Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, recent_steps=())
MOST_MISSED = 300
"""Answers in a row, of every few seconds, without which a replica is gone for good: engines have given it up
long before. One that is only late is still known by then, so that it is not counted twice."""


class Sums:
    """What replicas have told last, by their names."""

    def __init__(self) -> None:
        self.now: tuple[Told, ...] = ()
        """Of those that there are."""
        self.num_moves = 0
        """Requests that went on in another replica than they were in."""
        self._last: dict[str, Stats] = {}
        self._missed: dict[str, int] = {}  # answers in a row
        self._gone = _NOTHING  # the counters of those that are: they must not fall

    def hear(self, told: Sequence[Told]) -> None:
        """What all that there are have told just now."""
        self.now = tuple(told)
        self._last |= {one.name: one.stats for one in told}
        self._missed = {name: self._missed.get(name, 0) + 1 for name in self._last}
        self._missed |= {one.name: 0 for one in told}
        gone = [name for name, missed in self._missed.items() if missed > MOST_MISSED]
        self._gone = _counted([self._gone, *(self._last.pop(name) for name in gone)])

    def stats(self, num_open: int) -> Stats:
        """Of all together.

        Args:
            num_open: requests that are open where they come in.
        """
        counted, present = _counted([self._gone, *self._last.values()]), [one.stats for one in self.now]
        return replace(
            counted,
            open=num_open,
            resumed_requests=counted.resumed_requests + self.num_moves,
            **{name: sum(getattr(stats, name) for stats in present) for name in _GAUGES},
        )


def _counted(parts: Sequence[Stats]) -> Stats:
    """The counters of all together, and no gauges."""
    lost: dict[str, int] = {}
    for stats in parts:
        for kind, count in stats.lost:
            lost[kind] = lost.get(kind, 0) + count
    return replace(
        _NOTHING,
        **{name: sum(getattr(stats, name) for stats in parts) for name in _COUNTERS},
        draft_tokens=_added(stats.draft_tokens for stats in parts),
        accepted_tokens=_added(stats.accepted_tokens for stats in parts),
        lost=tuple(sorted(lost.items())),
    )


def _added(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Place by place."""
    return tuple(sum(at) for at in zip_longest(*counts, fillvalue=0))
