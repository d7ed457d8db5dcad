"""The product of a weight with a single row. Imports Triton: import it on CUDA only.

With one row a product is the reading of its weight, and for the small matrices of small models the library's
tiles leave much of the GPU idle (Qwen3-0.6B: 5 to 13 µs where the bytes need 1 to 3). Here each program reads
whole rows of the weight, few enough that there are programs for every processor. For several rows, a kernel
like this one with matrix units was not faster than the library.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_OUTPUTS = 2  # rows of the weight that a program reads
_WARPS = 4


def _step(size_in: int) -> int:
    """Elements of each that a program reads at a time; in long rows shorter steps were faster (H200)."""
    step: int = min(2048 if size_in <= 8192 else 1024, triton.next_power_of_2(size_in))
    return step


@triton.jit
def _one_row(
    x, weight, bias, out, SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program OUTPUTS rows of the weight; sums in float32."""
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    exists = output < SIZE_OUT
    column = tl.arange(0, STEP)
    total = tl.zeros([OUTPUTS, STEP], tl.float32)
    for start in tl.static_range(0, SIZE_IN, STEP):
        inside = start + column < SIZE_IN
        source = weight + output[:, None] * SIZE_IN + start + column[None, :]
        part = tl.load(source, mask=exists[:, None] & inside[None, :], other=0.0)
        value = tl.load(x + start + column, mask=inside, other=0.0)
        total += part.to(tl.float32) * value.to(tl.float32)[None, :]
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + output, result.to(out.dtype.element_ty), mask=exists)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [1, in] times weight [out, in] transposed, plus bias [out]: [1, out]."""
    assert len(x) == 1
    assert x.is_contiguous()
    assert weight.is_contiguous()
    size_out, size_in = weight.shape
    out = torch.empty(1, size_out, dtype=x.dtype, device=x.device)
    _one_row[(triton.cdiv(size_out, _OUTPUTS),)](
        x,
        weight,
        x if bias is None else bias,
        out,
        SIZE_IN=size_in,
        SIZE_OUT=size_out,
        HAS_BIAS=bias is not None,
        OUTPUTS=_OUTPUTS,
        STEP=_step(size_in),
        num_warps=_WARPS,
    )
    return out
