"""y = x Wᵀ + b, with the weight kept in the layout that is fastest where it is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_PACK_ROWS = 64  # the number of input rows that a packed layout is chosen for; others run well in it too
_SHORT_ROW = 768  # inputs; for one row of more (1536, not 768) oneDNN sums in another order than for several

SINGLE_ROW_BYTES = 128 << 20
"""On CUDA, the product of one row with a weight up to this size goes to a kernel of our own: it took
Qwen3-0.6B's step from 1.37 to 1.04 ms. For the larger ones of Qwen3-8B the library is as fast. (One H200.)"""


class Linear:
    """A weight that is ready to be multiplied with.

    On the CPU it is packed into oneDNN's blocked layout, once. With plain weights torch takes MKL for
    float32, which was 2 to 3 times slower for 4 to 64 rows (AMD EPYC, torch 2.13), and repacks bfloat16
    weights at every call, half the speed for one row. What is more, a row's result then does not depend on
    how many rows are computed with it, bit by bit, which MKL's does: a request's tokens cannot depend on what
    else is in the batch.

    Args:
        weight: [out, in]; dropped after packing.
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.is_packed = can_pack(weight.device, weight.dtype)
        self._doubles_a_row = self.is_packed and weight.shape[1] > _SHORT_ROW
        if self.is_packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] to [T, out]."""
        if x.is_cuda and x.shape[0] == 1 and self.weight.nbytes <= SINGLE_ROW_BYTES:
            from tpworker.model import skinny_kernel

            return skinny_kernel.multiply_one(x, self.weight, self.bias)
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        if self._doubles_a_row and x.shape[0] == 1:
            return self._multiply_packed(x.repeat(2, 1))[:1]
        return self._multiply_packed(x)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        yield self.weight
        if self.bias is not None:
            yield self.bias

    def _multiply_packed(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `Linear` packs weights there: a CPU with oneDNN that computes in this dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.float32:
        return True
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and bool(supported[dtype]())
