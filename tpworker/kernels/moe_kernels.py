"""The products of a mixture of experts on CUDA. Imports Triton: import it on CUDA only.

`experts` does what the function of this name in `tpworker.model.moe` does. A decode step touches most experts
and gives each a few tokens, so a layer is the reading of their weights, and what can be saved is everything
else: launches, waiting, weights that are read twice. There are three kernels, more with many tokens, behind
the two of moe_routing.py:

    group           many tokens only: sorts the choices by expert and cuts them into tiles of ROWS
    quantise        many tokens times weights in FP8 only: brings x to FP8, each row by its greatest element
    _gate_up        first product and silu(gate) * up, one program a tile and some columns
    quantise        as above, of act
    _down           second product, likewise, times the choice's weight
    _combine        sums each token's k + S rows in their order: no atomics, the same bits every time

A *choice* is a place in ids [T, k + S], flattened: a token and one of its experts. act [choices, F] and parts
[choices, D] have a row for each. Up to 32 tokens the programs find their expert's tokens themselves, in a few
hundred ids, and nothing is sorted; programs of experts without tokens end at once, which costs no more than a
list of the others would. The weights are the left operand of the products: the matrix units want 64 rows
there, while 16 tokens are enough on the right; and the left operand may come from registers, where weights in
FP8 are made 16 bits wide, exactly. Their scales are applied to sums: of all inputs, or of each block's.

No size depends on values on the device and nothing is asked of the host, so all of it can be captured in a
CUDA graph. Kernels start early (`pdl`). Without bfloat16 or float16 it is right, and slow.
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
from tpworker.kernels.fp8_kernels import quantise
from tpworker.kernels.moe_grouping import grouped, rows_of
from tpworker.kernels.moe_plans import Plan, Tile, Weights, plan

__all__ = ["Plan", "Tile", "Weights", "experts", "experts_by", "plan"]

# --------------------------------------------------------------------------------------------- products


@triton.jit
def _widened(weight, dtype: tl.constexpr):
    """FP8 in 16 bits, exactly; what is not FP8, or is to be multiplied as FP8, as it is."""
    if weight.dtype != tl.float8e4nv or dtype == tl.float8e4nv:
        return weight
    # Instructions convert to float16 alone. Left to itself, Triton goes on with others, four times as slow.
    return weight.to(tl.float16).to(tl.float32).to(dtype)


@triton.jit
def _product(
    source, row_of, exists, scales, SCALE_COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Rows of a weight times rows of the input, LENGTH elements each: float32 [OUTPUTS, ROWS].

    Args:
        source, row_of: where the first STEP elements of each are, [OUTPUTS, STEP] and [STEP, ROWS].
        exists: which rows of the input do, [ROWS].
        scales: where each row's first scale is, [OUTPUTS]; looked at if SCALE_COLUMNS inputs each have one:
            of a step, which is applied to its sums, or of fewer, applied to each element.
    """
    step = tl.arange(0, STEP)
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(0, LENGTH, STEP):
        if LENGTH % STEP == 0:
            weight = tl.load(source + start)
            value = tl.load(row_of + start, mask=exists[None, :], other=0.0)
        else:
            inside = start + step < LENGTH
            weight = tl.load(source + start, mask=inside[None, :], other=0.0)
            value = tl.load(row_of + start, mask=exists[None, :] & inside[:, None], other=0.0)
        if SCALE_COLUMNS == 0:
            weight = _widened(weight, value.dtype)
            total = tl.dot(weight, value, total, input_precision="ieee")
        elif SCALE_COLUMNS < STEP:
            scale = tl.load(scales[:, None] + tl.minimum(start + step, LENGTH - 1)[None, :] // SCALE_COLUMNS)
            weight = (weight.to(tl.float32) * scale).to(value.dtype)
            total = tl.dot(weight, value, total, input_precision="ieee")
        else:
            weight = _widened(weight, value.dtype)
            scale = tl.load(scales + start // SCALE_COLUMNS)
            total += tl.dot(weight, value, input_precision="ieee") * scale[:, None]
    return total


@triton.jit
def _scales_of(
    scales, expert, weight_row, OUT: tl.constexpr, IN: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Where each of an expert's rows has its first scale; of weights without scales not to be looked at."""
    if SCALE_ROWS > 0:
        of_row: tl.constexpr = 1 if SCALE_COLUMNS == 0 else (IN + SCALE_COLUMNS - 1) // SCALE_COLUMNS
        of_expert: tl.constexpr = (OUT + SCALE_ROWS - 1) // SCALE_ROWS * of_row
        scales += expert * of_expert + weight_row // SCALE_ROWS * of_row
    else:
        scales += weight_row * 0
    return scales


@triton.jit
def _scaled(
    total, scales, row_scales, row, exists, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    IS_FP8: tl.constexpr,
):  # fmt: skip
    """A product's sums with the scales that all of a sum has in common: of its output, and of its input."""
    if SCALE_ROWS > 0 and SCALE_COLUMNS == 0:
        total *= tl.load(scales)[:, None]
    if IS_FP8:
        total *= tl.load(row_scales + row, mask=exists, other=0.0)[None, :]
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up(
    x, x_scales, gate_up, scales, act, ids, order, tiles, num_tokens, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, IS_FP8: tl.constexpr, SIZE: tl.constexpr,
    INNER: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SORTED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a tile and BLOCK columns of act: their gate rows and their up rows in one product."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pdl.wait(PDL)
    pdl.start_next(PDL)  # not before the wait: `_down` reads at once what was written before this kernel
    expert, choice, exists = rows_of(
        tl.program_id(1), ids, order, tiles, num_tokens, WIDTH, WIDTH_BLOCK, ROWS, SORTED
    )
    if expert < 0:
        return
    which = tl.arange(0, 2 * BLOCK)
    weight_row = tl.minimum(tl.program_id(0) * BLOCK + which % BLOCK, INNER - 1)
    weight_row = tl.where(which < BLOCK, weight_row, weight_row + INNER)
    step = tl.arange(0, STEP)
    source = gate_up + expert.to(tl.int64) * (2 * INNER * SIZE) + weight_row[:, None] * SIZE + step[None, :]
    row_of = x + (choice // WIDTH).to(tl.int64)[None, :] * SIZE + step[:, None]
    scale = _scales_of(scales, expert, weight_row, 2 * INNER, SIZE, SCALE_ROWS, SCALE_COLUMNS)
    total = _product(source, row_of, exists, scale, SCALE_COLUMNS, 2 * BLOCK, ROWS, SIZE, STEP)
    total = _scaled(total, scale, x_scales, choice // WIDTH, exists, SCALE_ROWS, SCALE_COLUMNS, IS_FP8)
    gate, up = tl.split(tl.permute(tl.reshape(total, (2, BLOCK, ROWS)), (2, 1, 0)))  # [ROWS, BLOCK] each
    result = gate * tl.sigmoid(gate) * up
    target = act + choice.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(target, result.to(act.dtype.element_ty), mask=exists[:, None] & (column < INNER)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _down(
    act, act_scales, down, scales, parts, weights, ids, order, tiles, num_tokens, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, IS_FP8: tl.constexpr, SIZE: tl.constexpr,
    INNER: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SORTED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a tile and BLOCK columns of parts.

    Who goes where is read before the wait: when `_gate_up` lets this kernel start, or one between, it has
    waited for it.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert, choice, exists = rows_of(
        tl.program_id(1), ids, order, tiles, num_tokens, WIDTH, WIDTH_BLOCK, ROWS, SORTED
    )
    if expert < 0:
        return
    share = tl.load(weights + choice, mask=exists, other=0.0)
    pdl.wait(PDL)
    pdl.start_next(PDL)
    step = tl.arange(0, STEP)
    weight_row = tl.minimum(column, SIZE - 1)
    source = down + expert.to(tl.int64) * (SIZE * INNER) + weight_row[:, None] * INNER + step[None, :]
    row_of = act + choice.to(tl.int64)[None, :] * INNER + step[:, None]
    scale = _scales_of(scales, expert, weight_row, SIZE, INNER, SCALE_ROWS, SCALE_COLUMNS)
    total = _product(source, row_of, exists, scale, SCALE_COLUMNS, BLOCK, ROWS, INNER, STEP)
    total = _scaled(total, scale, act_scales, choice, exists, SCALE_ROWS, SCALE_COLUMNS, IS_FP8)
    result = tl.trans(total) * share[:, None]
    target = parts + choice.to(tl.int64)[:, None] * SIZE + column[None, :]
    tl.store(target, result.to(parts.dtype.element_ty), mask=exists[:, None] & (column < SIZE)[None, :])


@triton.jit
def _combine(parts, out, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a token and BLOCK columns: the sum of its choices' rows, in their order."""
    pdl.start_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    pdl.wait(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(WIDTH):
        total += tl.load(parts + (token * WIDTH + choice) * SIZE + column, mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(out + token * SIZE + column, total.to(out.dtype.element_ty), mask=inside)


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Weights, down: Weights) -> Tensor:
    """See `moe.experts`. Sums are in float32, act and each choice's weighted row are rounded to x's dtype."""
    how = plan(len(x), ids.numel(), x.dtype, gate_up, down)
    return experts_by(how, x, ids, weights, gate_up, down)


def experts_by(
    plan: Plan, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Weights, down: Weights
) -> Tensor:
    """`experts`, in one of the ways to do it."""
    for tensor in (x, ids, weights, *_tensors(gate_up), *_tensors(down)):
        assert tensor.is_contiguous()
    assert plan.is_sorted or len(x) <= plan.rows
    num_tokens, size = x.shape
    num_stacked, _, inner = _tensors(down)[0].shape
    num_choices, width = ids.numel(), ids.shape[1]
    act = x.new_empty(num_choices, inner)
    parts = x.new_empty(num_choices, size)
    out = torch.empty_like(x)
    if plan.is_sorted:
        order, tiles = grouped(ids, num_stacked, plan.rows)
        num_slots = len(tiles)
    else:
        order = tiles = ids  # not looked at
        num_slots = num_stacked
    kinds = {
        "SIZE": size,
        "INNER": inner,
        "WIDTH": width,
        "WIDTH_BLOCK": triton.next_power_of_2(width),
        "ROWS": plan.rows,
        "SORTED": plan.is_sorted,
        "IS_FP8": plan.rounds_inputs,
        **pdl.options(),
    }
    rows, row_scales = quantise(x, by_group=False) if plan.rounds_inputs else (x, x)
    _gate_up[(triton.cdiv(inner, plan.gate_up.block), num_slots)](
        rows,
        row_scales,
        *_tensors(gate_up),
        act,
        ids,
        order,
        tiles,
        num_tokens,
        **plan.gate_up.options(gate_up),
        **kinds,
    )
    rows, row_scales = quantise(act, by_group=False) if plan.rounds_inputs else (act, act)
    _down[(triton.cdiv(size, plan.down.block), num_slots)](
        rows,
        row_scales,
        *_tensors(down),
        parts,
        weights,
        ids,
        order,
        tiles,
        num_tokens,
        **plan.down.options(down),
        **kinds,
    )
    block = min(1024, triton.next_power_of_2(size))
    _combine[(num_tokens, triton.cdiv(size, block))](
        parts, out, SIZE=size, WIDTH=width, BLOCK=block, num_warps=4, **pdl.options()
    )
    return out


def _tensors(weight: Weights) -> tuple[Tensor, Tensor]:
    """Values and scales; a weight that has no scales stands for them, and nobody looks."""
    return (weight, weight) if isinstance(weight, Tensor) else (weight.values, weight.scales)
