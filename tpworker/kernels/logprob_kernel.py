"""The greatest logits and what a softmax needs, without sorting the vocabulary. Imports Triton: on CUDA only.

What `logprobs.logprob_parts` defines, in two kernels. The vocabulary is seen as groups of 64 logits:

    1. a program a row and 64 groups: its greatest logit, its sum of exp, each group's greatest logit
    2. a program a row: the best groups, one after the other; then of their logits the best, likewise

As many groups as logits are wanted are enough: each of them has a logit that comes before all those of the
groups that are left out, also where logits are equal, since the first of equal groups has the lower ids.
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
from tpworker.kernels.operands import MOST_LOGPROBS
from tpworker.kernels.pdl import start_next, wait
from tpworker.kernels.truncation_kernel import _key, _value

_GROUP = 64
_MAX_GROUPS = 4096  # a program holds the greatest logits of all groups; a larger vocabulary has larger groups
_CHUNK = 4096  # logits that a program reads at a time
_NONE = tl.constexpr(-(1 << 63))  # below every rank
_LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _rank(value, index):
    """int64, higher for a greater float32; of equal ones for a lower index, which is not negative."""
    return (_key(value).to(tl.int64) << 32) | (index ^ _LAST).to(tl.int64)


@triton.jit
def _index(rank):
    return (rank & _LAST).to(tl.int32) ^ _LAST


@triton.jit
def _base(greatest):
    """What to take from exponents, such that the exponential of what is out of question is 0."""
    return tl.where(greatest == float("-inf"), 0.0, greatest)


@triton.jit
def _add_up_blocks(
    logits, group_greatest, block_greatest, block_total, size, stride, num_groups, num_blocks,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row and ROWS of its groups."""
    start_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    group = block * ROWS + tl.arange(0, ROWS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(logits + row * stride + column, mask=column < size, other=float("-inf")).to(tl.float32)
    greatest = tl.max(value, axis=1)  # NaN comes in or not: it is in the sum
    tl.store(group_greatest + row * num_groups + group, greatest, mask=group < num_groups)
    highest = tl.max(greatest, axis=0)
    tl.store(block_greatest + row * num_blocks + block, highest)
    tl.store(block_total + row * num_blocks + block, tl.sum(tl.exp(value - _base(highest))))


@triton.jit
def _best(ranks, MOST: tl.constexpr, SLOTS: tl.constexpr):
    """The MOST highest ranks, the highest first, int64 [SLOTS]; _NONE where there are no more.

    Args:
        ranks: int64 [n], all different but for _NONE.
    """
    place = tl.arange(0, SLOTS)
    best = tl.full([SLOTS], _NONE, tl.int64)
    for i in range(MOST):
        highest = tl.max(ranks, axis=0)
        best = tl.where(place == i, highest, best)
        ranks = tl.where(ranks == highest, _NONE, ranks)
    return best


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def _tell_rows(
    logits, tokens, group_greatest, block_greatest, block_total, out, size, stride, vocab_start, num_groups,
    num_blocks, MOST: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    start_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    out += row * (3 + 2 * MOST)

    block = row * num_blocks + tl.arange(0, BLOCKS)
    exists = tl.arange(0, BLOCKS) < num_blocks
    highest = tl.load(block_greatest + block, mask=exists, other=float("-inf"))
    totals = tl.load(block_total + block, mask=exists, other=0.0)
    greatest = tl.max(highest, axis=0)
    token = tl.load(tokens + row)
    column = (token ^ (token >> 63)) - vocab_start
    is_here = (column >= 0) & (column < size)
    own = tl.load(logits + column, mask=is_here, other=float("-inf")).to(tl.float32)
    tl.store(out, greatest)
    tl.store(out + 1, tl.sum(totals * tl.exp(highest - _base(greatest)), axis=0))
    tl.store(out + 2, own)

    group = tl.arange(0, GROUPS)
    value = tl.load(group_greatest + row * num_groups + group, mask=group < num_groups, other=float("-inf"))
    ranks = _best(tl.where(group < num_groups, _rank(value, group), _NONE), MOST, SLOTS)
    listed = tl.where(ranks > _NONE, _index(ranks), num_groups)
    columns = tl.reshape(listed[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [SLOTS * GROUP])
    value = tl.load(logits + columns, mask=columns < size, other=float("-inf")).to(tl.float32)
    ranks = _best(tl.where(columns < size, _rank(value, columns), _NONE), MOST, SLOTS)
    value = tl.where(ranks > _NONE, _value((ranks >> 32).to(tl.int32)), float("-inf"))
    ids = tl.where(value > float("-inf"), (_index(ranks) + vocab_start).to(tl.float32), -1.0)
    place = tl.arange(0, SLOTS)
    tl.store(out + 3 + place, value, mask=place < MOST)
    tl.store(out + 3 + MOST + place, ids, mask=place < MOST)


def logprob_parts(logits: Tensor, tokens: Tensor, vocab_start: int) -> Tensor:
    """See `Operations.logprob_parts`. The sum of a row without a logit above -inf is 0."""
    num_rows, size = logits.shape
    assert logits.stride(1) == 1

    def empty(width: int) -> Tensor:
        return torch.empty(num_rows, width, dtype=torch.float32, device=logits.device)

    out = empty(3 + 2 * MOST_LOGPROBS)
    if num_rows == 0:
        return out
    group = max(_GROUP, triton.next_power_of_2(triton.cdiv(size, _MAX_GROUPS)))
    num_groups, chunk = triton.cdiv(size, group), _CHUNK // group
    num_blocks = triton.cdiv(num_groups, chunk)
    sums = (empty(num_groups), empty(num_blocks), empty(num_blocks))
    _add_up_blocks[(num_rows, num_blocks)](
        logits,
        *sums,
        size,
        logits.stride(0),
        num_groups,
        num_blocks,
        GROUP=group,
        ROWS=chunk,
        num_warps=8,
        **pdl.options(),
    )
    _tell_rows[(num_rows,)](
        logits,
        tokens,
        *sums,
        out,
        size,
        logits.stride(0),
        vocab_start,
        num_groups,
        num_blocks,
        MOST=MOST_LOGPROBS,
        SLOTS=triton.next_power_of_2(MOST_LOGPROBS),
        GROUP=group,
        GROUPS=triton.next_power_of_2(num_groups),
        BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=8,
        **pdl.options(),
    )
    return out
