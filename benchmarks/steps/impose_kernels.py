"""Kernels of imposed.py: one program a slot, loads and stores. Imports Triton: import it on CUDA only."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from benchmarks.steps.imposed import CERTAIN, SHARE_MASK, SHARE_SHIFT, VALUES
from tpworker.kernels.operands import SlotState

NAMES = ("_impose", "_stand_in")
"""What a trace calls them."""


@triton.jit
def _mixed(slot, place):
    """See `imposed.mixed`."""
    word = (slot * 0x9E3779B1 + place * 0x85EBCA77) & 0xFFFFFFFF
    word = ((word ^ (word >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    word = ((word ^ (word >> 12)) * 0x9E3779B1) & 0xFFFFFFFF
    return word ^ (word >> 15)


@triton.jit
def _impose(
    slots, tokens, seeds, positions, drafts, seed_step, drafts_step,
    WIDTH: tl.constexpr, CERTAIN: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    share = (tl.load(seeds + slot * seed_step) >> SHIFT) & MASK
    place = tl.load(positions + slot) + 1
    for index in tl.static_range(WIDTH - 1):
        draft = tl.load(drafts + slot * drafts_step + index)
        token = tl.load(tokens + row * WIDTH + index)
        other = tl.where(token == draft, draft ^ 1, token)
        is_right = _mixed(slot, place + index) % CERTAIN < share
        wanted = tl.where(draft < 0, token, tl.where(is_right, draft, other))
        tl.store(tokens + row * WIDTH + index, wanted)


@triton.jit
def _stand_in(
    slots, positions, most_drafts, drafts, most_step, drafts_step,
    NUM_DRAFTS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    slot = tl.load(slots + tl.program_id(0))
    place = tl.load(positions + slot)
    most = tl.load(most_drafts + slot * most_step)
    for index in tl.static_range(NUM_DRAFTS):
        entry = drafts + slot * drafts_step + index
        is_lacking = (tl.load(entry) < 0) & (index < most)
        tl.store(entry, _mixed(slot, place + index) % VALUES, mask=is_lacking)


def impose(slots: Tensor, tokens: Tensor, width: int, seeds: Tensor, state: SlotState) -> None:
    """See imposed.py."""
    steps = (seeds.stride(0), state.drafts.stride(0))
    _impose[(len(slots),)](slots, tokens, seeds, state.position, state.drafts, *steps, width, CERTAIN,
                           SHARE_SHIFT, SHARE_MASK, num_warps=1)  # fmt: skip


def stand_in(slots: Tensor, num_drafts: int, state: SlotState) -> None:
    """See imposed.py."""
    steps = (state.most_drafts.stride(0), state.drafts.stride(0))
    _stand_in[(len(slots),)](slots, state.position, state.most_drafts, state.drafts, *steps, num_drafts,
                             VALUES, num_warps=1)  # fmt: skip
