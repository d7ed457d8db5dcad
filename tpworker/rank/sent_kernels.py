"""A product whose result goes to the other ranks as soon as it is there. Imports Triton: on CUDA only.

    product    writes each element of this rank's part of a sum into all ranks' inboxes, its own too
    receiver   awaits the parts of all ranks, adds them up, adds the residual and norms

Beside `symmetric_kernels.reduce_add_norm`, which sends what the product has stored when that has ended, this
takes out the end of one kernel, the start of another and the way through memory. For one row; see there for
what an inbox is, and why two turns of it are enough.

The receiver starts while the product runs (`tpworker.model.pdl`), when all programs of the product have got
past their wait; so everything before the product has ended, and the receiver may read, before its own wait,
what was written by then. Data of the product it takes from the inboxes alone.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.model import pdl
from tpworker.model.pdl import start_next, wait
from tpworker.model.skinny_kernel import OneRow
from tpworker.rank.symmetric_kernels import WIDTH, Inboxes, _await_row


@triton.jit
def _multiply_send(
    x, weight, bias, inboxes, uses,
    RANK: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr, HAS_BIAS: tl.constexpr, OUTPUTS: tl.constexpr,
    STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program OUTPUTS rows of the weight; adds up like `skinny_kernel._one_row`, bit by bit."""
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    exists = output < SIZE_OUT
    column = tl.arange(0, STEP)
    source = weight + output[:, None] * SIZE_IN + column[None, :]
    part = tl.load(source, mask=exists[:, None] & (column < SIZE_IN)[None, :], other=0.0)
    wait(PDL)
    start_next(PDL)  # not before the wait: see above
    use = tl.load(uses)
    value = tl.load(x + column, mask=column < SIZE_IN, other=0.0).to(tl.float32)
    total = part.to(tl.float32) * value[None, :]
    for start in tl.static_range(STEP, SIZE_IN, STEP):
        inside = start + column < SIZE_IN
        part = tl.load(source + start, mask=exists[:, None] & inside[None, :], other=0.0)
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        total += part.to(tl.float32) * value[None, :]
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)
    result = result.to(x.dtype.element_ty)
    result = tl.where(result == 0.0, tl.zeros_like(result), result)  # -0.0 is not sent
    entry = ((use % 2) * (ROWS * SIZE) + RANK) * WIDTH + output
    for step in tl.static_range(1, SIZE + 1):  # itself last
        there = inboxes[(RANK + step) % SIZE].to(tl.pointer_type(x.dtype.element_ty))
        tl.store(tl.multiple_of(there, 16) + entry, result, mask=exists)


@triton.jit
def _receive_add_norm(
    x, weight, out, inboxes, uses, eps,
    RANK: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program, one row: x += the sum of what has come, out = RMSNorm(x) * weight.

    The sum is made and rounded as `symmetric_kernels._reduce_add_norm` does it.
    """
    start_next(PDL)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    # Not through L1, which may hold what was there before.
    use = tl.load(uses, cache_modifier=".cg")
    value = tl.load(x + column, mask=inside, other=0.0, cache_modifier=".cg")
    inbox = tl.multiple_of(inboxes[RANK].to(tl.pointer_type(x.dtype.element_ty)), 16)
    source = tl.arange(0, SIZE)[:, None]
    entry = inbox + ((use % 2) * (ROWS * SIZE) + source) * WIDTH + column[None, :]
    expected = (source < SIZE) & inside[None, :]
    total = tl.sum(_await_row(entry, expected).to(tl.float32), axis=0).to(x.dtype.element_ty)
    value = (value.to(tl.float32) + total.to(tl.float32)).to(x.dtype.element_ty)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / COLUMNS + eps)
    wait(PDL)
    tl.store(x + column, value, mask=inside)
    tl.store(out + column, (wide * scale).to(out.dtype.element_ty), mask=inside)
    nothing = tl.full([SIZE, BLOCK], -32768, tl.int16).to(x.dtype.element_ty, bitcast=True)
    tl.store(entry, nothing, mask=expected)
    tl.store(uses, use + 1)


def multiply_add_norm(
    x: Tensor,
    source: Tensor,
    linear: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    eps: float,
    rule: OneRow,
    inboxes: Inboxes,
) -> Tensor:
    """x [1, D] += sum over ranks of source [1, in] times linear [D, in] transposed, plus bias [D]; in place.

    Args:
        weight: [D], of the norm.
        rule: how the product is cut.
        inboxes: `takes(x)`.

    Returns:
        RMSNorm(x), [1, D].
    """
    size_out, size_in = linear.shape
    assert x.shape == (1, size_out)
    assert source.shape == (1, size_in)
    assert all(tensor.is_contiguous() for tensor in (x, source, linear))
    group = {"RANK": inboxes.rank, "SIZE": inboxes.size, "ROWS": len(inboxes.row_uses), "WIDTH": WIDTH}
    _multiply_send[(triton.cdiv(size_out, rule.outputs),)](
        source,
        linear,
        source if bias is None else bias,
        inboxes.rows,
        inboxes.row_uses,
        **group,
        SIZE_IN=size_in,
        SIZE_OUT=size_out,
        HAS_BIAS=bias is not None,
        OUTPUTS=rule.outputs,
        STEP=min(rule.step, triton.next_power_of_2(size_in)),
        num_warps=rule.warps,
        **pdl.options(),
    )
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size_out)
    _receive_add_norm[(1,)](
        x,
        weight,
        out,
        inboxes.rows,
        inboxes.row_uses,
        eps,
        **group,
        COLUMNS=size_out,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),
        **pdl.options(),
    )
    return out
