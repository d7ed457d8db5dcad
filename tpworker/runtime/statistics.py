"""A runtime's statistics, put together from all who count."""

from __future__ import annotations

import os

from tpworker.ipc.messages import SchedulerLoad
from tpworker.observe.snapshot import Whole
from tpworker.outputs import RuntimeState, Stats
from tpworker.runtime.intake import Intake
from tpworker.runtime.processes import Processes
from tpworker.runtime.steps import Steps


def stats_of(
    intake: Intake, steps: Steps, processes: Processes | None, total_blocks: int, num_resumed: int
) -> Stats:
    """See `Stats`; processes: None before the start."""
    load = steps.load or SchedulerLoad(total_blocks, 0, 0, 0)
    return Stats(
        open=intake.num_open,
        running=intake.requests.num_running,
        waiting=intake.num_waiting,
        free_blocks=load.free_blocks,
        total_blocks=total_blocks,
        steps=steps.num,
        prompt_tokens=load.prompt_tokens,
        cached_tokens=load.cached_tokens,
        output_tokens=intake.requests.num_output_tokens,
        preemptions=load.preemptions,
        finished=intake.num_finished,
        aborted=intake.num_aborted,
        recent_steps=steps.last(),
        draft_tokens=load.drafts,
        accepted_tokens=load.accepted,
        restarts=0 if processes is None else processes.num_restarts,
        resumed_requests=num_resumed,
        lost=() if processes is None else tuple(sorted(processes.lost.items())),
        last_recovery_seconds=None if processes is None else processes.last_recovery_seconds,
    )


def whole_of(stats: Stats, state: RuntimeState) -> Whole:
    """The same as a snapshot tells it of a runtime in this process."""
    return Whole(
        pid=os.getpid(),
        state=state,
        running=stats.running,
        waiting=stats.waiting,
        output_tokens=stats.output_tokens,
        finished=stats.finished,
        aborted=stats.aborted,
        restarts=stats.restarts,
        resumed=stats.resumed_requests,
    )
