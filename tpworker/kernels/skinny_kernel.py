"""Products of a weight with few rows: which kernel, and the one for one row. Imports Triton: on CUDA only.

With few rows a product is the reading of its weight. The library's tiles leave much of the GPU idle where
matrices are small, and its kernels start when the one before them has ended. These have loaded the first part
of their weight by then (see pdl.py). And what stands between two products is done by them (see operands.py).
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import pdl, triton_kernels
from tpworker.kernels.few_rows import (
    MOST_ROWS,
    FewRows,
    can_multiply_few,
    cut_few,
    cut_few_fp8,
    num_processors,
)
from tpworker.kernels.operands import Fp8Weight, Normed
from tpworker.kernels.pdl import start_next, wait

# ------------------------------------------------------------------------------------- which one, and how


@dataclass(frozen=True, slots=True)
class OneRow:
    """How a product of one row is cut."""

    outputs: int = 2  # rows of the weight that a program reads
    step: int = 2048  # elements of each at a time
    warps: int = 4


_SMALL = 8 << 20
"""Elements of a weight up to which one row has a kernel of its own."""


def choose(num_rows: int, weight: Tensor | Fp8Weight, gated: bool) -> OneRow | FewRows | None:
    """How to multiply so many rows with the weight [out, in]; None: no kernel here does it.

    What was fastest for the matrices of Qwen3-0.6B and 8B, GLM-4.5-Air and ERNIE-4.5-21B-A3B, split over 1, 2
    and 4 ranks, on an H200.

    Args:
        gated: see `multiply`.
    """
    if isinstance(weight, Fp8Weight):
        if weight.dtype.itemsize != 2 or not 0 < num_rows <= MOST_ROWS or not can_multiply_few(weight):
            return None
        size_out, size_in = weight.values.shape
        return cut_few_fp8(num_rows, size_out, size_in, num_processors(weight.values.device))
    size_out, size_in = weight.shape
    if weight.element_size() != 2 or not 0 < num_rows <= MOST_ROWS:
        return None
    if num_rows == 1 and (size_in * size_out <= _SMALL or not can_multiply_few(weight)):
        if size_in <= 2048:
            return OneRow(4, triton.next_power_of_2(size_in))
        return OneRow(2, 4096, 8) if gated and size_in <= 4096 else OneRow(2, 2048)
    if not can_multiply_few(weight):
        return None
    return cut_few(num_rows, size_out, size_in, num_processors(weight.device))


def multiply(
    x: Tensor | Normed,
    weight: Tensor | Fp8Weight,
    bias: Tensor | None,
    rule: OneRow | FewRows,
    gated: bool = False,
) -> Tensor:
    """x [R, in] times weight [out, in] transposed, plus bias [out]: [R, out].

    gated: the product is gate, then up, and silu(gate) * up [R, out / 2] is returned; gate and up are rounded
    as if they were stored in between.
    """
    if isinstance(rule, OneRow):
        assert isinstance(weight, Tensor)
        return multiply_one(x, weight, bias, rule, gated, None)
    from tpworker.kernels.few_rows_kernel import multiply_few

    if isinstance(x, Normed) and x.scaled is None:
        x = triton_kernels.add_norm(x.x, None, x.weight, x.eps)
    return multiply_few(x, weight, bias, rule, gated, None)


def multiply_add(
    x: Tensor, weight: Tensor | Fp8Weight, bias: Tensor | None, rule: OneRow | FewRows, target: Normed
) -> None:
    """Add the product to target.x [R, out], in place."""
    assert target.x.is_contiguous()
    if isinstance(rule, OneRow):
        assert isinstance(weight, Tensor)
        multiply_one(x, weight, bias, rule, False, target.x)
    else:
        from tpworker.kernels.few_rows_kernel import multiply_few

        multiply_few(x, weight, bias, rule, False, target)


# ------------------------------------------------------------------------------------------------- one row


@triton.jit
def _one_row(
    x, norm, weight, bias, out, eps, SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, ADDS: tl.constexpr, OUTPUTS: tl.constexpr,
    STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program OUTPUTS rows of the weight; sums in float32. GATED: see `_rows_of`.

    HAS_NORM: the input is RMSNorm(x) * norm; every program adds up the squares for itself, as it reads x.
    ADDS: the result is added to `out`.
    """
    start_next(PDL)
    output, first = _rows_of(tl.program_id(0), SIZE_OUT, OUTPUTS, GATED)
    exists = output < SIZE_OUT
    column = tl.arange(0, STEP)
    source = weight + output[:, None] * SIZE_IN + column[None, :]
    # The first step's weights are on their way before the input is there.
    part = tl.load(source, mask=exists[:, None] & (column < SIZE_IN)[None, :], other=0.0)
    if HAS_NORM:
        scale = tl.load(norm + column, mask=column < SIZE_IN, other=0.0).to(tl.float32)
    wait(PDL)
    value = tl.load(x + column, mask=column < SIZE_IN, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = value * value
        value *= scale
    total = part.to(tl.float32) * value[None, :]
    for start in tl.static_range(STEP, SIZE_IN, STEP):
        inside = start + column < SIZE_IN
        part = tl.load(source + start, mask=exists[:, None] & inside[None, :], other=0.0)
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += value * value
            value *= tl.load(norm + start + column, mask=inside, other=0.0).to(tl.float32)
        total += part.to(tl.float32) * value[None, :]
    result = tl.sum(total, axis=1)
    if HAS_NORM:
        result *= tl.rsqrt(tl.sum(squares, axis=0) / SIZE_IN + eps)
    if HAS_BIAS:
        result += tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)
    result = result.to(out.dtype.element_ty)
    if GATED:
        gate, up = tl.split(result.reshape([2, OUTPUTS // 2]).permute(1, 0))
        target = first + tl.arange(0, OUTPUTS // 2)
        tl.store(out + target, _gate(gate, up), mask=target < SIZE_OUT // 2)
    else:
        if ADDS:
            result = _added(tl.load(out + output, mask=exists, other=0.0), result)
        tl.store(out + output, result, mask=exists)


@triton.jit
def _added(x, summand):
    """Rounded as `kernels.add_norm` does it."""
    return (x.to(tl.float32) + summand.to(tl.float32)).to(x.dtype)


@triton.jit
def _rows_of(tile, size_out, OUTPUTS: tl.constexpr, GATED: tl.constexpr):
    """Rows of the weight of one tile, int64 [OUTPUTS], and the first one.

    GATED: the weight's first half is gate and its second half up, and the result is silu(gate) * up: a tile
    has OUTPUTS / 2 rows of gate and then the same ones of up. Rows that do not exist are size_out or more.
    """
    row = tl.arange(0, OUTPUTS)
    if GATED:
        half = size_out // 2
        first = tile.to(tl.int64) * (OUTPUTS // 2)
        output = first + row % (OUTPUTS // 2)
        output = tl.where(output < half, output + (row // (OUTPUTS // 2)) * half, size_out)
    else:
        first = tile.to(tl.int64) * OUTPUTS
        output = first + row
    return output, first


@triton.jit
def _gate(gate, up):
    """silu(gate) * up in float32, rounded once."""
    wide = gate.to(tl.float32)
    return (wide * tl.sigmoid(wide) * up.to(tl.float32)).to(gate.dtype)


def multiply_one(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None,
    rule: OneRow,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    """See `multiply`; R is 1. residual: [1, out], to which the product is added; it is returned then."""
    normed = x if isinstance(x, Normed) else None
    source = x.x if isinstance(x, Normed) else x
    assert len(source) == 1
    assert source.is_contiguous()
    assert weight.is_contiguous()
    size_out, size_in = weight.shape
    if residual is None:
        out = torch.empty(1, size_out // 2 if gated else size_out, dtype=source.dtype, device=source.device)
    else:
        out = residual
    _one_row[(triton.cdiv(size_out, rule.outputs),)](
        source,
        source if normed is None else normed.weight,
        weight,
        source if bias is None else bias,
        out,
        0.0 if normed is None else normed.eps,
        SIZE_IN=size_in,
        SIZE_OUT=size_out,
        HAS_NORM=normed is not None,
        HAS_BIAS=bias is not None,
        GATED=gated,
        ADDS=residual is not None,
        OUTPUTS=rule.outputs,
        STEP=min(rule.step, triton.next_power_of_2(size_in)),
        num_warps=rule.warps,
        **pdl.options(),
    )
    return out
