"""Drafts that are right as often as a benchmark says: with dummy weights hardly any would be.

A request's seed, which means nothing else for greedy ones, says how many drafts it gets and how often each of
them is right (`Order`). At the end of a step, just before tokens are compared with drafts, each token with a
draft beside it is replaced on the device: by the draft where a hash of slot and position says so, else by
another token. Nothing that is served knows of it: a benchmark's rank wraps the operations of its slot table.
Drafts are made as they are served. Where a look-up has found nothing, and in random text it does not, tokens
of a hash stand in for them, so that there always are drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpworker.kernels.operands import SlotState

AUTO = 15
"""In place of a number of drafts: the scheduler chooses."""
CERTAIN = 1000
"""Shares of drafts that are right are whole numbers of so many."""
SHARE_SHIFT, SHARE_MASK = 20, 1023
"""Where a share is in a seed."""
VALUES = 256
"""Tokens that stand in; every vocabulary has as many."""
_WORD = (1 << 32) - 1
_MIX_SLOT, _MIX_PLACE, _MIX = 0x9E3779B1, 0x85EBCA77, 0x2C1B3C6D


@dataclass(frozen=True, slots=True)
class Order:
    """What the requests of a batch say."""

    number: int
    """Of the batch, from 1."""
    num_drafts: int
    """Or AUTO."""
    share: int = 0
    """Of CERTAIN, how often a draft is right."""
    is_traced: bool = False

    @property
    def seed(self) -> int:
        assert 0 < self.number < 1 << 12
        assert 0 <= self.share <= CERTAIN
        return self.number | self.num_drafts << 12 | self.is_traced << 16 | self.share << SHARE_SHIFT

    @classmethod
    def of(cls, seed: int) -> Order:
        share = seed >> SHARE_SHIFT & SHARE_MASK
        return cls(seed & 0xFFF, seed >> 12 & 15, share, bool(seed >> 16 & 1))


def mixed(slots: Tensor, places: Tensor) -> Tensor:
    """A hash of slot and position, below 2 ** 32; int64. impose_kernels.py has the same."""
    word = (slots * _MIX_SLOT + places * _MIX_PLACE) & _WORD
    word = ((word ^ (word >> 15)) * _MIX) & _WORD
    word = ((word ^ (word >> 12)) * _MIX_SLOT) & _WORD
    return word ^ (word >> 15)


def impose(slots: Tensor, tokens: Tensor, width: int, seeds: Tensor, state: SlotState) -> None:
    """Replaces tokens (int64 [S W], those of each slot) of which there are drafts. Definition of the kernel.

    Args:
        slots: int64 [S].
        seeds: int64 [N], of all slots.
    """
    drafts = state.drafts[slots, : width - 1]
    chosen = tokens.view(len(slots), width)[:, :-1]
    places = state.position[slots][:, None] + torch.arange(1, width, device=slots.device)
    is_right = mixed(slots[:, None], places) % CERTAIN < (seeds[slots] >> SHARE_SHIFT & SHARE_MASK)[:, None]
    other = torch.where(chosen == drafts, drafts ^ 1, chosen)
    chosen.copy_(torch.where(drafts < 0, chosen, torch.where(is_right, drafts, other)))


def stand_in(slots: Tensor, num_drafts: int, state: SlotState) -> None:
    """Gives slots (int64 [S]) the drafts that they lack, of those that they may have."""
    drafts = state.drafts[slots, :num_drafts]
    index = torch.arange(num_drafts, device=slots.device)
    values = mixed(slots[:, None], state.position[slots][:, None] + index) % VALUES
    is_lacking = (drafts < 0) & (index < state.most_drafts[slots][:, None])
    state.drafts[slots, :num_drafts] = torch.where(is_lacking, values, drafts)


class Imposed:
    """`Operations` of a slot table, with acceptance imposed.

    Args:
        operations: to be wrapped.
        seeds: int64 [N], of all slots; the same tensor for ever.
    """

    def __init__(self, operations: Any, seeds: Tensor) -> None:
        self._operations = operations
        self._seeds = seeds
        self._impose, self._stand_in = impose, stand_in
        if seeds.device.type == "cuda":
            from benchmarks.steps import impose_kernels

            self._impose, self._stand_in = impose_kernels.impose, impose_kernels.stand_in

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operations, name)

    def finish_step(
        self, slots: Tensor, tokens: Tensor, width: int, state: SlotState, counter: Tensor, ring: Tensor
    ) -> Tensor:
        """As it is, of other tokens."""
        if width > 1 and len(slots):
            self._impose(slots, tokens, width, self._seeds, state)
        counts: Tensor = self._operations.finish_step(slots, tokens, width, state, counter, ring)
        return counts

    def look_up(self, slots: Tensor, num_drafts: int, longest: int, shortest: int, state: SlotState) -> None:
        """As it is; then there are drafts."""
        self._operations.look_up(slots, num_drafts, longest, shortest, state)
        self._stand_in(slots, num_drafts, state)
