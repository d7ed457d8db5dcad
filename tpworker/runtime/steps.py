"""What is kept of the steps, for `Runtime.stats`."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import zip_longest

from tpworker.ipc.messages import SchedulerLoad, StepOutput
from tpworker.outputs import StepRecord

NUM_RECENT_STEPS = 4096


class Steps:
    """The steps of a runtime: how many there were, the last ones, and the scheduler's load since.

    Schedulers count from 0; here what those before have counted is added, and steps go on being numbered.
    """

    def __init__(self) -> None:
        self.num = 0
        self.load: SchedulerLoad | None = None
        """As of the last step; None before the first."""
        self.recent: deque[StepRecord] = deque(maxlen=NUM_RECENT_STEPS)
        self._before: SchedulerLoad | None = None  # what schedulers before this one have counted
        self._first = 0  # the number of this one's first step

    def last(self) -> tuple[StepRecord, ...]:
        """The last ones, oldest first. From any thread."""
        while True:
            try:
                return tuple(self.recent)
            except RuntimeError:  # one was added meanwhile, by the event loop
                continue

    def restart(self) -> None:
        """There will be another scheduler."""
        self._before, self._first = self.load, self.num

    def add(self, output: StepOutput) -> StepRecord:
        """A step has ended; returns what is kept of it."""
        self.num += 1
        self.load = output.load if self._before is None else _added(self._before, output.load)
        timing = output.timing
        record = StepRecord(
            self._first + output.step,
            output.num_prefill_tokens,
            output.num_decodes,
            timing.launched,
            timing.started,
            timing.ended,
            output.load.num_drafts,
        )
        self.recent.append(record)
        return record


def _added(before: SchedulerLoad, now: SchedulerLoad) -> SchedulerLoad:
    """What is so now, and what both have counted."""
    return replace(
        now,
        preemptions=before.preemptions + now.preemptions,
        prompt_tokens=before.prompt_tokens + now.prompt_tokens,
        cached_tokens=before.cached_tokens + now.cached_tokens,
        drafts=_sums(before.drafts, now.drafts),
        accepted=_sums(before.accepted, now.accepted),
    )


def _sums(before: tuple[int, ...], now: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(before, now, fillvalue=0))
