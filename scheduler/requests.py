"""A request as the scheduler sees it, and its states.

                 admit                 last chunk composed            stop id, length, abort
    WAITING ───────────► PREFILLING ───────────────────────► DECODING ───────────────────► FINISHED
       ▲                     │                                  │
       └─────────────────────┴──────────── preempt ─────────────┘

Composing runs ahead of the results, so a request has several lengths: `tokens` are known (committed); plans
that are not answered yet, `in_flight`, have sampled a token each at least, and `drafted` more at most:

    tokens        p p p p p p g g g            known: prompt, then generated
    in flight                       ? ?        sampled by plans still unanswered
    drafted                             ? ?    and these, if all their drafts are right
    computed      k k k k k k k k k k k k      KV that the plans composed so far may have written

A decoding request always has computed == most_length - 1: the newest token's KV comes with the step that it
is fed to. What is planned is the most that there may be; each result sets it right. No length exceeds
`max_length`, where ranks end the sequence by themselves.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from enum import Enum, auto
from typing import TYPE_CHECKING

from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.messages import NO_LOGPROBS, Chunk, Sampling, Submit
from tpworker.scheduler.kept_blocks import Node, Root

if TYPE_CHECKING:
    from tpworker.scheduler.guide import Guide

Key = tuple[int, int]
"""(priority, arrival): who is served first, and preempted last. Unique."""


NEVER = 1 << 62
"""More tokens than any request has."""


class State(Enum):
    WAITING = auto()
    PREFILLING = auto()
    DECODING = auto()
    FINISHED = auto()


class Request:
    """One request's progress. The composer changes it; the commit adds tokens to it."""

    __slots__ = (
        "blocks",
        "capacity",
        "computed",
        "drafted",
        "fills_at",
        "grammar",
        "group",
        "guide",
        "id",
        "in_flight",
        "is_resumed",
        "key",
        "last_node",
        "max_length",
        "min_tokens",
        "num_prompt",
        "num_registered",
        "num_told",
        "root",
        "salt",
        "sampling",
        "slot",
        "started",
        "state",
        "stop_ids",
        "target",
        "tokens",
    )

    def __init__(self, submit: Submit, max_model_len: int, arrival: int) -> None:
        self.id = submit.request
        self.key: Key = (submit.priority, arrival)
        self.salt = submit.salt
        self.group = submit.group
        """Of one of several choices: their number."""
        self.root: Root
        """Where it begins in the prefix cache; the composer knows."""
        self.last_node: Node
        """The cache's name for what it has registered, once it has a slot."""
        self.tokens: array[int] = unpack_int32(submit.tokens)
        self.num_prompt = len(self.tokens) - submit.num_delivered
        self.grammar = submit.grammar
        """What its output is held to; None: nothing."""
        self.guide: Guide | None = None
        """Its state in the grammar, once that is compiled."""
        self.min_tokens = submit.sampling.min_tokens
        # Under masks it is for them to see to that: they know whether anything but an end is left.
        is_guided = submit.grammar is not None
        self.sampling: Sampling = replace(submit.sampling, min_tokens=0) if is_guided else submit.sampling
        """What it asks for; of its prompt's logprobs as long as plans have not told them all, see `tell`."""
        self.num_told = 0
        """Prompt tokens behind the first one whose logprobs the plans composed so far tell."""
        if submit.num_delivered:  # a prompt's come before the first token, or with it
            self.num_told = self.num_prompt - 1
            self.sampling = replace(self.sampling, num_prompt_logprobs=NO_LOGPROBS)
        self.stop_ids = frozenset(unpack_int32(submit.sampling.stop_ids))
        max_length = min(self.num_prompt + submit.sampling.max_tokens, max_model_len)
        self.max_length = max(max_length, self.num_prompt + 1)
        """Length, prompt and output, at which the request ends. A step yields a token at least: a prompt of
        max_model_len has one behind it, which no step is fed, and which needs no KV."""
        self.state = State.WAITING
        self.started = False
        """Whether it has ever had a slot."""
        self.is_resumed = submit.is_resumed or submit.num_delivered > 0
        """Whether it had one before a restart."""
        self.in_flight = 0
        """Plans that are not answered yet and sample it."""
        self.drafted = 0
        """Tokens that it may get from them beyond one each."""
        self.slot = -1
        self.reset()

    def reset(self) -> None:
        """Nothing of it is on the device: as before the first admission, and after a preemption."""
        self.blocks: list[int] = []
        self.capacity = 0  # tokens that `blocks` can hold
        self.computed = 0
        self.target = 0  # known tokens to prefill, set at admission
        self.num_registered = 0  # blocks offered to the prefix cache so far
        self.fills_at = NEVER  # tokens beyond which one block more is full, and computed for certain

    def keep_private(self) -> None:
        """Its blocks, those to come included, are offered to nobody: until it begins anew."""
        self.num_registered = self.fills_at = NEVER

    def num_shareable(self, block_size: int) -> int:
        """Blocks of its prompt that choices of the same request can share with it."""
        return min(self.num_prompt, len(self.tokens) - 1) // block_size

    @property
    def wants_logprobs(self) -> bool:
        """Whether the logprobs of its tokens are asked for."""
        return self.sampling.num_logprobs != NO_LOGPROBS

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether those of its prompt are, and have not all been told."""
        return self.sampling.num_prompt_logprobs != NO_LOGPROBS

    def tell(self, chunk: Chunk) -> tuple[int, int]:
        """A plan tells the logprobs of the prompt tokens behind those of a chunk.

        Returns:
            Of how many tokens, and how many of these, the first ones, plans before it have told already.
        """
        last = self.num_prompt - 1
        count = max(0, min(chunk.start + chunk.length, last) - chunk.start)
        num_known = min(count, max(0, self.num_told - chunk.start))
        self.num_told += count - num_known
        if self.num_told == last:  # after a preemption nothing of it is to be computed for their sake
            self.sampling = replace(self.sampling, num_prompt_logprobs=NO_LOGPROBS)
        return count, num_known

    @property
    def is_guided(self) -> bool:
        """Whether its tokens are chosen under masks."""
        return self.grammar is not None

    @property
    def num_output(self) -> int:
        """Generated tokens that are committed."""
        return len(self.tokens) - self.num_prompt

    @property
    def least_length(self) -> int:
        """Length once every plan composed so far is answered, if no draft is right and nothing ends it."""
        return len(self.tokens) + self.in_flight

    @property
    def most_length(self) -> int:
        """The same if all drafts are right."""
        return min(len(self.tokens) + self.in_flight + self.drafted, self.max_length)

    def __repr__(self) -> str:
        return (
            f"Request({self.id}, {self.state.name}, slot={self.slot}, tokens={len(self.tokens)}, "
            f"in_flight={self.in_flight}, computed={self.computed})"
        )
