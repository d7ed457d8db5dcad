"""What a step reads from the slot table and writes to it, in one kernel each. Imports Triton: on CUDA only.

In torch these are some dozen kernels of 2 µs, of which each moves a few bytes.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import operands, pdl
from tpworker.kernels.operands import SlotState
from tpworker.kernels.pdl import start_next, wait

_ENTRIES = 1024  # of a block table, or rows, that a program takes at a time
_NO_TOKEN = tl.constexpr(operands.NO_TOKEN)


@triton.jit
def _begin_decode(
    slots, last_token, position, drafts, block_table, token_ids, positions, lengths, block_tables,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, NUM_DRAFTS: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a slot and BLOCK entries of its block table; the first of a slot does the rest.

    ROWS: the next power of two of WIDTH.
    """
    start_next(PDL)
    wait(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + sequence)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(block_table + slot * NUM_BLOCKS + entry, mask=entry < NUM_BLOCKS)
    tl.store(block_tables + sequence * NUM_BLOCKS + entry, values, mask=entry < NUM_BLOCKS)
    if tl.program_id(1) == 0:
        stands = tl.load(position + slot)
        last = tl.load(last_token + slot)
        tl.store(lengths + sequence, (stands + WIDTH).to(tl.int32))
        if WIDTH == 1:
            tl.store(token_ids + sequence, last)
            tl.store(positions + sequence, stands)
        else:
            place = tl.arange(0, ROWS)
            exists = place < WIDTH
            draft = tl.load(drafts + slot * NUM_DRAFTS + place - 1, mask=exists & (place > 0), other=0)
            token = tl.where(place == 0, last, tl.maximum(draft, 0))
            tl.store(token_ids + sequence * WIDTH + place, token, mask=exists)
            tl.store(positions + sequence * WIDTH + place, stands + place, mask=exists)


def begin_decode(slots: Tensor, width: int, state: SlotState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Operations.begin_decode`."""
    num_slots, num_blocks = len(slots), state.block_table.shape[1]
    assert _are_plain(state)
    assert width <= 1 + state.drafts.shape[1]
    token_ids, positions = slots.new_empty(2, num_slots * width).unbind()
    lengths = torch.empty(num_slots, dtype=torch.int32, device=slots.device)
    block_tables = state.block_table.new_empty(num_slots, num_blocks)
    _begin_decode[(num_slots, triton.cdiv(num_blocks, _ENTRIES))](
        slots,
        state.last_token,
        state.position,
        state.drafts,
        state.block_table,
        token_ids,
        positions,
        lengths,
        block_tables,
        WIDTH=width,
        ROWS=triton.next_power_of_2(width),
        NUM_DRAFTS=state.drafts.shape[1],
        NUM_BLOCKS=num_blocks,
        BLOCK=min(_ENTRIES, triton.next_power_of_2(num_blocks)),
        num_warps=1,
        **pdl.options(),
    )
    return token_ids, positions, lengths, block_tables


def _are_plain(state: SlotState) -> bool:
    """Whether the columns lie as the kernels read them."""
    columns = (state.last_token, state.position, state.drafts, state.history, state.block_table)
    return all(column.is_contiguous() for column in columns)


# Of what depends on the step, no variant may be left to be compiled while it waits.
_VIEWS = ["slots", "counts", "moves", "starts", "tokens"]


@triton.jit(do_not_specialize_on_alignment=_VIEWS)
def _begin_mixed(
    slots, counts, moves, starts, tokens, last_token, position, drafts, block_table, token_ids, positions,
    lengths, query_starts, block_tables, null_slot,
    NUM_DRAFTS: tl.constexpr, DRAFTS: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence and BLOCK entries of its block table; the first of a sequence does the rest.

    DRAFTS: the next power of two of NUM_DRAFTS.
    """
    start_next(PDL)
    wait(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + sequence)
    offset = tl.arange(0, BLOCK)
    entry = tl.program_id(1) * BLOCK + offset
    values = tl.load(block_table + slot * NUM_BLOCKS + entry, mask=entry < NUM_BLOCKS)
    tl.store(block_tables + sequence * NUM_BLOCKS + entry, values, mask=entry < NUM_BLOCKS)
    if tl.program_id(1) == 0:
        first = tl.load(starts + sequence)
        end = tl.load(starts + sequence + 1)
        stands = tl.load(position + slot)
        last = tl.load(last_token + slot)
        is_padding = slot == null_slot
        start = first
        while start < end:
            exists = start + offset < end
            token = tl.load(tokens + start + offset, mask=exists, other=0)
            place = tl.where(is_padding, 0, stands + start - first + offset)
            known = tl.zeros_like(token) + last
            if NUM_DRAFTS > 0:
                is_draft = exists & (token < -1)
                draft = tl.load(drafts + slot * NUM_DRAFTS - 2 - token, mask=is_draft, other=0)
                known = tl.where(is_draft, tl.maximum(draft, 0), known)
            tl.store(token_ids + start + offset, tl.where(token < 0, known, token), mask=exists)
            tl.store(positions + start + offset, place, mask=exists)
            start += BLOCK
        tl.store(lengths + sequence, (stands + tl.load(counts + sequence)).to(tl.int32))
        tl.store(query_starts + sequence, first.to(tl.int32))
        if sequence == tl.num_programs(0) - 1:
            tl.store(query_starts + sequence + 1, end.to(tl.int32))
        tl.debug_barrier()  # every thread has read where the slot stands
        if slot != null_slot:
            tl.store(position + slot, stands + tl.load(moves + sequence))
            if NUM_DRAFTS > 0:
                is_chunk = (first < end) & (tl.load(tokens + first, mask=first < end, other=-1) >= 0)
                number = tl.arange(0, DRAFTS)
                none = tl.full([DRAFTS], -1, tl.int64)
                tl.store(drafts + slot * NUM_DRAFTS + number, none, mask=is_chunk & (number < NUM_DRAFTS))


def begin_mixed(
    slots: Tensor, counts: Tensor, moves: Tensor, starts: Tensor, tokens: Tensor, state: SlotState
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Operations.begin_mixed`."""
    num_sequences, (null_slot, num_blocks) = len(slots), state.block_table.shape
    null_slot -= 1
    assert _are_plain(state)
    token_ids, positions = torch.empty_like(tokens), torch.empty_like(tokens)
    lengths = torch.empty(num_sequences, dtype=torch.int32, device=slots.device)
    query_starts = torch.empty(num_sequences + 1, dtype=torch.int32, device=slots.device)
    block_tables = state.block_table.new_empty(num_sequences, num_blocks)
    block = min(_ENTRIES, triton.next_power_of_2(num_blocks))
    _begin_mixed[(num_sequences, triton.cdiv(num_blocks, block))](
        slots,
        counts,
        moves,
        starts,
        tokens,
        state.last_token,
        state.position,
        state.drafts,
        state.block_table,
        token_ids,
        positions,
        lengths,
        query_starts,
        block_tables,
        null_slot,
        NUM_DRAFTS=state.drafts.shape[1],
        DRAFTS=triton.next_power_of_2(state.drafts.shape[1]),
        NUM_BLOCKS=num_blocks,
        BLOCK=block,
        num_warps=4,
        **pdl.options(),
    )
    return token_ids, positions, lengths, query_starts, block_tables


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["slots", "tokens"])
def _finish_step(
    slots, tokens, last_token, position, end, drafts, history, counter, ring, counts, num_slots, null_slot,
    NUM_RING_ROWS: tl.constexpr, STRIDE: tl.constexpr, END_STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, NUM_DRAFTS: tl.constexpr, DRAFTS: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program, BLOCK slots at a time.

    ROWS, DRAFTS: the next powers of two of WIDTH and NUM_DRAFTS; LENGTH: of a slot's history.
    """
    start_next(PDL)
    wait(PDL)
    step = tl.load(counter) + 1
    to_row = ring + (step % NUM_RING_ROWS) * STRIDE
    for start in range(0, num_slots, BLOCK):
        sequence = start + tl.arange(0, BLOCK)
        exists = sequence < num_slots
        slot = tl.load(slots + sequence, mask=exists, other=0)
        stands = tl.load(position + slot, mask=exists, other=0)
        room = tl.load(end + slot * END_STRIDE, mask=exists, other=0) - stands - 1
        if WIDTH == 1:
            token = tl.load(tokens + sequence, mask=exists, other=0)
            count = tl.minimum(tl.maximum(room, 0), 1)
            is_taken = exists & (count > 0)
            last = token ^ (token >> 63)  # ~token, if it is below 0
            tl.store(to_row + 1 + sequence, tl.where(is_taken, token, _NO_TOKEN), mask=exists)
            if LENGTH > 0:
                tl.store(history + slot * LENGTH + stands + 1, last.to(tl.int32), mask=is_taken)
        else:
            count, last = _take(
                tokens, drafts, history, to_row, sequence, slot, stands, room, exists,
                WIDTH, ROWS, NUM_DRAFTS, LENGTH,
            )  # fmt: skip
        tl.store(counts + sequence, count, mask=exists)
        tl.store(last_token + slot, last, mask=exists & (count > 0))
        if NUM_DRAFTS > 0:  # a slot is held by several threads only then, if WIDTH is large
            tl.debug_barrier()  # every thread has read where it stands, and its drafts
        tl.store(position + slot, stands + count, mask=exists & (slot != null_slot))
        if NUM_DRAFTS > 0:
            number = tl.arange(0, DRAFTS)[None, :]
            none = tl.full([BLOCK, DRAFTS], -1, tl.int64)
            is_draft = exists[:, None] & (number < NUM_DRAFTS)
            tl.store(drafts + slot[:, None] * NUM_DRAFTS + number, none, mask=is_draft)
    tl.store(to_row, step)
    tl.debug_barrier()  # every thread has read the counter
    tl.store(counter, step)


@triton.jit
def _take(
    tokens, drafts, history, to_row, sequence, slot, stands, room, exists,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, NUM_DRAFTS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """What slots with drafts get, into ring and history; int64 [BLOCK]: how many tokens, the last of them."""
    place = tl.arange(0, ROWS)[None, :]
    is_row = exists[:, None] & (place < WIDTH)
    is_draft = exists[:, None] & (place < WIDTH - 1)
    token = tl.load(tokens + sequence[:, None] * WIDTH + place, mask=is_row, other=0)
    draft = tl.load(drafts + slot[:, None] * NUM_DRAFTS + place, mask=is_draft, other=-1)
    # None is right where the logits were NaN: tokens are below 0 there, and -1 is no draft.
    is_right = (draft >= 0) & (draft == token)
    num_right = tl.min(tl.where(is_right, ROWS, place), axis=1)
    num_proposed = tl.min(tl.where(draft >= 0, ROWS, place), axis=1)
    count = tl.maximum(tl.minimum(num_right + 1, room), 0)
    is_taken = is_row & (place < count[:, None])
    plain = token ^ (token >> 63)
    last = tl.sum(tl.where(place == count[:, None] - 1, plain, 0), axis=1)
    to_slot = to_row + 1 + sequence * (WIDTH + 1)
    tl.store(to_slot[:, None] + place, tl.where(is_taken, token, _NO_TOKEN), mask=is_row)
    tl.store(to_slot + WIDTH, num_proposed.to(tl.int64), mask=exists)
    if LENGTH > 0:
        to_history = history + slot[:, None] * LENGTH + stands[:, None] + 1 + place
        tl.store(to_history, plain.to(tl.int32), mask=is_taken)
    return count, last


def finish_step(
    slots: Tensor, tokens: Tensor, width: int, state: SlotState, counter: Tensor, ring: Tensor
) -> Tensor:
    """See `Operations.finish_step`."""
    num_drafts, rows = state.drafts.shape[1], triton.next_power_of_2(width)
    assert ring.stride(1) == 1
    assert _are_plain(state)
    assert width <= 1 + num_drafts
    assert len(tokens) == len(slots) * width
    counts = torch.empty_like(slots)
    _finish_step[(1,)](
        slots,
        tokens,
        state.last_token,
        state.position,
        state.end,
        state.drafts,
        state.history,
        counter,
        ring,
        counts,
        len(slots),
        len(state.position) - 1,
        NUM_RING_ROWS=len(ring),
        STRIDE=ring.stride(0),
        END_STRIDE=state.end.stride(0),
        WIDTH=width,
        ROWS=rows,
        NUM_DRAFTS=num_drafts,
        DRAFTS=triton.next_power_of_2(num_drafts),
        LENGTH=state.history.shape[1],
        BLOCK=_ENTRIES // rows,
        num_warps=4,
        **pdl.options(),
    )
    return counts
