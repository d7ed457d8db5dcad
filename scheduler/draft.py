"""A plan in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from tpworker.ipc.messages import MAX_TOLD, Admission, Chunk, Grant, Started
from tpworker.scheduler.inflight import PromptPart
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
