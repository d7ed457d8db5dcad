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


class Sums:
    """What replicas have told last, by their names."""

    def __init__(self) -> None:
        self.now: tuple[Told, ...] = ()
        """Of those that there are."""
        self.num_moves = 0
        """Requests that went on in another replica than they were in."""
        self._last: dict[str, Stats] = {}  # those that are gone, too: counters must not fall

    def hear(self, told: Sequence[Told]) -> None:
        """What all that there are have told just now."""
        self.now = tuple(told)
        self._last |= {one.name: one.stats for one in told}

    def stats(self, num_open: int) -> Stats:
        """Of all together.

        Args:
            num_open: requests that are open where they come in.
        """
        present, past = [one.stats for one in self.now], list(self._last.values())
        counted = {name: sum(getattr(stats, name) for stats in past) for name in _COUNTERS}
        counted["resumed_requests"] += self.num_moves
        lost: dict[str, int] = {}
        for stats in past:
            for kind, count in stats.lost:
                lost[kind] = lost.get(kind, 0) + count
        return replace(
            _NOTHING,
            open=num_open,
            **{name: sum(getattr(stats, name) for stats in present) for name in _GAUGES},
            **counted,
            draft_tokens=_added(stats.draft_tokens for stats in past),
            accepted_tokens=_added(stats.accepted_tokens for stats in past),
            lost=tuple(sorted(lost.items())),
        )


def _added(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Place by place."""
    return tuple(sum(at) for at in zip_longest(*counts, fillvalue=0))
