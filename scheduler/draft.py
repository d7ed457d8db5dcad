"""A plan in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from tpworker.ipc.messages import MAX_TOLD, Admission, Chunk, Grant, Started
from tpworker.scheduler.inflight import InFlight, PromptPart
from tpworker.scheduler.requests import Request


@dataclass(slots=True)
class Draft:
    """What a plan has so far, and what is left of its budget."""

    budget: int
    num_drafts: int
    room_to_tell: int = MAX_TOLD  # of the budget, for prompts whose logprobs are asked for
    decoding: list[Request] = field(default_factory=list)
    prefilling: list[Request] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    told: list[PromptPart] = field(default_factory=list)

    def in_flight(
        self, step: int, any_asks: bool, any_guided: bool, registered: list[tuple[int, int]]
    ) -> InFlight:
        """The snapshot that the plan's results will be resolved through.

        Args:
            any_asks, any_guided: whether any running request wants logprobs, or is held to a grammar.
            registered: see `InFlight`.
        """
        chunks = zip(self.prefilling, self.chunks, strict=True)
        sampled = self.decoding + [request for request, chunk in chunks if chunk.sample]
        guided = []
        if any_guided:
            guided = [
                (request.slot, request, request.least_length - 1 - request.num_prompt)
                for request in sampled
                if request.is_guided
            ]
        most = [1] * len(sampled)
        if self.num_drafts:
            most[: len(self.decoding)] = [1 + self.num_drafts * (not r.is_guided) for r in self.decoding]
        return InFlight(
            step,
            sampled,
            most,
            any_asks and any(request.wants_logprobs for request in sampled),
            tuple(self.started),
            self.told,
            sum(chunk.length for chunk in self.chunks),
            len(self.decoding),
            self.num_drafts,
            guided,
            registered,
        )
