"""Which choices a program of a mixture's products works on. Imports Triton: import it on CUDA only."""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import pdl


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
def rows_of(
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


def grouped(ids: Tensor, num_stacked: int, rows: int) -> tuple[Tensor, Tensor]:
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
