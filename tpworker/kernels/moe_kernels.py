"""The products of a mixture of experts on CUDA. Imports Triton: import it on CUDA only.

`experts` does what the function of this name in `tpworker.model.moe` does. A decode step touches most experts
and gives each a few tokens, so a layer is the reading of their weights, and what can be saved is everything
else: launches, waiting, weights that are read twice. There are three kernels, four with many tokens, behind
the two of moe_routing.py:

    _group          many tokens only: sorts the choices by expert and cuts them into tiles of ROWS
    _gate_up        first product and silu(gate) * up, one program a tile and some columns
    _down           second product, likewise, times the choice's weight
    _combine        sums each token's k + S rows in their order: no atomics, the same bits every time

A *choice* is a place in ids [T, k + S], flattened: a token and one of its experts. act [choices, F] and parts
[choices, D] have a row for each. Up to 32 tokens the programs find their expert's tokens themselves, in a few
hundred ids, and nothing is sorted; programs of experts without tokens end at once, which costs no more than a
list of the others would. The weights are the left operand of the products: the matrix units want 64 rows
there, while 16 tokens are enough on the right.

No size depends on values on the device and nothing is asked of the host, so all of it can be captured in a
CUDA graph. Kernels start early (`pdl`). Without bfloat16 or float16 it is right, and slow.
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

from tpworker.kernels import pdl

# ------------------------------------------------------------------------------------ who goes where


@triton.jit(do_not_specialize=["num_choices", "num_tiles"])
def _group(
    ids, order, tiles, num_choices, num_tiles, STACKED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program an expert: its choices in their order, and its tiles.

    It counts the choices of all experts by itself: programs need not meet.

    Args:
        order: int32 [choices]: the choices, sorted by expert.
        tiles: int32 [num_tiles, 3]: expert (-1: there is no such tile), its first place in `order`, and the
            end of the expert's places.
    """
    pdl.start_next(PDL)
    mine = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    column = tl.arange(0, CHUNK)
    pdl.wait(PDL)
    counts = tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < num_choices:  # Triton's interpreter cannot count a `for` up to an argument
        exists = start + column < num_choices
        found = tl.load(ids + start + column, mask=exists, other=0)
        counts += tl.histogram(found, BLOCK, mask=exists)
        start += CHUNK
    tiles_of = (counts + ROWS - 1) // ROWS
    count = tl.sum(tl.where(expert == mine, counts, 0), axis=0)
    first = tl.sum(tl.where(expert < mine, counts, 0), axis=0)
    first_tile = tl.sum(tl.where(expert < mine, tiles_of, 0), axis=0)
    own_tiles = (count + ROWS - 1) // ROWS
    end = first + count
    is_last = mine == STACKED - 1
    start = 0
    while start < num_tiles:
        tile = start + column
        out = tiles + (first_tile + tile) * 3
        tl.store(out, tile * 0 + mine, mask=tile < own_tiles)
        tl.store(out + 1, first + tile * ROWS, mask=tile < own_tiles)
        tl.store(out + 2, tile * 0 + end, mask=tile < own_tiles)
        is_unused = is_last & (tile >= first_tile + own_tiles) & (tile < num_tiles)
        tl.store(tiles + tile * 3, tile * 0 - 1, mask=is_unused)
        start += CHUNK
    start = 0
    while start < num_choices:
        exists = start + column < num_choices
        found = tl.load(ids + start + column, mask=exists, other=-1)
        is_mine = (found == mine).to(tl.int32)
        place = first + tl.cumsum(is_mine, axis=0) - 1
        tl.store(order + place, start + column, mask=is_mine == 1)
        first += tl.sum(is_mine, axis=0)
        start += CHUNK


@triton.jit
def _rows_of(
    slot, ids, order, tiles, num_tokens, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """A tile: its expert (-1: there is nothing to do), its choices [ROWS], and which of them exist.

    If the choices are SORTED, slots are tiles of `_group`; else there is one for each expert, and ROWS is at
    least the number of tokens: a token is at its own row.
    """
    row = tl.arange(0, ROWS)
    if SORTED:
        expert = tl.load(tiles + slot * 3)
        start = tl.load(tiles + slot * 3 + 1)
        end = tl.load(tiles + slot * 3 + 2)
        exists = (start + row < end) & (expert >= 0)
        choice = tl.load(order + start + row, mask=exists, other=0)
    else:
        column = tl.arange(0, WIDTH_BLOCK)[None, :]
        choices = row[:, None] * WIDTH + column
        found = tl.load(ids + choices, mask=(row[:, None] < num_tokens) & (column < WIDTH), other=-1)
        choice = tl.sum(tl.where(found == slot, choices, 0), axis=1)
        number = tl.sum((found == slot).to(tl.int32), axis=1)
        exists = number > 0
        expert = tl.where(tl.sum(number, axis=0) > 0, slot, -1)
    return expert, choice, exists


# --------------------------------------------------------------------------------------------- products


@triton.jit
def _product(
    source, row_of, exists, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Rows of a weight times rows of the input, LENGTH elements each: float32 [OUTPUTS, ROWS].

    Args:
        source, row_of: where the first STEP elements of each are, [OUTPUTS, STEP] and [STEP, ROWS].
        exists: which rows of the input do, [ROWS].
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
        total = tl.dot(weight, value, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up(
    x, gate_up, act, ids, order, tiles, num_tokens, SIZE: tl.constexpr, INNER: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, ROWS: tl.constexpr, SORTED: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a tile and BLOCK columns of act: their gate rows and their up rows in one product."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pdl.wait(PDL)
    pdl.start_next(PDL)  # not before the wait: `_down` reads at once what was written before this kernel
    expert, choice, exists = _rows_of(
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
    total = _product(source, row_of, exists, 2 * BLOCK, ROWS, SIZE, STEP)
    gate, up = tl.split(tl.permute(tl.reshape(total, (2, BLOCK, ROWS)), (2, 1, 0)))  # [ROWS, BLOCK] each
    result = gate * tl.sigmoid(gate) * up
    target = act + choice.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(target, result.to(act.dtype.element_ty), mask=exists[:, None] & (column < INNER)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _down(
    act, down, parts, weights, ids, order, tiles, num_tokens, SIZE: tl.constexpr, INNER: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, ROWS: tl.constexpr, SORTED: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a tile and BLOCK columns of parts.

    Who goes where is read before the wait: when `_gate_up` lets this kernel start, it has waited for it.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert, choice, exists = _rows_of(
        tl.program_id(1), ids, order, tiles, num_tokens, WIDTH, WIDTH_BLOCK, ROWS, SORTED
    )
    if expert < 0:
        return
    share = tl.load(weights + choice, mask=exists, other=0.0)
    pdl.wait(PDL)
    pdl.start_next(PDL)
    step = tl.arange(0, STEP)
    source = down + expert.to(tl.int64) * (SIZE * INNER)
    source += tl.minimum(column, SIZE - 1)[:, None] * INNER + step[None, :]
    row_of = act + choice.to(tl.int64)[None, :] * INNER + step[:, None]
    total = _product(source, row_of, exists, BLOCK, ROWS, INNER, STEP)
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


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut up: BLOCK columns a program, STEP of the inner dimension at a time."""

    block: int
    step: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How the experts' products are computed."""

    rows: int
    """Most choices of a tile, all of one expert."""
    is_sorted: bool
    """`_group` sorts the choices; else programs find them, among at most `rows` tokens."""
    gate_up: Tile
    down: Tile


def plan(num_tokens: int, num_choices: int, num_stacked: int, dtype: torch.dtype) -> Plan:
    """The fastest of a few dozen on an H200, for GLM-4.5-Air and ERNIE-4.5-21B-A3B at TP 4."""
    if dtype == torch.float32:  # without matrix units, and twice the memory
        tiles = (Tile(16, 32, 4, 2), Tile(32, 32, 4, 2))
        return Plan(16, False, *tiles) if num_tokens <= 16 else Plan(32, True, *tiles)
    if num_tokens <= 16:
        return Plan(16, False, Tile(32, 128, 4, 3), Tile(128, 64, 4, 4))
    if num_tokens <= 32:
        return Plan(32, False, Tile(32, 128, 4, 4), Tile(128, 64, 4, 4))
    if num_tokens <= 64:
        return Plan(16, True, Tile(64, 128, 8, 3), Tile(128, 64, 4, 4))
    if num_choices <= 32 * num_stacked:
        return Plan(32, True, Tile(32, 64, 4, 4), Tile(64, 64, 4, 4))
    if num_choices <= 96 * num_stacked:
        return Plan(64, True, Tile(64, 64, 8, 4), Tile(128, 64, 4, 3))
    return Plan(128, True, Tile(64, 64, 8, 3), Tile(128, 64, 4, 3))


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `moe.experts`. Sums are in float32, act and each choice's weighted row are rounded to x's dtype."""
    return experts_by(plan(len(x), ids.numel(), len(down), x.dtype), x, ids, weights, gate_up, down)


def experts_by(plan: Plan, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`experts`, in one of the ways to do it."""
    for tensor in (x, ids, weights, gate_up, down):
        assert tensor.is_contiguous()
    assert plan.is_sorted or len(x) <= plan.rows
    num_tokens, size = x.shape
    num_stacked, _, inner = down.shape
    num_choices, width = ids.numel(), ids.shape[1]
    act = x.new_empty(num_choices, inner)
    parts = x.new_empty(num_choices, size)
    out = torch.empty_like(x)
    if plan.is_sorted:
        order, tiles = _grouped(ids, num_stacked, plan.rows)
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
        **pdl.options(),
    }
    _gate_up[(triton.cdiv(inner, plan.gate_up.block), num_slots)](
        x,
        gate_up,
        act,
        ids,
        order,
        tiles,
        num_tokens,
        BLOCK=plan.gate_up.block,
        STEP=plan.gate_up.step,
        num_warps=plan.gate_up.num_warps,
        num_stages=plan.gate_up.num_stages,
        **kinds,
    )
    _down[(triton.cdiv(size, plan.down.block), num_slots)](
        act,
        down,
        parts,
        weights,
        ids,
        order,
        tiles,
        num_tokens,
        BLOCK=plan.down.block,
        STEP=plan.down.step,
        num_warps=plan.down.num_warps,
        num_stages=plan.down.num_stages,
        **kinds,
    )
    block = min(1024, triton.next_power_of_2(size))
    _combine[(num_tokens, triton.cdiv(size, block))](
        parts, out, SIZE=size, WIDTH=width, BLOCK=block, num_warps=4, **pdl.options()
    )
    return out


def _grouped(ids: Tensor, num_stacked: int, rows: int) -> tuple[Tensor, Tensor]:
    """`order` and `tiles` of `_group`; as many tiles as there can be at most."""
    num_choices = ids.numel()
    num_tiles = min(num_choices, (num_choices + num_stacked * (rows - 1)) // rows)
    order = torch.empty_like(ids)
    tiles = ids.new_empty(num_tiles, 3)
    is_short = num_choices <= 4096
    _group[(num_stacked,)](
        ids,
        order,
        tiles,
        num_choices,
        num_tiles,
        STACKED=num_stacked,
        ROWS=rows,
        BLOCK=triton.next_power_of_2(num_stacked),
        CHUNK=1024 if is_short else 4096,
        num_warps=4 if is_short else 8,
        **pdl.options(),
    )
    return order, tiles
