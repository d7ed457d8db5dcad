"""Drafts from what a sequence repeats, see `tpworker.model.ngram`. Imports Triton: on CUDA only.

    1. a program a slot and part of its history: the best place in it, of all that an n-gram may end at
    2. a program a slot: the best of all parts, and what stands behind it

"Best" is the greatest of (tokens alike, place), so it does not matter in which order parts are done. Parts
that a sequence does not reach end at once: short ones cost two launches and little more.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import pdl
from tpworker.kernels.operands import SlotState
from tpworker.kernels.pdl import start_next, wait

_TILE = 2048  # places that a program looks at at a time
_PROGRAMS = 512  # that share the histories of all slots
_PLACE_BITS = tl.constexpr(40)  # of (tokens alike, place) in one integer
_PLACES = tl.constexpr((1 << 40) - 1)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _search(
    slots, position, most_drafts, history, best,
    STRIDE: tl.constexpr, LENGTH: tl.constexpr, LONGEST: tl.constexpr, SHORTEST: tl.constexpr,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a slot and every so manieth tile of its history; STRIDE: of `most_drafts`."""
    start_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    last = tl.load(position + slot).to(tl.int32)
    first = tl.program_id(1) * TILE
    if (tl.load(most_drafts + slot * STRIDE) > 0) & (first < last):
        sequence = history + slot * LENGTH
        key = tl.full([TILE], -1, tl.int64)
        for start in range(first, last, tl.num_programs(1) * TILE):
            place = start + tl.arange(0, TILE)
            is_alike = place < last
            num_alike = tl.zeros([TILE], tl.int64)
            for back in tl.static_range(LONGEST):
                # Before the first token nothing is alike.
                token = tl.load(sequence + place - back, mask=(place >= back) & (place < last), other=-1)
                wanted = tl.load(sequence + last - back, mask=last >= back, other=-2)
                is_alike = is_alike & (token == wanted)
                num_alike += is_alike.to(tl.int64)
            key = tl.maximum(key, tl.where(num_alike >= SHORTEST, (num_alike << _PLACE_BITS) + place, -1))
        tl.store(best + row * tl.num_programs(1) + tl.program_id(1), tl.max(key))


@triton.jit(do_not_specialize=["num_drafts"], do_not_specialize_on_alignment=["slots"])
def _draft(
    slots, position, most_drafts, drafts, history, best, num_drafts,
    STRIDE: tl.constexpr, MOST_DRAFTS: tl.constexpr, LENGTH: tl.constexpr, TILE: tl.constexpr,
    NUM_PARTS: tl.constexpr, PARTS: tl.constexpr, DRAFTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a slot; DRAFTS: the next power of two of MOST_DRAFTS, what a slot has room for."""
    start_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    last = tl.load(position + slot)
    count = tl.minimum(tl.load(most_drafts + slot * STRIDE), num_drafts)
    part = tl.arange(0, PARTS)
    was_searched = (part < NUM_PARTS) & (part * TILE < last) & (count > 0)
    key = tl.max(tl.load(best + row * NUM_PARTS + part, mask=was_searched, other=-1))
    if key >= 0:
        place = key & _PLACES
        number = tl.arange(0, DRAFTS)
        is_made = number < count
        behind = place + 1 + number % (last - place)  # over and over, where the history ends
        draft = tl.load(history + slot * LENGTH + behind, mask=is_made, other=0)
        tl.store(drafts + slot * MOST_DRAFTS + number, draft.to(tl.int64), mask=is_made)


def look_up(slots: Tensor, num_drafts: int, longest: int, shortest: int, state: SlotState) -> None:
    """See `Operations.look_up`."""
    num_slots, length, most_drafts = len(slots), state.history.shape[1], state.drafts.shape[1]
    assert num_drafts <= most_drafts
    assert state.history.is_contiguous()
    assert state.drafts.is_contiguous()
    tile = min(_TILE, triton.next_power_of_2(length))
    num_parts = min(max(_PROGRAMS // num_slots, 1), triton.cdiv(length, tile))
    best = torch.empty(num_slots, num_parts, dtype=torch.int64, device=slots.device)
    _search[(num_slots, num_parts)](
        slots,
        state.position,
        state.most_drafts,
        state.history,
        best,
        STRIDE=state.most_drafts.stride(0),
        LENGTH=length,
        LONGEST=longest,
        SHORTEST=shortest,
        TILE=tile,
        num_warps=4,
        **pdl.options(),
    )
    _draft[(num_slots,)](
        slots,
        state.position,
        state.most_drafts,
        state.drafts,
        state.history,
        best,
        num_drafts,
        STRIDE=state.most_drafts.stride(0),
        MOST_DRAFTS=most_drafts,
        LENGTH=length,
        TILE=tile,
        NUM_PARTS=num_parts,
        PARTS=triton.next_power_of_2(num_parts),
        DRAFTS=triton.next_power_of_2(most_drafts),
        num_warps=1,
        **pdl.options(),
    )
