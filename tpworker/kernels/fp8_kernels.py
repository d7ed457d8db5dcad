"""What products of many rows with weights in FP8 need besides the library's: kernels that bring rows to FP8,
and weights out of it. Imports Triton: import it on CUDA only."""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import pdl
from tpworker.kernels.operands import Fp8Weight, Gated, Normed
from tpworker.kernels.pdl import start_next, wait

GROUP = 128
"""Inputs of a row that have a scale in common, where a row has several: as the library wants it."""
_TILE = 64  # rows of a weight that a program dequantises


@triton.jit
def _quantise(
    x, norm, values, scales, eps, scales_stride, SIZE: tl.constexpr, HAS_NORM: tl.constexpr,
    IS_GATED: tl.constexpr, BY_GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: x, or RMSNorm(x) * norm or silu(gate) * up, rounded as `add_norm` and `silu_mul` do
    it; over a scale that makes the greatest element of the row, or of each group, E4M3's greatest, 448."""
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < SIZE
    if HAS_NORM:
        weight = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    source = x + row * (2 * SIZE if IS_GATED else SIZE) + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
        value = (value * tl.sigmoid(value) * up).to(x.dtype.element_ty).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(tl.sum(value * value, axis=1), axis=0)
        value = value * tl.rsqrt(squares / SIZE + eps) * weight
        value = value.to(x.dtype.element_ty).to(tl.float32)
    greatest = tl.max(tl.abs(value), axis=1)
    if BY_GROUP:
        scale = tl.where(greatest > 0, greatest / 448, 1.0)
        tl.store(scales + group * scales_stride + row, scale, mask=group * GROUP < SIZE)
        value = value / scale[:, None]
    else:
        most = tl.max(greatest, axis=0)
        scale_of_row = tl.where(most > 0, most / 448, 1.0)
        tl.store(scales + row, scale_of_row)
        value = value / scale_of_row
    tl.store(values + row * SIZE + column, value.to(values.dtype.element_ty), mask=inside)


def quantise(x: Tensor | Normed | Gated, by_group: bool) -> tuple[Tensor, Tensor]:
    """Rows [T, in] in FP8, and their scales.

    Returns:
        values: float8_e4m3fn [T', in]; T' is T, or with groups the next multiple of 4, which the library
            wants; rows from T on are anything.
        scales: float32 [T', 1], or of each group [T', ceil(in / GROUP)], a column after the other.
    """
    source = x if isinstance(x, Tensor) else x.x
    assert source.is_contiguous()
    num_rows, size = source.shape
    size = size // 2 if isinstance(x, Gated) else size
    padded = -(-num_rows // 4) * 4 if by_group else num_rows
    num_groups = triton.cdiv(size, GROUP)
    values = torch.empty(padded, size, dtype=torch.float8_e4m3fn, device=source.device)
    scales = torch.empty(num_groups if by_group else 1, padded, dtype=torch.float32, device=source.device)
    _quantise[(num_rows,)](
        source,
        x.weight if isinstance(x, Normed) else source,
        values,
        scales,
        x.eps if isinstance(x, Normed) else 0.0,
        padded,
        SIZE=size,
        HAS_NORM=isinstance(x, Normed),
        IS_GATED=isinstance(x, Gated),
        BY_GROUP=by_group,
        GROUPS=triton.next_power_of_2(num_groups),
        GROUP=GROUP,
        num_warps=min(16, max(1, triton.next_power_of_2(size) // 512)),
        **pdl.options(),
    )
    return values, scales.t()


@triton.jit
def _dequantise(
    values, scales, out, size_out, size_in, num_columns, rows, columns, TILE: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program TILE rows of the weight and WIDTH inputs."""
    start_next(PDL)
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (row < size_out) & (column < size_in)
    value = tl.load(values + row * size_in + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + row // rows * num_columns + column // columns, mask=inside, other=0.0)
    wait(PDL)
    tl.store(out + row * size_in + column, (value * scale).to(out.dtype.element_ty), mask=inside)


def dequantise(weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """What a weight [out, in] stands for, each element rounded once."""
    values, scales, (rows, columns) = weight.values, weight.scales, weight.block
    assert values.is_contiguous()
    assert scales.is_contiguous()
    size_out, size_in = values.shape
    out = torch.empty(size_out, size_in, dtype=dtype, device=values.device)
    _dequantise[(triton.cdiv(size_out, _TILE), triton.cdiv(size_in, GROUP))](
        values,
        scales,
        out,
        size_out,
        size_in,
        scales.shape[1],
        rows,
        columns,
        TILE=_TILE,
        WIDTH=GROUP,
        **pdl.options(),
    )
    return out
