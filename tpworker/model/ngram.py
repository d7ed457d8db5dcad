"""Drafts from what a sequence repeats, in torch: the definition of `Operations.look_up`.

Prompt look-up (Saxena, 2023): the last n tokens of a sequence have stood in it before, and so may what comes
next. It needs no weights, and pays where an answer quotes its prompt or itself.

    … a b c d e … x b c │ d e …     n = 2: behind `b c` stood `d e …`, which are the drafts
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpworker.kernels.operands import SlotState


def look_up(slots: Tensor, num_drafts: int, longest: int, shortest: int, state: SlotState) -> None:
    """See `Operations.look_up`. Looks at lengths on the host."""
    stands, limits = state.position[slots].tolist(), state.most_drafts[slots].tolist()
    for slot, last, limit in zip(slots.tolist(), stands, limits, strict=True):
        count = min(limit, num_drafts)
        sequence = state.history[slot, : last + 1]
        if count and (period := _period(sequence, longest, shortest)):
            repeated = torch.arange(count, device=slots.device) % period
            state.drafts[slot, :count] = sequence[last + 1 - period + repeated].long()


def _period(sequence: Tensor, longest: int, shortest: int) -> int:
    """How far back the last tokens stood before: the most of them, the last time; 0: they did not."""
    last = len(sequence) - 1
    ends = sequence[:-1] == sequence[-1]  # places that n-grams before the last one end at
    best = 0
    for size in range(1, min(longest, last) + 1):
        if size > 1:
            back = size - 1  # the token so far before each end is that so far before the last
            ends[back:] &= sequence[: last - back] == sequence[last - back]
            ends[:back] = False
        places = ends.nonzero()[:, 0]
        if not len(places):
            break
        if size >= shortest:
            best = last - int(places[-1])
    return best
