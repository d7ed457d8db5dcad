"""The kernel of `tpworker.model.attention.split`. Imports Triton: import it on CUDA only."""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tpworker.model import pdl
from tpworker.model.attention.split import Cut
from tpworker.model.pdl import start_next, wait


@triton.jit
def _attend(
    queries, keys, values, block_tables, lengths, sums, maxima, totals, arrived, out, scale, table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    REAL_ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence, key-value head and part of the sequence; online softmax (arXiv 1805.02867)."""
    start_next(PDL)
    wait(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(lengths + sequence)
    # Parts are whole tiles. Those beyond the end have nothing to do and are not waited for.
    part_length = tl.cdiv(tl.cdiv(length, NUM_PARTS), TILE) * TILE
    num_active = tl.maximum(tl.cdiv(length, tl.maximum(part_length, 1)), 1)
    if part >= num_active:
        return
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_real = (row < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    place = (sequence * NUM_KV_HEADS + kv_head) * (GROUP * HEAD_DIM)
    place += row[:, None] * HEAD_DIM + column[None, :]
    end = tl.minimum(part * part_length + part_length, length)
    query = tl.load(queries + place, mask=is_real, other=0.0)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(part * part_length, end, TILE):
        position = start + tl.arange(0, TILE)
        exists = position < end
        block = tl.load(block_tables + sequence * table_stride + position // BLOCK_SIZE, mask=exists, other=0)
        token = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        source = (token * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + column[None, :]
        readable = exists[:, None] & (column < HEAD_DIM)[None, :]
        key = tl.load(keys + source, mask=readable, other=0.0)
        value = tl.load(values + source, mask=readable, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(exists[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        shrink = tl.exp(maximum - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        attended = attended * shrink[:, None]
        attended += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        maximum = higher
    if num_active == 1:
        result = attended / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=is_real)
    else:
        head = sequence * NUM_KV_HEADS + kv_head
        place_of_part = (head * NUM_PARTS + part) * GROUP + row
        tl.store(maxima + place_of_part, maximum, mask=row < GROUP)
        tl.store(totals + place_of_part, total, mask=row < GROUP)
        to_sums = sums + place_of_part[:, None] * HEAD_DIM + column[None, :]
        tl.store(to_sums, attended, mask=is_real)
        # All of the program's threads have written before one of them says so.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(arrived + head, 1, sem="acq_rel")
        if num_arrived == num_active - 1:
            _combine(
                maxima, totals, sums, out + head * (GROUP * HEAD_DIM), head * NUM_PARTS, num_active,
                GROUP, HEAD_DIM, PARTS, REAL_ROWS, COLUMNS,
            )  # fmt: skip
            tl.store(arrived + head, 0)  # for the next layer


@triton.jit
def _combine(
    maxima, totals, sums, out, first_part, num_active,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, REAL_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The last to arrive puts the parts together: all loads at once, and always in the same order."""
    part = tl.arange(0, PARTS)[:, None]
    row = tl.arange(0, REAL_ROWS)[None, :]
    column = tl.arange(0, COLUMNS)
    exists = (part < num_active) & (row < GROUP)
    place = (first_part + part) * GROUP + row
    maximum = tl.load(maxima + place, mask=exists, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(totals + place, mask=exists, other=0.0, cache_modifier=".cg")
    readable = exists[:, :, None] & (column < HEAD_DIM)[None, None, :]
    source = sums + place[:, :, None] * HEAD_DIM + column[None, None, :]
    attended = tl.load(source, mask=readable, other=0.0, cache_modifier=".cg")
    highest = tl.max(maximum, axis=0)
    weight = tl.where(exists, tl.exp(maximum - highest[None, :]), 0.0)
    result = tl.sum(attended * weight[:, :, None], axis=0) / tl.sum(total * weight, axis=0)[:, None]
    real_row = tl.arange(0, REAL_ROWS)
    target = out + real_row[:, None] * HEAD_DIM + column[None, :]
    is_real = (real_row < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=is_real)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    partial: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    cut: Cut,
) -> None:
    """Attention of one token a sequence: queries and out [S, H, head_dim]; see `SplitAttention`."""
    num_sequences, num_heads, head_dim = queries.shape
    _, block_size, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    _attend[(num_sequences, num_kv_heads, cut.num_parts)](
        queries,
        keys,
        values,
        block_tables,
        lengths,
        *partial,
        out,
        head_dim**-0.5,
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        NUM_PARTS=cut.num_parts,
        PARTS=triton.next_power_of_2(cut.num_parts),
        TILE=cut.tile,
        ROWS=max(16, triton.next_power_of_2(group)),  # what the matrix units take at least
        REAL_ROWS=triton.next_power_of_2(group),
        COLUMNS=max(16, triton.next_power_of_2(head_dim)),
        num_warps=cut.warps,
        num_stages=cut.stages,
        **pdl.options(),
    )
