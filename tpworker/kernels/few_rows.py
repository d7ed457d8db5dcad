"""How products of a weight with up to 64 rows are cut; the kernel is `tpworker.kernels.few_rows_kernel`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from tpworker.kernels.gluon import has_gluon
from tpworker.kernels.operands import Fp8Weight

MOST_ROWS = 64
_SHORTEST_SUM = 16  # inputs that the matrix units take at a time: blocks of FP8 have no fewer
_MOST_SHARE = 2  # programs of a processor, if they share tiles of a weight in FP8
_SMALL = 4 << 20  # elements of a weight
_OTHER = 3 << 10  # bytes of shared memory of each program besides its stages, at most
SHARED_MEMORY = 227 << 10  # of a Hopper processor, for all programs there, and 1 KB of each more


@dataclass(frozen=True, slots=True)
class FewRows:
    """How a product is cut."""

    outputs: int = 64  # rows of the weight that a program reads
    step: int = 128  # elements of each at a time
    splits: int = 1  # programs that share them, a power of two, no more than `padded` rows
    warps: int = 4
    stages: int = 4  # steps that are on their way
    share: int = 1  # programs that a processor holds at the same time, if they share tiles

    def stage_bytes(self, num_rows: int, element_size: int) -> int:
        """Shared memory of a step of a weight whose elements have so many bytes, and of its input."""
        return self.step * (element_size * self.outputs + 2 * padded(num_rows))


def cut_few(num_rows: int, size_out: int, size_in: int, processors: int) -> FewRows:
    """For a weight [out, in] of 16-bit elements on a GPU of so many processors."""
    outputs, step = 64, 128 if num_rows <= 32 else 64
    programs, steps, splits = -(-size_out // outputs), -(-size_in // step), 1
    # Sharing a tile costs a microsecond or two; it pays where half of the processors would have nothing to
    # do, and where there is much to read.
    while 2 * programs <= processors and steps >= 4 * splits and splits < padded(num_rows):
        if programs >= 0.48 * processors and steps * step <= 2048 * splits:
            break
        splits *= 2
        programs *= 2
    # Programs start early, on whichever processor has room, and none should have more than its share of
    # them: so each takes as much shared memory as lets no more fit.
    share = min(-(-programs // processors), 3)
    cut = FewRows(outputs, step, splits)
    return replace(cut, stages=(SHARED_MEMORY // (share + 1) - 1024) // cut.stage_bytes(num_rows, 2) + 1)


def cut_few_fp8(num_rows: int, size_out: int, size_in: int, processors: int) -> FewRows:
    """For a weight [out, in] in FP8 on a GPU of so many processors.

    What is read is half of that in 16 bits, and each of it is converted, which one program of a processor
    does more slowly than memory delivers: where tiles are few, each is shared until there are two.
    """
    outputs, step = 64, 256
    if size_out > outputs * processors:
        step = 256 if num_rows <= 32 else 128
    elif size_out * size_in <= _SMALL:
        step = 128
    tiles, stage = -(-size_out // outputs), FewRows(outputs, step).stage_bytes(num_rows, 1)
    splits, share = 1, min(-(-tiles // processors), 3)
    while 2 * splits <= padded(num_rows) and 4 * splits * step <= size_in:
        more = -(-2 * splits * tiles // processors)
        if more > _MOST_SHARE or most_stages(stage, more) < 2:
            break
        splits, share = 2 * splits, more
    # See `cut_few`.
    stages = min((SHARED_MEMORY // (share + 1) - 1024) // stage + 1, most_stages(stage, share))
    return FewRows(outputs, step, splits, stages=stages, share=share)


def most_stages(stage: int, share: int) -> int:
    """Steps of so many bytes that each program has room for, if a processor is to hold so many programs."""
    return (SHARED_MEMORY // share - _OTHER) // stage


def padded(num_rows: int) -> int:
    """The rows that are computed: 8, 16, 32 or 64."""
    return max(8, 1 << (num_rows - 1).bit_length())


def can_multiply_few(weight: Tensor | Fp8Weight) -> bool:
    """Whether the kernel can run on this GPU, and can read the weight."""
    if isinstance(weight, Fp8Weight):
        columns = weight.block[1]
        weight = weight.values
        if columns < weight.shape[1] and (columns < _SHORTEST_SUM or columns & (columns - 1)):
            return False
    row = weight.shape[1] * weight.element_size()
    return row % 16 == 0 and weight.data_ptr() % 16 == 0 and _is_supported(weight.device)


@cache
def _is_supported(device: torch.device) -> bool:
    """Whether it has Hopper's copies and matrix units, and Triton has Gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return has_gluon("tpworker.kernels.few_rows_kernel")


@cache
def counters(device: torch.device) -> Tensor:
    """int32 zeros, which every product leaves zeros again, for products one after the other.

    Two for each tile that is shared, of which there are up to four a processor.

    To be called before a graph is captured.
    """
    return torch.zeros(8 * num_processors(device), dtype=torch.int32, device=device)


@cache
def num_processors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
