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

from tpworker.kernels import pdl
from tpworker.kernels.pdl import start_next, wait

_ENTRIES = 1024  # of a block table, or rows, that a program takes at a time


@triton.jit
def _begin_decode(
    slots, last_token, position, block_table, token_ids, positions, lengths, block_tables, null_slot,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row and BLOCK entries of its block table; the first of a row does the rest."""
    start_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(block_table + slot * WIDTH + entry, mask=entry < WIDTH)
    tl.store(block_tables + row * WIDTH + entry, values, mask=entry < WIDTH)
    if tl.program_id(1) == 0:
        stands = tl.load(position + slot)
        tl.store(token_ids + row, tl.load(last_token + slot))
        tl.store(positions + row, stands)
        tl.store(lengths + row, (stands + 1).to(tl.int32))
        # Padding rows stay where they are: at 0, all in one slot. The others' slots are all different.
        if slot != null_slot:
            tl.store(position + slot, stands + 1)


def begin_decode(
    slots: Tensor, last_token: Tensor, position: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Operations.begin_decode`."""
    num_rows, width = len(slots), block_table.shape[1]
    assert block_table.is_contiguous()
    token_ids, positions = torch.empty_like(slots), torch.empty_like(slots)
    lengths = torch.empty(num_rows, dtype=torch.int32, device=slots.device)
    block_tables = block_table.new_empty(num_rows, width)
    _begin_decode[(num_rows, triton.cdiv(width, _ENTRIES))](
        slots,
        last_token,
        position,
        block_table,
        token_ids,
        positions,
        lengths,
        block_tables,
        len(position) - 1,
        WIDTH=width,
        BLOCK=min(_ENTRIES, triton.next_power_of_2(width)),
        num_warps=1,
        **pdl.options(),
    )
    return token_ids, positions, lengths, block_tables


# Of what depends on the step, no variant may be left to be compiled while it waits.
_VIEWS = ["slots", "counts", "starts", "tokens"]


@triton.jit(do_not_specialize_on_alignment=_VIEWS)
def _begin_mixed(
    slots, counts, starts, tokens, last_token, position, block_table, token_ids, positions, lengths,
    query_starts, block_tables, null_slot,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence and BLOCK entries of its block table; the first of a sequence does the rest."""
    start_next(PDL)
    wait(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + sequence)
    offset = tl.arange(0, BLOCK)
    entry = tl.program_id(1) * BLOCK + offset
    values = tl.load(block_table + slot * WIDTH + entry, mask=entry < WIDTH)
    tl.store(block_tables + sequence * WIDTH + entry, values, mask=entry < WIDTH)
    if tl.program_id(1) == 0:
        first = tl.load(starts + sequence)
        end = tl.load(starts + sequence + 1)
        stands = tl.load(position + slot)
        last = tl.load(last_token + slot)
        is_padding = slot == null_slot
        start = first
        while start < end:
            token = tl.load(tokens + start + offset, mask=start + offset < end, other=0)
            place = tl.where(is_padding, 0, stands + start - first + offset)
            tl.store(token_ids + start + offset, tl.where(token < 0, last, token), mask=start + offset < end)
            tl.store(positions + start + offset, place, mask=start + offset < end)
            start += BLOCK
        length = stands + tl.load(counts + sequence)
        tl.store(lengths + sequence, length.to(tl.int32))
        tl.store(query_starts + sequence, first.to(tl.int32))
        if sequence == tl.num_programs(0) - 1:
            tl.store(query_starts + sequence + 1, end.to(tl.int32))
        tl.debug_barrier()  # every thread has read where the slot stands
        if slot != null_slot:
            tl.store(position + slot, length)


def begin_mixed(
    slots: Tensor,
    counts: Tensor,
    starts: Tensor,
    tokens: Tensor,
    last_token: Tensor,
    position: Tensor,
    block_table: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Operations.begin_mixed`."""
    num_sequences, width = len(slots), block_table.shape[1]
    assert position.is_contiguous()
    assert block_table.is_contiguous()
    token_ids, positions = torch.empty_like(tokens), torch.empty_like(tokens)
    lengths = torch.empty(num_sequences, dtype=torch.int32, device=slots.device)
    query_starts = torch.empty(num_sequences + 1, dtype=torch.int32, device=slots.device)
    block_tables = block_table.new_empty(num_sequences, width)
    block = min(_ENTRIES, triton.next_power_of_2(width))
    _begin_mixed[(num_sequences, triton.cdiv(width, block))](
        slots,
        counts,
        starts,
        tokens,
        last_token,
        position,
        block_table,
        token_ids,
        positions,
        lengths,
        query_starts,
        block_tables,
        len(position) - 1,
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
        **pdl.options(),
    )
    return token_ids, positions, lengths, query_starts, block_tables


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots", "tokens"])
def _finish_step(
    slots, tokens, last_token, counter, ring, num_rows, NUM_RING_ROWS: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program."""
    start_next(PDL)
    wait(PDL)
    step = tl.load(counter) + 1
    to_row = ring + (step % NUM_RING_ROWS) * STRIDE
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        exists = row < num_rows
        token = tl.load(tokens + row, mask=exists)
        slot = tl.load(slots + row, mask=exists)
        tl.store(last_token + slot, token ^ (token >> 63), mask=exists)  # ~token, if it is below 0
        tl.store(to_row + 1 + row, token, mask=exists)
    tl.store(to_row, step)
    tl.debug_barrier()  # every thread has read the counter
    tl.store(counter, step)


def finish_step(slots: Tensor, tokens: Tensor, last_token: Tensor, counter: Tensor, ring: Tensor) -> None:
    """See `Operations.finish_step`."""
    assert ring.stride(1) == 1
    _finish_step[(1,)](
        slots,
        tokens,
        last_token,
        counter,
        ring,
        len(tokens),
        NUM_RING_ROWS=len(ring),
        STRIDE=ring.stride(0),
        BLOCK=_ENTRIES,
        num_warps=4,
        **pdl.options(),
    )
