"""What a step's result tells of logprobs, by request."""

from __future__ import annotations

from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import LOGPROB_ROW_BYTES, PromptLogprobs, StepResult
from tpworker.scheduler.inflight import InFlight
from tpworker.scheduler.requests import State


def logprob_row(rows: bytes, index: int, count: int = 1) -> bytes:
    """Some of the logprob rows of a result."""
    return rows[index * LOGPROB_ROW_BYTES : (index + count) * LOGPROB_ROW_BYTES]


def logprobs(plan: InFlight, result: StepResult) -> tuple[bytes, bytes]:
    """Which of the tokens that a result commits have logprob rows (int32, see `StepOutput`), and the rows."""
    if not plan.wants_logprobs:
        return b"", b""
    told, rows, place = [], [], 0
    for row, request in enumerate(plan.sampled):
        if request.state is not State.FINISHED:
            if request.wants_logprobs:
                told.append(place)
                rows.append(logprob_row(result.logprobs, row))
            place += 1
    return pack_int32(told), b"".join(rows)


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
