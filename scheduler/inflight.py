"""Plans that are not answered yet, oldest first.

Each keeps its own snapshot of who sampled which row: slots are given to other requests while old results
are still on their way (invariant 5), so a result is never resolved through the slots of today.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.messages import LOGPROB_ROW_BYTES, Started, StepResult
from tpworker.ipc.patience import Patience
from tpworker.scheduler.deadlines import Deadlines
from tpworker.scheduler.filling import Filling
from tpworker.scheduler.requests import Request

ENOUGH_SECONDS = 0.005
"""Of plans that wait behind the one that runs. More work there does nothing for a host that needs less time
than that for the next plan, and a prompt that comes has to wait for all of it."""

STEP_PATIENCE = 1.25
"""Times a step's deadline: the ranks, who wait for each other that long, know better whom they miss."""


class ProtocolError(Exception):
    """A rank answered something that it was not asked."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Prompt tokens of whose logprobs a plan's result will tell."""

    request: Request
    position: int  # of the first one
    count: int
    num_known: int  # of these, the first ones, that were told before a preemption


@dataclass(frozen=True, slots=True)
class InFlight:
    """One unanswered plan."""

    step: int
    sampled: list[Request]  # whose tokens come back, in the plan's order
    most: list[int]  # tokens that each of them may get
    wants_logprobs: bool  # any of these
    started: tuple[Started, ...]  # who got a first slot: told with the launch of this plan
    told: list[PromptPart]  # in the order of their chunks
    num_prefill_tokens: int
    num_decodes: int
    num_drafts: int
    guided: list[tuple[int, Request, int]]  # of `sampled`: the slot, whose it is, which token of its output
    registered: list[tuple[int, int]]  # blocks with their contents, known to be computed when it is answered

    @property
    def num_tokens(self) -> int:
        """That it computes."""
        return self.num_prefill_tokens + self.num_decodes * (1 + self.num_drafts)


@dataclass(frozen=True, slots=True)
class Answer:
    """A plan and its result."""

    plan: InFlight
    result: StepResult
    tokens: list[int]  # of one of `plan.sampled` behind those of another
    counts: list[int]  # how many each of them got
    proposed: list[int]  # drafts that each had

    @classmethod
    def of(cls, plan: InFlight, result: StepResult) -> Answer:
        """Raises ProtocolError unless there are as many of everything as the plan asks for."""
        step, num_sampled = result.step, len(plan.sampled)
        tokens = unpack_int32(result.tokens).tolist()
        counts = unpack_int32(result.counts).tolist() if result.counts else [1] * num_sampled
        proposed = unpack_int32(result.proposed).tolist() if result.proposed else [0] * num_sampled
        if len(counts) != num_sampled or len(proposed) != num_sampled or sum(counts) != len(tokens):
            raise ProtocolError(
                f"step {step}: {len(tokens)} tokens, {len(counts)} counts, {len(proposed)} numbers of drafts "
                f"for {num_sampled} slots"
            )
        if result.counts and any(not 0 <= n <= most for n, most in zip(counts, plan.most, strict=True)):
            raise ProtocolError(f"step {step}: {counts} tokens, where at most {plan.most} were asked for")
        if result.proposed and any(not 0 <= n < most for n, most in zip(proposed, plan.most, strict=True)):
            raise ProtocolError(
                f"step {step}: {proposed} drafts, where at most {plan.most} tokens were asked for"
            )
        _check_rows(step, result.logprobs, len(tokens) if plan.wants_logprobs else 0)
        _check_rows(step, result.prompt_logprobs, sum(part.count for part in plan.told))
        return cls(plan, result, tokens, counts, proposed)


class InFlightPlans:
    """At most `lookahead` + 1 plans; answers come in step order.

    Args:
        lookahead: see above.
        deadlines: how long the oldest plan may take to be answered, and told how long each took.
        filling: knows what a plan should take; None: that does not count.
    """

    def __init__(self, lookahead: int, deadlines: Deadlines, filling: Filling | None = None) -> None:
        self._limit = lookahead + 1
        self._plans: deque[InFlight] = deque()
        self._deadlines = deadlines
        self._seconds: deque[float] = deque()  # that each plan may take
        self._filling = filling
        self._expected: deque[float] = deque()  # seconds that each should take; 0: not known
        self.patience = Patience(0.0)
        """With the oldest plan, since it has been the next to be answered. Not since it was streamed: with
        lookahead it waited its turn behind others."""

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def oldest(self) -> InFlight:
        """The one that is the next to be answered; there must be one."""
        return self._plans[0]

    @property
    def deadline(self) -> float:
        """Seconds that the oldest plan may take; there must be one. `patience` is a little longer."""
        return self._seconds[0]

    @property
    def longest_deadline(self) -> float:
        """Seconds, of all plans; there must be one."""
        return max(self._seconds)

    def has_room(self) -> bool:
        """Whether one more plan may be streamed before the oldest is answered, and would be of use."""
        ahead = sum(islice(self._expected, 1, None))
        return len(self._plans) < self._limit and ahead < ENOUGH_SECONDS

    def add(self, plan: InFlight) -> None:
        assert len(self._plans) < self._limit
        self._plans.append(plan)
        seconds = self._filling.expected(plan.num_decodes, plan.num_prefill_tokens) if self._filling else 0.0
        self._expected.append(seconds)
        self._seconds.append(self._deadlines.of(plan.num_tokens))
        if len(self._plans) == 1:
            self.patience = Patience(self.deadline * STEP_PATIENCE)

    def answered(self, result: StepResult) -> Answer:
        """The plan that a result answers, and what it says.

        Raises:
            ProtocolError: it is not the answer to the oldest plan, or has the wrong number of tokens.
        """
        if not self._plans or self._plans[0].step != result.step:
            waiting = self._plans[0].step if self._plans else None
            raise ProtocolError(f"an answer to step {result.step}, but the oldest unanswered is {waiting}")
        answer = Answer.of(self._plans.popleft(), result)
        self._seconds.popleft()
        self._expected.popleft()
        self._deadlines.answered(answer.plan.num_tokens, self.patience.spent())
        if self._plans:
            self.patience = Patience(self.deadline * STEP_PATIENCE)
        return answer


def _check_rows(step: int, rows: bytes, count: int) -> None:
    """Raises ProtocolError unless there are so many logprob rows."""
    if len(rows) != count * LOGPROB_ROW_BYTES:
        raise ProtocolError(f"step {step}: {len(rows)} bytes of logprobs for {count} rows")
