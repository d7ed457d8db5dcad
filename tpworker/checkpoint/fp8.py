"""Weights in FP8 as a rank holds them: the published values of its part, and the scales that belong to these.

A scale for each output channel goes with the channel; a tensor's only one becomes each channel's. A block's
goes with all that a rank has of the block. Where parts end within blocks, a rank's blocks are smaller: the
greatest power of two that fits all.

    published, blocks of 128   |  s0 (rows 0 … 127)  |  s1 (128 … 255)  | s2 …
    a rank's rows 64 … 191           |  s0    |  s1  |                           blocks of 64
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tpworker.kernels.operands import Fp8Weight
from tpworker.model.families import Quantization
from tpworker.model.fp8 import E4M3, quantise
from tpworker.model.tp import Split

Part = tuple[str, Split]
"""A published module, and which of its output rows, or of its input columns, are the rank's."""

Fill = Callable[[Tensor, str, int, Split], None]
"""See `assembly.Fill`."""


def block_of(
    quantization: Quantization, parts: Sequence[Sequence[Part]], dim: int, whole: int
) -> tuple[int, int]:
    """Rows and columns that have a scale in common, in each of several weights.

    Args:
        parts: of each weight, one below the other; split by output rows (dim 0) or input columns (dim 1).
        whole: columns that a rank has.
    """
    if quantization.scales != "block":
        return 1, whole
    granule = quantization.block
    for weight in parts:
        start = 0
        for _, split in weight:
            ends = [
                start,
                *(end for run in split.runs for end in (run.source, start + run.target, run.length)),
            ]
            while any(end % granule for end in ends):
                granule //= 2
            start += split.local
    return (granule, quantization.block) if dim == 0 else (quantization.block, granule)


def fill_weight(
    weight: Fp8Weight, parts: Sequence[Part], dim: int, quantization: Quantization, fill: Fill
) -> None:
    """Fill values and scales [out, in] of zeros with what is published of these parts."""
    start = 0
    for name, split in parts:
        fill(weight.values.narrow(dim, start, split.local), f"{name}.weight", dim, split)
        scales = f"{name}.{quantization.name}"
        if quantization.scales == "block":
            _fill_blocks(weight, scales, start, split, dim, quantization.block, fill)
        else:
            rows = weight.scales.narrow(0, start, split.local) if dim == 0 else weight.scales
            if quantization.scales == "tensor":
                one = rows.new_zeros(1)
                fill(one, scales, 0, Split.whole(1))
                rows.copy_(one.expand_as(rows))
            else:
                fill(rows, scales, 0, split if dim == 0 else Split.whole(len(rows)))
        start += split.local


def _fill_blocks(
    weight: Fp8Weight, name: str, start: int, split: Split, dim: int, block: int, fill: Fill
) -> None:
    """The scales of one part, which begins at `start` along `dim`."""
    sizes = list(weight.values.shape)
    sizes[dim] = split.full
    published = weight.scales.new_zeros([-(-size // block) for size in sizes])
    fill(published, name, 0, Split.whole(len(published)))
    if published.device.type == "meta":
        return
    granule = weight.block[dim]
    for run in split.runs:
        first, count = (start + run.target) // granule, -(-run.length // granule)
        of_block = (run.source + granule * torch.arange(count, device=published.device)) // block
        weight.scales.narrow(dim, first, count).copy_(published.index_select(dim, of_block))


def fill_made(weight: Fp8Weight, plain: Tensor) -> None:
    """Fill values and scales with a weight [out, in] that is not quantised."""
    made = quantise(plain)
    weight.values.copy_(made.values)
    weight.scales.copy_(made.scales)


def empty_weight(
    zeros: Callable[..., Tensor], shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype
) -> Fp8Weight:
    """Zeros, [..., out, in], to be filled."""
    *several, rows, columns = shape
    values = zeros(*shape, dtype=E4M3)
    scales = zeros(*several, -(-rows // block[0]), -(-columns // block[1]), dtype=torch.float32)
    return Fp8Weight(values, scales, block, dtype)
