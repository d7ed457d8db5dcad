"""What a step's result tells of logprobs, by request."""

from __future__ import annotations

from tpworker.ipc.messages import LOGPROB_ROW_BYTES, PromptLogprobs, StepResult
from tpworker.scheduler.inflight import InFlight
from tpworker.scheduler.requests import State


def logprob_row(rows: bytes, index: int, count: int = 1) -> bytes:
    """Some of the logprob rows of a result."""
    return rows[index * LOGPROB_ROW_BYTES : (index + count) * LOGPROB_ROW_BYTES]


def prompt_logprobs(plan: InFlight, result: StepResult) -> tuple[PromptLogprobs, ...]:
    """What a result tells of prompts, by request, each row once."""
    found, row = [], 0
    for part in plan.told:
        num_new = part.count - part.num_known
        if num_new and part.request.state is not State.FINISHED:
            rows = logprob_row(result.prompt_logprobs, row + part.num_known, num_new)
            found.append(PromptLogprobs(part.request.id, part.position + part.num_known, rows))
        row += part.count
    return tuple(found)
