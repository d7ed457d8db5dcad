"""Plans that are not answered yet, oldest first.

Each keeps its own snapshot of who sampled which row: slots are given to other requests while old results
are still on their way (invariant 5), so a result is never resolved through the slots of today.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from tpworker.ipc.messages import StepResult, unpack_int32
from tpworker.scheduler.requests import Request


class ProtocolError(Exception):
    """A rank answered something that it was not asked."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """One unanswered plan."""

    step: int
    sampled: list[Request]  # whose tokens come back, in the plan's order
    num_prefill_tokens: int
    num_decodes: int
    streamed: float  # time.monotonic(), when it was composed


class InFlightPlans:
    """At most `lookahead` + 1 plans; answers come in step order."""

    def __init__(self, lookahead: int) -> None:
        self._limit = lookahead + 1
        self._plans: deque[InFlight] = deque()
        self._last_answer = 0.0  # time.monotonic()

    def __len__(self) -> int:
        return len(self._plans)

    def has_room(self) -> bool:
        """Whether one more plan may be streamed before the oldest is answered."""
        return len(self._plans) < self._limit

    def add(self, plan: InFlight) -> None:
        assert self.has_room()
        self._plans.append(plan)

    def answered(self, result: StepResult) -> tuple[InFlight, list[int]]:
        """The plan that a result answers, and its tokens.

        Raises:
            ProtocolError: it is not the answer to the oldest plan, or has the wrong number of tokens.
        """
        tokens = unpack_int32(result.tokens).tolist()
        if not self._plans or self._plans[0].step != result.step:
            waiting = self._plans[0].step if self._plans else None
            raise ProtocolError(f"an answer to step {result.step}, but the oldest unanswered is {waiting}")
        plan = self._plans.popleft()
        if len(tokens) != len(plan.sampled):
            raise ProtocolError(f"step {result.step}: {len(tokens)} tokens for {len(plan.sampled)} rows")
        self._last_answer = time.monotonic()
        return plan, tokens

    def oldest_age(self) -> float:
        """Seconds for which the oldest plan has been the next to be answered; 0 without one.

        Not since it was streamed: with lookahead it waited its turn behind others.
        """
        if not self._plans:
            return 0.0
        return time.monotonic() - max(self._plans[0].streamed, self._last_answer)
