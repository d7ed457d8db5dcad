"""Products of a weight with few rows. Imports Triton: import it on CUDA only.

With few rows a product is the reading of its weight. The library's tiles leave much of the GPU idle where
matrices are small, and its kernels start when the one before them has ended. These have been set up by then,
and with one row have loaded the first part of their weight (see `tpworker.model.pdl`). And what stands
between two products is done by them (see `tpworker.model.deferred`).
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.model import pdl
from tpworker.model.deferred import Normed
from tpworker.model.pdl import start_next, wait

# ------------------------------------------------------------------------------------- which one, and how


@dataclass(frozen=True, slots=True)
class OneRow:
    """How a product of one row is cut."""

    outputs: int = 2  # rows of the weight that a program reads
    step: int = 2048  # elements of each at a time
    warps: int = 4


@dataclass(frozen=True, slots=True)
class FewRows:
    """How a product of several rows is cut."""

    outputs: int = 64  # rows of the weight that a program reads
    step: int = 128  # elements of each at a time
    splits: int = 1  # programs that share them
    warps: int = 4
    stages: int = 4  # steps that are on their way


MOST_ROWS = 32
"""With 64, the library was as fast or faster (H200)."""

_SMALL, _LARGE = 6 << 20, 10 << 20
"""Elements of a weight. Up to the first, narrow tiles are needed to occupy all processors; between the two
the library was faster (4096 x 2048: by 10 %)."""

_PROGRAMS = 230  # how many there should be for wider tiles


def choose(num_rows: int, weight: Tensor, gated: bool) -> OneRow | FewRows | None:
    """How to multiply so many rows with the weight [out, in]; None: the library does it.

    What was fastest for the matrices of Qwen3-0.6B and 8B, GLM-4.5-Air and ERNIE-4.5-21B-A3B, split over 1, 2
    and 4 ranks, on an H200.

    Args:
        gated: see `multiply`.
    """
    if weight.element_size() != 2 or not 0 < num_rows <= MOST_ROWS:
        return None
    size_out, size_in = weight.shape
    if num_rows == 1:
        if size_in <= 2048:
            return OneRow(4, triton.next_power_of_2(size_in))
        return OneRow(2, 4096, 8) if gated and size_in <= 4096 else OneRow(2, 2048)
    if size_in * size_out <= _SMALL:
        rule, tiles = FewRows(32, stages=6), triton.cdiv(size_out, 32)
        splits = 1 if tiles >= 100 else round(size_in / 512)
    elif size_in * size_out < _LARGE:
        return None
    else:
        rule, tiles = FewRows(64), triton.cdiv(size_out, 64)
        splits = round(_PROGRAMS / tiles)
    splits = max(1, min(8, splits))
    while splits > 1 and size_in % (splits * rule.step):
        splits -= 1
    return replace(rule, splits=splits)


def multiply(
    x: Tensor | Normed, weight: Tensor, bias: Tensor | None, rule: OneRow | FewRows, gated: bool = False
) -> Tensor:
    """x [R, in] times weight [out, in] transposed, plus bias [out]: [R, out].

    gated: the product is gate, then up, and silu(gate) * up [R, out / 2] is returned; gate and up are rounded
    as if they were stored in between.
    """
    if isinstance(rule, OneRow):
        return multiply_one(x, weight, bias, rule, gated, None)
    if isinstance(x, Normed) and x.scaled is None:
        x = x.tensor()
    return multiply_few(x, weight, bias, rule, gated, None)


def multiply_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, rule: OneRow | FewRows, target: Normed
) -> None:
    """Add the product to target.x [R, out], in place."""
    assert target.x.is_contiguous()
    assert target.x.shape == (len(x), len(weight))
    if isinstance(rule, OneRow):
        multiply_one(x, weight, bias, rule, False, target.x)
    else:
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


# -------------------------------------------------------------------------------------------- several rows


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows(
    x, squares, weight, bias, out, next_norm, next_scaled, next_squares, partial, arrived, eps,
    num_rows, size_in, size_out, length, num_squares, NUM_SQUARES: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program OUTPUTS rows of the weight, or `length` elements of each; sums in float32. See `_rows_of`.

    The product is computed transposed, out.T = weight @ x.T: the matrix units take 64 rows at a time of what
    stands left, and that is the weight. EVEN: all programs have whole steps.

    NUM_SQUARES > 0: x is what a norm's weight was multiplied to, and `squares` has the sums of squares of
    `num_squares` parts of each row from before that: the norm's other factor is applied to the result. ADDS:
    the result is added to `out`; stored are also the sum times next_norm, and the sums of squares of OUTPUTS
    columns.
    """
    start_next(PDL)
    tile = tl.program_id(0)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, size_in)
    output, first = _rows_of(tile, size_out, OUTPUTS, GATED)
    # A row that does not exist is read as the last one, and not stored.
    source = weight + tl.minimum(output, size_out - 1)[:, None] * size_in
    row = tl.arange(0, ROWS)
    is_row = (row < num_rows)[:, None]
    start_of_x = x + row[:, None] * size_in
    wait(PDL)
    if NUM_SQUARES > 0:
        which = tl.arange(0, NUM_SQUARES)[:, None]
        has_square = (which < num_squares) & (row < num_rows)[None, :]
        square = tl.load(squares + which * num_rows + row[None, :], mask=has_square, other=0.0)
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(begin, end, STEP):
        column = (start + tl.arange(0, STEP))[None, :]
        if EVEN:
            part = tl.load(source + column)
            value = tl.load(start_of_x + column, mask=is_row, other=0.0)
        else:
            part = tl.load(source + column, mask=column < end, other=0.0)
            value = tl.load(start_of_x + column, mask=is_row & (column < end), other=0.0)
        total = tl.dot(part, tl.trans(value), total, input_precision="ieee")
    is_real = (output < size_out)[:, None] & (row < num_rows)[None, :]
    is_last = True
    if SPLITS > 1:
        place = output[:, None] * ROWS + row[None, :]
        tl.store(partial + tl.program_id(1).to(tl.int64) * (size_out * ROWS) + place, total, mask=is_real)
        # All of the program's threads have written before one of them says so.
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            total = tl.zeros([OUTPUTS, ROWS], tl.float32)
            for other in tl.static_range(SPLITS):  # always in the same order
                total += tl.load(
                    partial + other * (size_out * ROWS) + place, mask=is_real, other=0.0, cache_modifier=".cg"
                )
            tl.store(arrived + tile, 0)  # for the next product
    if is_last:
        if NUM_SQUARES > 0:
            total *= tl.rsqrt(tl.sum(square, axis=0) / size_in + eps)[None, :]
        if HAS_BIAS:
            added = tl.load(bias + output, mask=output < size_out, other=0.0).to(tl.float32)
            total += added[:, None]
        result = total.to(out.dtype.element_ty)
        if GATED:
            gate, up = tl.split(result.reshape([2, OUTPUTS // 2, ROWS]).permute(1, 2, 0))
            target = first + tl.arange(0, OUTPUTS // 2)
            is_wanted = (target < size_out // 2)[:, None] & (row < num_rows)[None, :]
            to_out = out + row[None, :] * (size_out // 2) + target[:, None]
            tl.store(to_out, _gate(gate, up), mask=is_wanted)
        else:
            target = row[None, :] * size_out + output[:, None]
            if ADDS:
                result = _added(tl.load(out + target, mask=is_real, other=0.0), result)
                wide = tl.where(is_real, result.to(tl.float32), 0.0)
                tl.store(
                    next_squares + tile * num_rows + row, tl.sum(wide * wide, axis=0), mask=row < num_rows
                )
                scale = tl.load(next_norm + output, mask=output < size_out, other=0.0).to(tl.float32)
                tl.store(next_scaled + target, (wide * scale[:, None]).to(result.dtype), mask=is_real)
            tl.store(out + target, result, mask=is_real)


def multiply_few(
    x: Tensor | Normed, weight: Tensor, bias: Tensor | None, rule: FewRows, gated: bool, target: Normed | None
) -> Tensor:
    """See `multiply`. target: to whose x the product is added; its other tensors are filled in."""
    squares = x.squares if isinstance(x, Normed) else None
    eps = x.eps if isinstance(x, Normed) else 0.0
    if isinstance(x, Normed):
        assert x.scaled is not None
        x = x.scaled
    assert x.is_contiguous()
    assert weight.is_contiguous()
    size_out, size_in = weight.shape
    num_rows = len(x)
    rows = max(16, triton.next_power_of_2(num_rows))
    num_tiles = triton.cdiv(size_out, rule.outputs)
    length = triton.cdiv(triton.cdiv(size_in, rule.splits), rule.step) * rule.step
    assert (rule.splits - 1) * length < size_in, (rule, size_in)
    if target is None:
        out = torch.empty(num_rows, size_out // 2 if gated else size_out, dtype=x.dtype, device=x.device)
        next_norm = next_scaled = next_squares = out
    else:
        out, next_norm, next_scaled = target.x, target.weight, torch.empty_like(target.x)
        next_squares = torch.empty(num_tiles, num_rows, dtype=torch.float32, device=x.device)
        target.scaled, target.squares = next_scaled, next_squares
    partial = arrived = x
    if rule.splits > 1:
        partial = torch.empty(rule.splits, size_out, rows, dtype=torch.float32, device=x.device)
        arrived = counters(x.device)
        assert num_tiles <= len(arrived)
    _few_rows[(num_tiles, rule.splits)](
        x,
        x if squares is None else squares,
        weight,
        x if bias is None else bias,
        out,
        next_norm,
        next_scaled,
        next_squares,
        partial,
        arrived,
        eps,
        num_rows,
        size_in,
        size_out,
        length,
        0 if squares is None else len(squares),
        NUM_SQUARES=0 if squares is None else triton.next_power_of_2(len(squares)),
        EVEN=size_in == rule.splits * length,
        HAS_BIAS=bias is not None,
        GATED=gated,
        ADDS=target is not None,
        ROWS=rows,
        OUTPUTS=rule.outputs,
        STEP=rule.step,
        SPLITS=rule.splits,
        num_warps=rule.warps,
        num_stages=rule.stages,
        **pdl.options(),
    )
    return out


@cache
def counters(device: torch.device) -> Tensor:
    """int32 zeros, which every product leaves zeros again, for products one after the other.

    To be called before a graph is captured.
    """
    return torch.zeros(8192, dtype=torch.int32, device=device)
