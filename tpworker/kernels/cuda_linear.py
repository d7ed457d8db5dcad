"""y = x Wᵀ + b on CUDA: kernels of our own for few rows, the library for more. Imports Triton."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tpworker.kernels import few_rows, skinny_kernel
from tpworker.kernels.fp8_linear import Fp8Linear
from tpworker.kernels.operands import Fp8Weight, Gated, Matrix, Normed
from tpworker.kernels.triton_kernels import add_norm, computed, silu_mul


def linear(weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Matrix:
    """See `Operations.linear`."""
    return Fp8Linear(weight, bias) if isinstance(weight, Fp8Weight) else CudaLinear(weight, bias)


class CudaLinear:
    """A weight as it is. Few rows are multiplied by kernels of our own where they are faster than the
    library's: one row on any GPU, up to 64 on Hopper. See `operands.Matrix`.

    Args:
        weight: [out, in].
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        few_rows.counters(weight.device)
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor | Normed | Gated) -> Tensor:
        """[T, in] to [T, out]."""
        return self._multiply(computed(x), gated=False)

    def gated(self, x: Tensor | Normed) -> Tensor:
        """silu(gate) * up, [T, F], of a product [T, 2 F], gate then up."""
        return self._multiply(x, gated=True)

    def add_to(self, residual: Tensor, x: Tensor | Gated, norm_weight: Tensor, eps: float) -> Normed | None:
        """See `Product.add_to`."""
        rows = x.x if isinstance(x, Gated) else x
        if rows.dtype == torch.float16:
            return None  # the residual times the norm's weight, not yet divided, is beyond float16
        rule = skinny_kernel.choose(len(rows), self.weight, gated=False)
        if rule is None:
            return None
        x, target = computed(x), Normed(residual, norm_weight, eps)
        skinny_kernel.multiply_add(x, self.weight, self.bias, rule, target)
        return target

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        yield self.weight
        if self.bias is not None:
            yield self.bias

    def _multiply(self, x: Tensor | Normed, gated: bool) -> Tensor:
        num_rows = len(x if isinstance(x, Tensor) else x.x)
        rule = skinny_kernel.choose(num_rows, self.weight, gated)
        if rule is not None:
            return skinny_kernel.multiply(x, self.weight, self.bias, rule, gated)
        if isinstance(x, Normed):
            x = add_norm(x.x, None, x.weight, x.eps)
        y = F.linear(x, self.weight, self.bias)
        return silu_mul(y) if gated else y
