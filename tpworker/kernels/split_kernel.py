"""The kernel of `tpworker.model.attention.split` for what `ring_kernel` does not take: float32, heads of any
size, small KV blocks, GPUs before Ampere. Imports Triton: import it on CUDA only.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import pdl
from tpworker.kernels.operands import Partial
from tpworker.kernels.pdl import start_next, wait

_TILE = 64  # tokens that a program takes at a time, and the shortest part


@triton.jit
def _attend(
    queries, keys, values, block_tables, lengths, sums, maxima, totals, arrived, out, scale, table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NUM_PARTS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token, key-value head and part of its sequence; online softmax (arXiv 1805.02867).

    A sequence's WIDTH tokens are as many sequences of lengths of their own, with one block table.
    """
    start_next(PDL)
    # Heads first: what neighbours read at the same time lies side by side in the cache.
    kv_head = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    sequence = token // WIDTH
    wait(PDL)
    length = tl.load(lengths + sequence) - (WIDTH - 1) + (token % WIDTH).to(tl.int32)
    # Parts are whole tiles. Those beyond the end have nothing to do and are not waited for.
    part_length = tl.cdiv(tl.cdiv(length, NUM_PARTS), TILE) * TILE
    num_active = tl.maximum(tl.cdiv(length, tl.maximum(part_length, 1)), 1)
    if part >= num_active:
        return
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_real = (row < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    head = token * NUM_KV_HEADS + kv_head
    place = head * (GROUP * HEAD_DIM) + row[:, None] * HEAD_DIM + column[None, :]
    query = tl.load(queries + place, mask=is_real, other=0.0)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, COLUMNS], tl.float32)
    end = tl.minimum((part + 1) * part_length, length)
    for start in range(part * part_length, end, TILE):
        position = start + tl.arange(0, TILE)
        exists = position < end
        block = tl.load(block_tables + sequence * table_stride + position // BLOCK_SIZE, mask=exists, other=0)
        row_of_cache = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        source = (row_of_cache * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + column[None, :]
        mask = exists[:, None] & (column < HEAD_DIM)[None, :]
        key = tl.load(keys + source, mask=mask, other=0.0).to(query.dtype)
        value = tl.load(values + source, mask=mask, other=0.0).to(query.dtype)
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
        place_of_part = (head * NUM_PARTS + part) * GROUP + row
        tl.store(maxima + place_of_part, maximum, mask=row < GROUP)
        tl.store(totals + place_of_part, total, mask=row < GROUP)
        tl.store(sums + place_of_part[:, None] * HEAD_DIM + column[None, :], attended, mask=is_real)
        # All of the program's threads have written before one of them says so.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(arrived + head, 1, sem="acq_rel")
        if num_arrived == num_active - 1:
            _combine(
                maxima, totals, sums, out + place, head * NUM_PARTS, num_active, row, column, is_real,
                GROUP, HEAD_DIM, ROWS, COLUMNS,
            )  # fmt: skip
            tl.store(arrived + head, 0)  # for the next layer


@triton.jit
def _combine(
    maxima, totals, sums, out, first_part, num_active, row, column, is_real,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The last to arrive puts the parts together, always in the same order."""
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in range(num_active):
        place = (first_part + part) * GROUP + row
        of_part = tl.load(maxima + place, mask=row < GROUP, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(maximum, of_part)
        shrink = tl.exp(maximum - higher)
        weight = tl.exp(of_part - higher)
        summand = tl.load(totals + place, mask=row < GROUP, other=1.0, cache_modifier=".cg")
        source = sums + place[:, None] * HEAD_DIM + column[None, :]
        summands = tl.load(source, mask=is_real, other=0.0, cache_modifier=".cg")
        total = total * shrink + summand * weight
        attended = attended * shrink[:, None] + summands * weight[:, None]
        maximum = higher
    tl.store(out, (attended / total[:, None]).to(out.dtype.element_ty), mask=is_real)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    partial: Partial,
    num_parts: int,
) -> Tensor:
    """Attention of the last W tokens of each sequence, [S * W, H, head_dim]; see `SplitAttention`."""
    queries = queries.contiguous()
    num_rows, num_heads, head_dim = queries.shape
    _, block_size, num_kv_heads, _ = keys.shape
    out = queries.new_empty(num_rows, num_heads, head_dim)
    group, width = num_heads // num_kv_heads, num_rows // len(lengths)
    assert width * len(lengths) == num_rows
    _attend[(num_kv_heads, num_rows, num_parts)](
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
        WIDTH=width,
        BLOCK_SIZE=block_size,
        NUM_PARTS=num_parts,
        TILE=_TILE // 2 if queries.element_size() * head_dim > 512 else _TILE,
        ROWS=max(16, triton.next_power_of_2(group)),  # what the matrix units take at least
        COLUMNS=max(16, triton.next_power_of_2(head_dim)),
        **pdl.options(),
    )
    return out
