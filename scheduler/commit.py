"""Commit, the sixth verb: a step's tokens go to the requests that were sampled, and what they end, ends.

A step may yield several tokens of a request. What comes behind one that ends it is dropped; so are all tokens
of requests that had ended before, which was not known when the plan was composed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tpworker.ipc.messages import Finish
from tpworker.scheduler.inflight import Answer
from tpworker.scheduler.requests import Request, State
from tpworker.scheduler.told import logprob_row


@dataclass(slots=True)
class Committed:
    """What an answer comes to. The lists are as those of `StepOutput`."""

    requests: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)  # none, where nobody had any
    finished: list[Finish] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)
    filled: list[Request] = field(default_factory=list)  # whose tokens fill a block more
    logprobs_of: list[int] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, answer: Answer, complete: set[Request]) -> Committed:
        """Gives an answer's tokens to its requests.

        Args:
            complete: those whose output ends with what they get here.
        """
        plan, result, committed = answer.plan, answer.result, cls()
        row = 0  # of the result, which has one for each token
        for request, most, count, proposed in zip(
            plan.sampled, plan.most, answer.counts, answer.proposed, strict=True
        ):
            first, row = row, row + count
            request.in_flight -= 1
            if most > 1:
                request.drafted -= most - 1
            if request.state is State.FINISHED:
                continue
            given = committed._give(request, answer.tokens[first:row], request in complete)
            if given < most and request.state is State.DECODING:
                request.computed = request.most_length - 1
            if len(request.tokens) > request.fills_at:
                committed.filled.append(request)
            if given and result.proposed:
                committed.proposed += [proposed] + [0] * (given - 1)
            if plan.wants_logprobs and request.wants_logprobs:
                last = len(committed.tokens)
                committed.logprobs_of += range(last - given, last)
                committed.logprobs.append(logprob_row(result.logprobs, first, given))
        return committed

    def _give(self, request: Request, tokens: list[int], is_complete: bool) -> int:
        """Up to the token that ends it; returns how many. A request that has none of these has ended."""
        for count, token in enumerate(tokens, 1):
            self.requests.append(request.id)
            self.positions.append(request.num_output)
            self.tokens.append(token)
            request.tokens.append(token)
            if token in request.stop_ids or is_complete:
                reason = "stop"
            elif len(request.tokens) >= request.max_length:
                reason = "length"
            else:
                continue
            self.finished.append(Finish(len(self.tokens) - 1, reason))
            self.ended.append(request)
            return count
        return len(tokens)
