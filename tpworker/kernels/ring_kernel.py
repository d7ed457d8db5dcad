"""The kernel of `tpworker.model.attention.split`: rings of tiles of keys and values in shared memory.

In Gluon, Triton's language of explicit layouts. Triton's own pipelines keep too few bytes on their way where
the address of a load is loaded itself, as with a block table: 50 µs a layer and not 43 (64 x 650 tokens of
Qwen3-8B). Here the first tiles of a program are requested before the kernel before it has ended, too.

Each warp has its own tokens, its own maxima and sums, and meets the others only for buffers: the matrix units
compute [tokens, queries] = K Q^T and [head_dim, queries] = V^T P with warps as a batch dimension, so that up
to 8 query heads a key-value head cost no padding beyond 8, and the weights stay in registers.

With drafts a sequence has WIDTH new tokens. Their queries are rows of the same products, the first token's
heads first, and what is before them is read once for all; they attend to each other in the last part alone.
Where there are too many queries, TURNS programs have TOKENS tokens each, and read what is before them side by
side.

It has no interpreter. Imports Triton: import it on CUDA only.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"
# Tuples grow in loops that are unrolled.
# mypy: disable-error-code="assignment, misc, unreachable, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from tpworker.kernels import pdl
from tpworker.kernels.operands import Cut, NewTokens, Partial
from tpworker.kernels.pdl import start_next
from tpworker.kernels.ring_heads import new_heads, to_row

_FLOOR = gl.constexpr(-1e30)  # of maxima; finite: a warp without tokens weighs nothing, and not NaN
_SLAB = 16  # tokens of a tile that each warp takes: what the matrix units take at least
_MOST_ROWS = 16  # queries that a program's registers hold
_LOG2_E = 1.4426950408889634
_SUMS_PER_THREAD = 64  # that the last part has in registers when it puts the parts together


@gluon.jit
def _attend(
    heads, query_norm, key_norm, cos, sin, rows, keys, values, block_tables, lengths, sums, maxima, totals,
    arrived, out, scale, eps, table_stride,
    HAS_NORM: gl.constexpr, ROTARY_DIM: gl.constexpr, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, TURNS: gl.constexpr, TOKENS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, NUM_PARTS: gl.constexpr, ROWS: gl.constexpr, REAL_ROWS: gl.constexpr,
    CHUNK: gl.constexpr, SLAB: gl.constexpr, SHORTEST: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program a turn, key-value head and part of a sequence; online softmax (arXiv 1805.02867).

    `heads` is the whole product, [S * WIDTH, H + 2 K, HEAD_DIM]. Queries and keys are normed and rotated
    here, as by `kernels.norm_rotate_store`; the last part stores the new keys and values, and adds them last.

    Lengths, tables, angles and rows are read before the wait: all layers have the same, and between what
    makes them and the first layer `prepare` launches a kernel plainly. So are keys and values of all tokens
    but the new ones, which an earlier step has written, or a forward pass before that `prepare`. `scale` has
    log2(e) in it.
    """
    start_next(PDL)
    TILE: gl.constexpr = WARPS * SLAB
    # Scores are [WARPS, SLAB, ROWS], what is attended [WARPS, HEAD_DIM, ROWS]: each warp for itself.
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    chunks: gl.constexpr = HEAD_DIM // 8  # of 16 bytes
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [32 // chunks, chunks], [WARPS, 1], [1, 0])
    of_row: gl.constexpr = gl.SliceLayout(1, by_row)
    of_column: gl.constexpr = gl.SliceLayout(0, by_row)
    # Heads first: what neighbours read at the same time lies side by side in the cache.
    kv_head = gl.program_id(0)
    turn = gl.program_id(1).to(gl.int64)
    part = gl.program_id(2)
    if TURNS == 1:
        sequence, first, num_rows = turn, 0, WIDTH * GROUP
    else:
        sequence, first = turn // TURNS, turn % TURNS * TOKENS
        num_rows = gl.minimum(WIDTH - first, TOKENS) * GROUP
    old = gl.maximum(gl.load(lengths + sequence) - WIDTH, 0)  # tokens before the new ones
    # Parts are whole tiles. Those beyond the end have nothing to do and are not waited for.
    part_length = gl.maximum(gl.cdiv(gl.cdiv(old, NUM_PARTS), TILE) * TILE, SHORTEST)
    num_active = gl.maximum(gl.cdiv(old, part_length), 1)
    if part >= num_active:
        return
    start = part * part_length
    end = gl.minimum(start + part_length, old)
    is_last = part == num_active - 1
    block_table = block_tables + sequence * table_stride

    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    dtype: gl.constexpr = keys.dtype.element_ty
    key_ring = gl.allocate_shared_memory(dtype, [STAGES, WARPS, SLAB, HEAD_DIM], shared)
    value_ring = gl.allocate_shared_memory(dtype, [STAGES, WARPS, SLAB, HEAD_DIM], shared)
    block = _block_of_slab(block_table, start, end, BLOCK_SIZE, SLAB, WARPS, chunks)
    for stage in gl.static_range(STAGES - 1):
        next_block = _block_of_slab(
            block_table, start + (stage + 1) * TILE, end, BLOCK_SIZE, SLAB, WARPS, chunks
        )
        _request(
            keys, values, block, start + stage * TILE, end, kv_head,
            key_ring.index(stage), value_ring.index(stage),
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, SLAB, WARPS, chunks,
        )  # fmt: skip
        block = next_block

    row = gl.arange(0, ROWS, layout=of_row)
    column = gl.arange(0, HEAD_DIM, layout=of_column)
    is_real = (row < num_rows)[:, None]
    head = turn * NUM_KV_HEADS + kv_head
    first_out = ((sequence * WIDTH + first) * NUM_KV_HEADS + kv_head) * (GROUP * HEAD_DIM)
    place = first_out + to_row(row, GROUP * NUM_KV_HEADS, TOKENS, GROUP, HEAD_DIM)[:, None] + column[None, :]
    places_of_new = ()
    for token in gl.static_range(WIDTH):
        places_of_new += (gl.load(rows + (sequence * WIDTH + token)),)
    query, new_keys, new_values = new_heads(
        heads, query_norm, key_norm, cos, sin, eps, sequence, first, num_rows, kv_head, row, column,
        HAS_NORM, ROTARY_DIM, NUM_KV_HEADS, GROUP, HEAD_DIM, WIDTH, TOKENS, PDL,
    )  # fmt: skip
    if is_last & (first == 0):
        for token in gl.static_range(WIDTH):
            to_cache = (places_of_new[token] * NUM_KV_HEADS + kv_head) * HEAD_DIM + column
            gl.store(keys + to_cache, new_keys[token])
            gl.store(values + to_cache, new_values[token])
    new_scores = ()
    for token in gl.static_range(WIDTH):
        score = gl.sum(query.to(gl.float32) * new_keys[token].to(gl.float32)[None, :], axis=1) * scale
        sees = is_last if token == 0 else is_last & (row >= (token - first) * GROUP)
        new_scores += (gl.where(sees, score, float("-inf")),)

    as_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    query_operand = gl.convert_layout(gl.permute(query, (1, 0)), gl.SliceLayout(0, as_operand))
    query_operand = gl.expand_dims(query_operand, 0).broadcast_to([WARPS, HEAD_DIM, ROWS])
    position = (
        gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None] * SLAB
        + gl.arange(0, SLAB, layout=gl.SliceLayout(0, gl.SliceLayout(2, mma)))[None, :]
    )[:, :, None]
    maximum = gl.full([WARPS, ROWS], _FLOOR, gl.float32, gl.SliceLayout(1, mma))
    total = gl.zeros([WARPS, SLAB, ROWS], gl.float32, mma)
    attended = gl.zeros([WARPS, HEAD_DIM, ROWS], gl.float32, mma)
    num_tiles = gl.cdiv(end - start, TILE)
    for tile in range(num_tiles):
        async_copy.wait_group(STAGES - 2)
        next_start = start + (tile + STAGES - 1) * TILE
        next_block = _block_of_slab(block_table, next_start + TILE, end, BLOCK_SIZE, SLAB, WARPS, chunks)
        free = (tile + STAGES - 1) % STAGES
        _request(
            keys, values, block, next_start, end, kv_head, key_ring.index(free), value_ring.index(free),
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, SLAB, WARPS, chunks,
        )  # fmt: skip
        block = next_block
        key_tile = key_ring.index(tile % STAGES).load(gl.DotOperandLayout(0, mma, 2))
        scores = mma_v2(key_tile, query_operand, gl.zeros([WARPS, SLAB, ROWS], gl.float32, mma)) * scale
        scores = gl.where(start + tile * TILE + position < end, scores, float("-inf"))
        higher = gl.maximum(maximum, gl.max(scores, axis=1))
        shrink = gl.exp2(maximum - higher)[:, None, :]
        weights = gl.exp2(scores - higher[:, None, :])
        total = total * shrink + weights
        maximum = higher
        value_tile = value_ring.index(tile % STAGES).permute((0, 2, 1)).load(gl.DotOperandLayout(0, mma, 2))
        attended = mma_v2(value_tile, gl.convert_layout(weights.to(dtype), as_operand), attended * shrink)
    async_copy.wait_group(0)

    highest, total_of_part, sum_of_part = _of_all_warps(maximum, total, attended, by_row, WARPS, chunks)
    higher = highest
    for token in gl.static_range(WIDTH):
        higher = gl.maximum(higher, new_scores[token])
    shrink = gl.exp2(highest - higher)
    total_of_part = total_of_part * shrink
    sum_of_part = sum_of_part * shrink[:, None]
    for token in gl.static_range(WIDTH):
        new_weight = gl.exp2(new_scores[token] - higher)
        total_of_part += new_weight
        summand = new_weight[:, None] * new_values[token].to(gl.float32)[None, :]
        if token > 0:  # a draft that is not seen may be NaN, and 0 * NaN is NaN
            summand = gl.where((row >= (token - first) * GROUP)[:, None], summand, 0.0)
        sum_of_part += summand
    if NUM_PARTS == 1 or num_active == 1:
        result = sum_of_part / total_of_part[:, None]
        gl.store(out + place, result.to(out.dtype.element_ty), mask=is_real)
    else:
        place_of_part = (head * NUM_PARTS + part) * (TOKENS * GROUP) + row
        gl.store(maxima + place_of_part, higher, mask=row < num_rows)
        gl.store(totals + place_of_part, total_of_part, mask=row < num_rows)
        gl.store(sums + place_of_part[:, None] * HEAD_DIM + column[None, :], sum_of_part, mask=is_real)
        # All of the program's threads have written before one of them says so.
        tl.debug_barrier()
        num_arrived = gl.atomic_add(arrived + head, 1, sem="acq_rel")
        if num_arrived == num_active - 1:
            _combine(
                maxima, totals, sums, out + first_out, head * NUM_PARTS, num_active, num_rows,
                NUM_KV_HEADS, GROUP, HEAD_DIM, TOKENS, REAL_ROWS, CHUNK, WARPS,
            )  # fmt: skip
            gl.store(arrived + head, 0)  # for the next layer


@gluon.jit
def _block_of_slab(
    block_table, start, end, BLOCK_SIZE: gl.constexpr, SLAB: gl.constexpr, WARPS: gl.constexpr,
    chunks: gl.constexpr,
):  # fmt: skip
    """The KV block of each warp's part of the tile that starts here, [WARPS]."""
    copy: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // chunks, chunks], [WARPS, 1, 1], [2, 1, 0])
    position = start + gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, copy))) * SLAB
    return gl.load(block_table + position // BLOCK_SIZE, mask=position < end, other=0)


@gluon.jit
def _request(
    keys, values, block, start, end, kv_head, key_buffer, value_buffer, NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, SLAB: gl.constexpr, WARPS: gl.constexpr,
    chunks: gl.constexpr,
):  # fmt: skip
    """Have the tile that starts here copied into a buffer; zeros from `end` on, where nothing is read."""
    copy: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // chunks, chunks], [WARPS, 1, 1], [2, 1, 0])
    of_token: gl.constexpr = gl.SliceLayout(2, copy)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, of_token))
    token = gl.arange(0, SLAB, layout=gl.SliceLayout(0, of_token))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(1, copy)))
    position = start + warp * SLAB
    first = (block.to(gl.int64) * BLOCK_SIZE + position % BLOCK_SIZE) * (NUM_KV_HEADS * HEAD_DIM)
    inside = token[None, :, None] * (NUM_KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM + column[None, None, :]
    exists = (position[:, None] + token[None, :] < end)[:, :, None]
    async_copy.async_copy_global_to_shared(key_buffer, keys + first[:, None, None] + inside, mask=exists)
    async_copy.async_copy_global_to_shared(value_buffer, values + first[:, None, None] + inside, mask=exists)
    async_copy.commit_group()


@gluon.jit
def _of_all_warps(maximum, total, attended, by_row: gl.constexpr, WARPS: gl.constexpr, chunks: gl.constexpr):
    """The warps' maxima [WARPS, ROWS], totals [WARPS, SLAB, ROWS] and sums [WARPS, HEAD_DIM, ROWS] together:
    [ROWS], [ROWS] and [ROWS, HEAD_DIM]. All pass through shared memory once.
    """
    # A thread has all warps' results for its elements, which are those it has in by_row.
    by_warp: gl.constexpr = gl.BlockedLayout(
        [WARPS, 8, 1], [1, chunks, 32 // chunks], [1, 1, WARPS], [1, 2, 0]
    )
    maximum = gl.convert_layout(maximum, gl.SliceLayout(1, by_warp))
    warp_total = gl.convert_layout(gl.sum(total, axis=1), gl.SliceLayout(1, by_warp))
    highest = gl.max(maximum, axis=0)
    weight = gl.exp2(maximum - highest[None, :])
    attended = gl.sum(gl.convert_layout(attended, by_warp) * weight[:, None, :], axis=0)
    attended = gl.convert_layout(gl.permute(attended, (1, 0)), by_row)
    of_row: gl.constexpr = gl.SliceLayout(1, by_row)
    all_total = gl.convert_layout(gl.sum(warp_total * weight, axis=0), of_row)
    return gl.convert_layout(highest, of_row), all_total, attended


@gluon.jit
def _combine(
    maxima, totals, sums, out, first_part, num_active, num_rows,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, TOKENS: gl.constexpr,
    REAL_ROWS: gl.constexpr, CHUNK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The last to arrive puts the parts together, CHUNK at a time, and always in the same order."""
    lanes: gl.constexpr = HEAD_DIM // 4
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32 // lanes, lanes], [1, WARPS, 1], [2, 1, 0])
    of_part: gl.constexpr = gl.SliceLayout(2, layout)
    of_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, layout))
    row = gl.arange(0, REAL_ROWS, layout=gl.SliceLayout(0, of_part))[None, :]
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    highest = gl.full([REAL_ROWS], _FLOOR, gl.float32, gl.SliceLayout(0, of_part))
    total = gl.zeros([REAL_ROWS], gl.float32, gl.SliceLayout(0, of_part))
    attended = gl.zeros([REAL_ROWS, HEAD_DIM], gl.float32, gl.SliceLayout(0, layout))
    for start in range(0, num_active, CHUNK):
        part = start + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, of_part))[:, None]
        exists = (part < num_active) & (row < num_rows)
        place = (first_part + part) * (TOKENS * GROUP) + row
        maximum = gl.load(maxima + place, mask=exists, other=_FLOOR, cache_modifier=".cg")
        summand = gl.load(totals + place, mask=exists, other=0.0, cache_modifier=".cg")
        source = sums + place[:, :, None] * HEAD_DIM + column
        summands = gl.load(source, mask=exists[:, :, None], other=0.0, cache_modifier=".cg")
        higher = gl.maximum(highest, gl.max(maximum, axis=0))
        shrink = gl.exp2(highest - higher)
        weight = gl.where(exists, gl.exp2(maximum - higher[None, :]), 0.0)
        total = total * shrink + gl.sum(summand * weight, axis=0)
        attended = attended * gl.convert_layout(shrink, of_row)[:, None]
        attended += gl.sum(summands * weight[:, :, None], axis=0)
        highest = higher
    total = gl.convert_layout(total, of_row)
    result = attended / total[:, None]
    real_row = gl.arange(0, REAL_ROWS, layout=of_row)
    target = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    from_first = to_row(real_row, GROUP * NUM_KV_HEADS, TOKENS, GROUP, HEAD_DIM)
    target = from_first[:, None] + target[None, :]
    gl.store(out + target, result.to(out.dtype.element_ty), mask=(real_row < num_rows)[:, None])


def attend(
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    partial: Partial,
    cut: Cut,
    tokens: NewTokens,
) -> Tensor:
    """Attention of W new tokens a sequence, [S * W, H, head_dim]; see `SplitAttention.store_and_attend`.

    Args:
        heads: [S * W, H + 2 K, head_dim]: queries, keys and values of the new tokens, neither normed nor
            rotated nor stored.
        lengths: int32 [S], with the new tokens.
        cut: each turn has at most 16 queries a key-value head.
    """
    assert heads.is_contiguous()
    num_rows, num_heads, head_dim = heads.shape
    _, block_size, num_kv_heads, _ = keys.shape
    num_heads -= 2 * num_kv_heads
    out = heads.new_empty(num_rows, num_heads, head_dim)
    num_sequences, group = len(lengths), num_heads // num_kv_heads
    width = num_rows // num_sequences
    tokens_of_turn = triton.cdiv(width, cut.turns)
    assert width * num_sequences == num_rows
    assert (cut.turns - 1) * tokens_of_turn < width
    assert tokens_of_turn * group <= _MOST_ROWS
    norms = (heads, heads) if tokens.norms is None else tokens.norms
    parts, real_rows = triton.next_power_of_2(cut.num_parts), triton.next_power_of_2(tokens_of_turn * group)
    _attend[(num_kv_heads, num_sequences * cut.turns, cut.num_parts)](
        heads,
        *norms,
        tokens.cos,
        tokens.sin,
        tokens.rows,
        keys,
        values,
        block_tables,
        lengths,
        *partial,
        out,
        head_dim**-0.5 * _LOG2_E,
        tokens.eps,
        block_tables.stride(0),
        HAS_NORM=tokens.norms is not None,
        ROTARY_DIM=tokens.cos.shape[-1],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        WIDTH=width,
        TURNS=cut.turns,
        TOKENS=tokens_of_turn,
        BLOCK_SIZE=block_size,
        NUM_PARTS=cut.num_parts,
        ROWS=max(8, real_rows),  # what the matrix units take at least
        REAL_ROWS=real_rows,
        CHUNK=max(1, min(parts, _SUMS_PER_THREAD * 32 * cut.warps // (real_rows * head_dim))),
        SLAB=_SLAB,
        SHORTEST=max(cut.shortest, _SLAB * cut.warps),
        STAGES=cut.stages,
        WARPS=cut.warps,
        num_warps=cut.warps,
        **pdl.options(),
    )
    return out
