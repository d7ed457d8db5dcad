"""Sampling from the whole vocabulary: the best token of this rank's part. Imports Triton: on CUDA only.

What `sampling.best_tokens` and `gumbel_noise` define. All can be captured in a CUDA graph.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from tpworker.kernels.operands import GREEDY_BELOW, SamplingRows

_VOCAB_BLOCK = 2048  # logits of one program: 75 programs for one row of Qwen3's vocabulary


@triton.jit
def _mix(z):
    """SplitMix64's output function, on uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _gumbel(seed, position, token):
    """`sampling.gumbel_noise` of one (seed, position), both int64, and tokens int64 [n]."""
    key = _mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    key = _mix(key + position.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15)
    bits = _mix(key + (token + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15) & 0x7FFFFFFFFFFFFFFF
    uniform = bits.to(tl.int64, bitcast=True).to(tl.float32) * 1.0842021724855044e-19  # 2**-63
    uniform = tl.minimum(tl.maximum(uniform, 1.0842021724855044e-19), 0.99999994)  # 1 - 2**-24
    # libdevice's, which torch uses too; Triton's own logarithm is the approximate one.
    return -libdevice.log(-libdevice.log1p(-uniform))


NAN_BEFORE = tl.constexpr(1 << 30)  # added to a column whose score is a number; above every column


@triton.jit
def _best_of_block(
    logits, temperature, seed, position, block_best, block_column, size, stride, vocab_start, num_blocks,
    RANDOM: tl.constexpr, GREEDY_BELOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row and BLOCK of its logits: the highest score and the first column that has it.

    NaN is higher than all. A maximum passes over it, so it is found with the columns: by their order.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    exists = column < size
    score = tl.load(logits + row * stride + column, mask=exists, other=float("-inf")).to(tl.float32)
    if RANDOM:
        degree = tl.load(temperature + row)
        if degree >= GREEDY_BELOW:
            noise = _gumbel(tl.load(seed + row), tl.load(position + row), column.to(tl.int64) + vocab_start)
            score = tl.div_rn(score, tl.zeros_like(score) + degree) + noise
    best = tl.max(score, axis=0)
    place = tl.where((score == best) & exists, column, size - 1)
    first = tl.min(tl.where(score == score, place + NAN_BEFORE, column), axis=0)
    is_nan = first < NAN_BEFORE
    tl.store(block_best + row * num_blocks + block, tl.where(is_nan, float("nan"), best))
    tl.store(block_column + row * num_blocks + block, tl.where(is_nan, first, first - NAN_BEFORE))


@triton.jit
def _best_of_row(block_best, block_column, best, token, vocab_start, num_blocks, BLOCK: tl.constexpr):
    """One program a row: the best of its blocks; of equal ones the lowest token; ~token if it is NaN."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    exists = block < num_blocks
    score = tl.load(block_best + row * num_blocks + block, mask=exists, other=float("-inf"))
    column = tl.load(block_column + row * num_blocks + block, mask=exists, other=0x7FFFFFFF)
    highest = tl.max(score, axis=0)
    place = tl.where((score == highest) & exists, column + NAN_BEFORE, 0x7FFFFFFF)
    first = tl.min(tl.where(score == score, place, column), axis=0)
    is_nan = first < NAN_BEFORE
    tl.store(best + row, tl.where(is_nan, float("nan"), highest))
    found = tl.where(is_nan, first, first - NAN_BEFORE).to(tl.int64) + vocab_start
    tl.store(token + row, tl.where(is_nan, ~found, found))


def best_tokens(logits: Tensor, rows: SamplingRows, random: bool, vocab_start: int) -> tuple[Tensor, Tensor]:
    """See `Operations.best_tokens`."""
    assert logits.stride(1) == 1
    num_rows, size = logits.shape
    num_blocks = triton.cdiv(size, _VOCAB_BLOCK)
    block_best = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    block_column = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits.device)
    best = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    token = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return best, token
    _best_of_block[(num_rows, num_blocks)](
        logits,
        rows.temperature if random else best,
        rows.seed if random else token,
        rows.position if random else token,
        block_best,
        block_column,
        size,
        logits.stride(0),
        vocab_start,
        num_blocks,
        RANDOM=random,
        GREEDY_BELOW=GREEDY_BELOW,
        BLOCK=_VOCAB_BLOCK,
        num_warps=8,
    )
    _best_of_row[(num_rows,)](
        block_best,
        block_column,
        best,
        token,
        vocab_start,
        num_blocks,
        BLOCK=triton.next_power_of_2(num_blocks),
        num_warps=1,
    )
    return best, token
