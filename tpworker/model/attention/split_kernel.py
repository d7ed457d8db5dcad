"""The kernel of `tpworker.model.attention.split`. Imports Triton: import it on CUDA only."""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tpworker.model import pdl
from tpworker.model.attention.split import Cut, NewTokens
from tpworker.model.pdl import start_next, wait


@triton.jit
def _attend(
    queries, query_norm, key_norm, cos, sin, rows, keys, values, block_tables, lengths, sums, maxima, totals,
    arrived, out, scale, eps, table_stride,
    FUSED: tl.constexpr, HAS_NORM: tl.constexpr, ROTARY_DIM: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_PARTS: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, REAL_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence, key-value head and part of the sequence; online softmax (arXiv 1805.02867).

    FUSED: `queries` is the whole product, [S, H + 2 K, HEAD_DIM]. Queries and keys are normed and rotated
    here, as by `kernels.norm_rotate_store`; the last part begins with the newest token, and stores its key
    and value. Lengths, tables, angles and rows are read before the wait: all layers have the same, and
    between what makes them and the first layer `prepare` launches a kernel plainly. EARLY: so are keys and
    values of the first tile, which an earlier step has written.
    """
    start_next(PDL)
    # Heads first: what neighbours read at the same time lies side by side in the cache.
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    if not FUSED:
        wait(PDL)
    length = tl.load(lengths + sequence)
    if FUSED:
        length = tl.maximum(length - 1, 0)  # in the cache
    # Parts are whole tiles. Those beyond the end have nothing to do and are not waited for.
    part_length = tl.cdiv(tl.cdiv(length, NUM_PARTS), TILE) * TILE
    num_active = tl.maximum(tl.cdiv(length, tl.maximum(part_length, 1)), 1)
    if part >= num_active:
        return
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_real = (row < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    head = sequence * NUM_KV_HEADS + kv_head
    place = head * (GROUP * HEAD_DIM) + row[:, None] * HEAD_DIM + column[None, :]
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, COLUMNS], tl.float32)
    start_of_part = part * part_length
    end = tl.minimum(start_of_part + part_length, length)
    if FUSED:
        angle = sequence * ROTARY_DIM + column
        rotated = column < ROTARY_DIM
        cosine = tl.load(cos + angle, mask=rotated, other=1.0)[None, :]
        sine = tl.load(sin + angle, mask=rotated, other=0.0)[None, :]
        partner = tl.where(rotated, (column + ROTARY_DIM // 2) % ROTARY_DIM, column)
        inside = column < HEAD_DIM
        heads = queries + sequence * ((GROUP + 2) * NUM_KV_HEADS * HEAD_DIM)
        row_of_new = tl.load(rows + sequence)
        if EARLY:
            first_exists, first_source, first_mask = _places_of_tile(
                block_tables + sequence * table_stride, start_of_part, end, kv_head, column,
                NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE,
            )  # fmt: skip
            first_key = tl.load(keys + first_source, mask=first_mask, other=0.0)
            first_value = tl.load(values + first_source, mask=first_mask, other=0.0)
        wait(PDL)
        query = _normed_rotated(
            heads + (kv_head * GROUP + row[:, None]) * HEAD_DIM, query_norm, column, partner, is_real, inside,
            cosine, sine, eps, HAS_NORM, HEAD_DIM,
        )  # fmt: skip
        if part == num_active - 1:
            new_head = GROUP * NUM_KV_HEADS + kv_head + tl.zeros([1, 1], tl.int32)
            key = _normed_rotated(
                heads + new_head * HEAD_DIM, key_norm, column, partner, inside[None, :], inside,
                cosine, sine, eps, HAS_NORM, HEAD_DIM,
            )  # fmt: skip
            to_value = ((GROUP + 1) * NUM_KV_HEADS + kv_head) * HEAD_DIM + column
            value = tl.load(heads + to_value[None, :], mask=inside[None, :], other=0.0)
            to_cache = (row_of_new * NUM_KV_HEADS + kv_head) * HEAD_DIM + column[None, :]
            tl.store(keys + to_cache, key, mask=inside[None, :])
            tl.store(values + to_cache, value, mask=inside[None, :])
            maximum = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1) * scale
            total = tl.full([ROWS], 1.0, tl.float32)
            attended = tl.zeros([ROWS, COLUMNS], tl.float32) + value.to(tl.float32)
        if EARLY:
            maximum, total, attended = _take(
                query, first_key, first_value, first_exists, scale, maximum, total, attended
            )
            start_of_part += TILE
    else:
        query = tl.load(queries + place, mask=is_real, other=0.0)
    for start in range(start_of_part, end, TILE):
        exists, source, mask = _places_of_tile(
            block_tables + sequence * table_stride, start, end, kv_head, column,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE,
        )  # fmt: skip
        tile_key = tl.load(keys + source, mask=mask, other=0.0)
        tile_value = tl.load(values + source, mask=mask, other=0.0)
        maximum, total, attended = _take(query, tile_key, tile_value, exists, scale, maximum, total, attended)
    if num_active == 1:
        result = attended / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=is_real)
    else:
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
def _places_of_tile(
    block_table, start, end, kv_head, column, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Which of TILE tokens from `start` on are before `end`; where their keys and values are, and a mask."""
    position = start + tl.arange(0, TILE)
    exists = position < end
    block = tl.load(block_table + position // BLOCK_SIZE, mask=exists, other=0)
    token = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    source = (token * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + column[None, :]
    return exists, source, exists[:, None] & (column < HEAD_DIM)[None, :]


@triton.jit
def _take(query, key, value, exists, scale, maximum, total, attended):
    """The online softmax, one tile further."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(exists[None, :], scores, float("-inf"))
    higher = tl.maximum(maximum, tl.max(scores, axis=1))
    shrink = tl.exp(maximum - higher)
    weights = tl.exp(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    attended = attended * shrink[:, None]
    attended += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return higher, total, attended


@triton.jit
def _normed_rotated(
    heads, norm, column, partner, exists, inside, cosine, sine, eps, HAS_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The heads at these addresses [n, 1]; partner: the column that each column turns with."""
    dtype = heads.dtype.element_ty
    value = tl.load(heads + column[None, :], mask=exists, other=0.0).to(tl.float32)
    other = tl.load(heads + partner[None, :], mask=exists, other=0.0).to(tl.float32)
    if HAS_NORM:
        weight = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        other_weight = tl.load(norm + partner, mask=inside, other=0.0).to(tl.float32)[None, :]
        scale = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / HEAD_DIM + eps)
        value = (value * scale * weight).to(dtype).to(tl.float32)
        other = (other * scale * other_weight).to(dtype).to(tl.float32)
    return (value * cosine + other * sine).to(dtype)


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
    cut: Cut,
    tokens: NewTokens | None = None,
) -> Tensor:
    """Attention of one token a sequence, [S, H, head_dim]; see `SplitAttention`.

    Args:
        queries: [S, H, head_dim]; with `tokens`: [S, H + 2 K, head_dim], queries, keys and values of the
            newest tokens, neither normed nor rotated nor stored.
    """
    assert queries.is_contiguous()
    num_sequences, num_heads, head_dim = queries.shape
    _, block_size, num_kv_heads, _ = keys.shape
    if tokens is not None:
        num_heads -= 2 * num_kv_heads
    out = queries.new_empty(num_sequences, num_heads, head_dim)
    group = num_heads // num_kv_heads
    norms = (queries, queries) if tokens is None or tokens.norms is None else tokens.norms
    places = (out, out, lengths) if tokens is None else (tokens.cos, tokens.sin, tokens.rows)
    _attend[(num_kv_heads, num_sequences, cut.num_parts)](
        queries,
        *norms,
        *places,
        keys,
        values,
        block_tables,
        lengths,
        *partial,
        out,
        head_dim**-0.5,
        0.0 if tokens is None else tokens.eps,
        block_tables.stride(0),
        FUSED=tokens is not None,
        HAS_NORM=tokens is not None and tokens.norms is not None,
        ROTARY_DIM=head_dim if tokens is None else tokens.cos.shape[-1],
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
        EARLY=cut.early,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **pdl.options(),
    )
    return out
