"""The fused kernels that CUDA ranks run between matrix products. Imports Triton: import it on CUDA only.

Each does what the definition of the same name in `tpworker.model.layer_ops` does, and rounds where that
rounds. All of them are short: at 64 rows they move a few hundred KB, so what
they cost is their launch, and the point is that there are few of them. None looks at values on the host
and every size of an allocation follows from shapes, so all can be captured in a CUDA graph.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import pdl
from tpworker.kernels.operands import Gated, Normed, Places
from tpworker.kernels.pdl import start_next, wait

_HEADS_TILE = 8  # heads of one program
_Operand = TypeVar("_Operand", Tensor, Tensor | Normed)


# ------------------------------------------------------------------------------------ residual and norm


@triton.jit
def _add_norm(
    x, delta, weight, out, eps, SIZE: tl.constexpr, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: x += delta (rounded, as the reference does), out = RMSNorm(x) * weight."""
    start_next(PDL)
    start = tl.program_id(0).to(tl.int64) * SIZE
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    value = tl.load(x + start + column, mask=inside, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + start + column, mask=inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + added).to(x.dtype.element_ty)
        tl.store(x + start + column, value, mask=inside)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    tl.store(out + start + column, (wide * scale).to(out.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `Operations.add_norm`."""
    assert x.is_contiguous()
    assert delta is None or (delta.is_contiguous() and delta.shape == x.shape)
    out = torch.empty_like(x)
    rows, size = x.shape
    block = triton.next_power_of_2(size)
    _add_norm[(rows,)](
        x,
        x if delta is None else delta,
        weight,
        out,
        eps,
        SIZE=size,
        HAS_DELTA=delta is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),
        **pdl.options(),
    )
    return out


# ------------------------------------------------------------------------------- where tokens are and go


@triton.jit(do_not_specialize_on_alignment=["sequence_of"])  # a part of what a step brings
def _places(
    positions, sequence_of, block_tables, cos_table, sin_table, cos, sin, rows,
    table_stride, BLOCK_SIZE: tl.constexpr, ROTARY_DIM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a token: its rows of the rotary tables, and its row of the KV cache."""
    start_next(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    sequence = tl.load(sequence_of + token)
    column = tl.arange(0, BLOCK)
    inside = column < ROTARY_DIM
    source = position * ROTARY_DIM + column
    tl.store(cos + token * ROTARY_DIM + column, tl.load(cos_table + source, mask=inside), mask=inside)
    tl.store(sin + token * ROTARY_DIM + column, tl.load(sin_table + source, mask=inside), mask=inside)
    block = tl.load(block_tables + sequence * table_stride + position // BLOCK_SIZE).to(tl.int64)
    tl.store(rows + token, block * BLOCK_SIZE + position % BLOCK_SIZE)


def places(
    positions: Tensor,
    sequence_of: Tensor,
    block_tables: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    block_size: int,
) -> Places:
    """See `Operations.places`."""
    num_tokens, rotary_dim = len(positions), cos_table.shape[1]
    cos = cos_table.new_empty(num_tokens, 1, rotary_dim)
    sin = torch.empty_like(cos)
    rows = torch.empty_like(positions)
    _places[(num_tokens,)](
        positions,
        sequence_of,
        block_tables,
        cos_table,
        sin_table,
        cos,
        sin,
        rows,
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        ROTARY_DIM=rotary_dim,
        BLOCK=triton.next_power_of_2(rotary_dim),
        num_warps=1,
        **pdl.options(),
    )
    return Places(cos, sin, rows)


# ---------------------------------------------------------------------------------- heads into the cache


@triton.jit
def _norm_rotate_store(
    heads, query_norm, key_norm, cos, sin, rows, query, keys, values, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token and TILE of its heads, each in two halves: queries, keys and values alike.

    Values are neither normed nor rotated. Dimensions from ROTARY_DIM on, if any, are a third part, not
    rotated. The query goes to memory of its own: threads may hold copies of an element, and one that still
    loads must not meet what another has stored.
    """
    start_next(PDL)
    wait(PDL)
    half: tl.constexpr = ROTARY_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < half
    is_query = head < NUM_HEADS
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    is_any = is_query | is_key | is_value
    source = heads + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) + head * HEAD_DIM
    low = tl.load(source + column, mask=is_any & inside, other=0.0).to(tl.float32)
    high = tl.load(source + half + column, mask=is_any & inside, other=0.0).to(tl.float32)
    row = tl.load(rows + token)
    cosine = tl.load(cos + token * ROTARY_DIM + column, mask=inside, other=0.0)
    sine = tl.load(sin + token * ROTARY_DIM + half + column, mask=inside, other=0.0)
    if ROTARY_DIM < HEAD_DIM:
        rest_column = ROTARY_DIM + tl.arange(0, REST)[None, :]
        rest_inside = rest_column < HEAD_DIM
        rest = tl.load(source + rest_column, mask=is_any & rest_inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        dtype = heads.dtype.element_ty
        squares = tl.sum(low * low + high * high, axis=1, keep_dims=True)
        if ROTARY_DIM < HEAD_DIM:
            squares += tl.sum(rest * rest, axis=1, keep_dims=True)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)
        low = _normed(low, scale, query_norm + column, key_norm + column, is_query, is_key, inside, dtype)
        column_high = column + half
        high = _normed(
            high, scale, query_norm + column_high, key_norm + column_high, is_query, is_key, inside, dtype
        )
        if ROTARY_DIM < HEAD_DIM:
            rest = _normed(
                rest, scale, query_norm + rest_column, key_norm + rest_column, is_query, is_key, rest_inside,
                dtype,
            )  # fmt: skip
    out_low = tl.where(is_value, low, low * cosine - high * sine).to(query.dtype.element_ty)
    out_high = tl.where(is_value, high, high * cosine + low * sine).to(query.dtype.element_ty)
    to_query = query + (token * NUM_HEADS + head) * HEAD_DIM
    to_key = keys + (row * NUM_KV_HEADS + head - NUM_HEADS) * HEAD_DIM
    to_value = values + (row * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM
    tl.store(to_query + column, out_low, mask=is_query & inside)
    tl.store(to_query + half + column, out_high, mask=is_query & inside)
    tl.store(to_key + column, out_low.to(keys.dtype.element_ty), mask=is_key & inside)
    tl.store(to_key + half + column, out_high.to(keys.dtype.element_ty), mask=is_key & inside)
    tl.store(to_value + column, out_low.to(keys.dtype.element_ty), mask=is_value & inside)
    tl.store(to_value + half + column, out_high.to(keys.dtype.element_ty), mask=is_value & inside)
    if ROTARY_DIM < HEAD_DIM:
        out_rest = rest.to(query.dtype.element_ty)
        tl.store(to_query + rest_column, out_rest, mask=is_query & rest_inside)
        tl.store(to_key + rest_column, out_rest.to(keys.dtype.element_ty), mask=is_key & rest_inside)
        tl.store(to_value + rest_column, out_rest.to(keys.dtype.element_ty), mask=is_value & rest_inside)


@triton.jit
def _normed(part, scale, query_norm, key_norm, is_query, is_key, inside, dtype: tl.constexpr):
    """A part of the heads times their norms' weights, rounded to `dtype`; values as they are."""
    weight = tl.load(query_norm, mask=inside & is_query, other=0.0).to(tl.float32)
    weight += tl.load(key_norm, mask=inside & is_key, other=0.0).to(tl.float32)
    return tl.where(is_query | is_key, (part * scale * weight).to(dtype).to(tl.float32), part)


def norm_rotate_store(
    heads: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    places: Places,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """See `Operations.norm_rotate_store`."""
    assert heads.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    num_tokens, num_all, head_dim = heads.shape
    rotary_dim = places.cos.shape[-1]
    num_kv_heads = keys.shape[-2]
    num_heads = num_all - 2 * num_kv_heads
    query = heads.new_empty(num_tokens, num_heads, head_dim)
    query_norm, key_norm = norms or (heads, heads)
    _norm_rotate_store[(num_tokens, triton.cdiv(num_all, _HEADS_TILE))](
        heads,
        query_norm,
        key_norm,
        places.cos,
        places.sin,
        places.rows,
        query,
        keys,
        values,
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        HAS_NORM=norms is not None,
        TILE=_HEADS_TILE,
        BLOCK=triton.next_power_of_2(rotary_dim // 2),
        REST=triton.next_power_of_2(max(1, head_dim - rotary_dim)),
        num_warps=4,
        **pdl.options(),
    )
    return query


# -------------------------------------------------------------------------------------------- activation


@triton.jit
def _silu_mul(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + token * (2 * WIDTH) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * (2 * WIDTH) + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + token * WIDTH + column, value.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `Operations.silu_mul`."""
    assert gate_up.is_contiguous()
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul[(num_tokens, triton.cdiv(width, block))](
        gate_up, out, WIDTH=width, BLOCK=block, num_warps=4, **pdl.options()
    )
    return out


def computed(x: _Operand | Gated) -> _Operand | Tensor:
    """`silu_mul`, if it is left to be done."""
    return silu_mul(x.x) if isinstance(x, Gated) else x


# ------------------------------------------------------------------------------------------ FP8


@triton.jit
def _narrow(x, out, SIZE, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait(PDL)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < SIZE, other=0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < SIZE)


def narrow(x: Tensor) -> Tensor:
    """In FP8 (E4M3), without a scale; what is beyond its range becomes the greatest that there is."""
    assert x.is_contiguous()
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _narrow[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), BLOCK=4096, num_warps=8, **pdl.options())
    return out
