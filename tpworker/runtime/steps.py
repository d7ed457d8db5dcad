"""What is kept of the steps, for `Runtime.stats`."""

from __future__ import annotations

from collections import deque

from tpworker.ipc.messages import SchedulerLoad, StepOutput
from tpworker.outputs import StepRecord

NUM_RECENT_STEPS = 4096


class Steps:
    """The steps of a runtime: how many there were, the last ones, and the scheduler's load since."""

    def __init__(self) -> None:
        self.num = 0
        self.load: SchedulerLoad | None = None
        """As of the last step; None before the first."""
        self.recent: deque[StepRecord] = deque(maxlen=NUM_RECENT_STEPS)

    def add(self, output: StepOutput) -> None:
        """A step has ended."""
        self.num += 1
        self.load = output.load
        timing = output.timing
        self.recent.append(
            StepRecord(
                output.step,
                output.num_prefill_tokens,
                output.num_decodes,
                timing.launched,
                timing.started,
                timing.ended,
                output.load.num_drafts,
            )
        )
