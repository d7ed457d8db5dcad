"""y = x Wᵀ + b on CUDA with a weight in FP8. Imports Triton.

up to 64 rows   our kernel reads FP8 and multiplies in 16 bits: the product with what the weight stands for
more            the library's FP8 product, on Hopper: each row is brought to FP8, by its greatest element
                or, where the weight's scales are of blocks, by that of each 128 inputs
otherwise       the weight is brought to 16 bits, each time
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tpworker.kernels import few_rows, fp8_kernels, skinny_kernel
from tpworker.kernels.fp8_kernels import GROUP
from tpworker.kernels.operands import Fp8Weight, Gated, Normed
from tpworker.kernels.triton_kernels import add_norm, computed

_FEW_ROWS, _FEW_OUTPUTS = 128, 4096
"""Up to so many, the library shares the inputs of an output among programs where they have scales of groups,
and takes 9 and 21 µs instead of 14 and 33, with 4096 outputs of 4096 and 12288 inputs."""


class Fp8Linear:
    """A weight in FP8. See `operands.Matrix`.

    Args:
        weight: values [out, in].
        bias: [out] or None.
    """

    def __init__(self, weight: Fp8Weight, bias: Tensor | None = None) -> None:
        few_rows.counters(weight.values.device)
        self.weight = weight.values
        self.bias = bias
        self._fp8 = weight
        self._right_scales = _right_scales(weight)
        self._right_scales_of_groups = _right_scales_of_groups(weight)

    def __call__(self, x: Tensor | Normed | Gated) -> Tensor:
        """[T, in] to [T, out]."""
        rule = self._rule(x, gated=False)
        if rule is None:
            return self._multiply_many(x)
        return skinny_kernel.multiply(computed(x), self._fp8, self.bias, rule)

    def gated(self, x: Tensor | Normed) -> Tensor | Gated:
        """silu(gate) * up, [T, F], of a product [T, 2 F], gate then up: of many rows it is left for the
        product that brings it to FP8."""
        rule = self._rule(x, gated=True)
        if rule is None:
            return Gated(self._multiply_many(x))
        return skinny_kernel.multiply(x, self._fp8, self.bias, rule, gated=True)

    def add_to(self, residual: Tensor, x: Tensor | Gated, norm_weight: Tensor, eps: float) -> Normed | None:
        """See `Product.add_to`. The norm of many rows is left for the product that brings it to FP8."""
        target = Normed(residual, norm_weight, eps)
        rule = self._rule(x, gated=False)
        if rule is None:
            residual += self._multiply_many(x)
            return target
        x = computed(x)
        if x.dtype == torch.float16:
            return None  # the residual times the norm's weight, not yet divided, is beyond float16
        skinny_kernel.multiply_add(x, self._fp8, self.bias, rule, target)
        return target

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        yield self._fp8.values
        yield self._fp8.scales
        if self.bias is not None:
            yield self.bias

    def _rule(
        self, x: Tensor | Normed | Gated, gated: bool
    ) -> skinny_kernel.OneRow | few_rows.FewRows | None:
        return skinny_kernel.choose(len(x if isinstance(x, Tensor) else x.x), self._fp8, gated)

    def _multiply_many(self, x: Tensor | Normed | Gated) -> Tensor:
        source = x if isinstance(x, Tensor) else x.x
        num_rows = len(source)
        if self._right_scales is None or source.dtype != torch.bfloat16 or num_rows <= few_rows.MOST_ROWS:
            if isinstance(x, Normed):
                x = add_norm(x.x, None, x.weight, x.eps)
            return F.linear(computed(x), fp8_kernels.dequantise(self._fp8, source.dtype), self.bias)
        right_scales = self._right_scales
        if num_rows <= _FEW_ROWS and self._right_scales_of_groups is not None:
            right_scales = self._right_scales_of_groups
        values, scales = fp8_kernels.quantise(x, by_group=len(right_scales) > 1)
        y = torch._scaled_mm(values, self.weight.t(), scales, right_scales, out_dtype=source.dtype)
        y = y[:num_rows]
        return y if self.bias is None else y.add_(self.bias)


def _right_scales(weight: Fp8Weight) -> Tensor | None:
    """A weight's scales as the library's product wants them; None: it has none for such a weight.

    Returns:
        float32 [1, out]: of output channels; or of 128 inputs each, [in / 128, out / 128] or, where blocks
        have fewer rows, [in / 128, out].
    """
    size_out, size_in = weight.values.shape
    (rows, columns), scales = weight.block, weight.scales
    if not _has_product(weight.values.device) or size_out % 16 or size_in % 16:
        return None
    if columns >= size_in:
        return scales.repeat_interleave(rows, dim=0)[:size_out].view(1, size_out)
    if columns != GROUP or size_in % GROUP:
        return None
    if (
        rows == GROUP and size_out % GROUP == 0 and size_in // GROUP % 4 == 0
    ):  # a row of them: 16 bytes, or more
        return scales.t()
    return _of_groups(weight)


def _right_scales_of_groups(weight: Fp8Weight) -> Tensor | None:
    """The same where `_FEW_ROWS` have another product, which takes a scale for each output and 128 inputs."""
    size_out, size_in = weight.values.shape
    if size_out > _FEW_OUTPUTS or size_in % GROUP or weight.block[1] % GROUP:
        return None
    return None if _right_scales(weight) is None else _of_groups(weight)


def _of_groups(weight: Fp8Weight) -> Tensor:
    """The scale of each output and GROUP inputs, [in / GROUP, out]."""
    size_out, size_in = weight.values.shape
    of_rows = weight.scales.repeat_interleave(weight.block[0], dim=0)[:size_out]
    return (
        of_rows.repeat_interleave(max(1, weight.block[1] // GROUP), dim=1)[:, : size_in // GROUP]
        .t()
        .contiguous()
    )


@cache
def _has_product(device: torch.device) -> bool:
    """Whether torch has products in FP8, with scales of both kinds, for this GPU: for Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
