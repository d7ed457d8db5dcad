"""y = x Wᵀ + b, with the weight kept in the layout that is fastest where it is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tpworker.kernels import few_rows
from tpworker.kernels.operands import Normed
from tpworker.model import layer_ops

_PACK_ROWS = 64  # the number of input rows that a packed layout is chosen for; others run well in it too
_SHORT_ROW = 768  # inputs; for one row of more (1536, not 768) oneDNN sums in another order than for several


class Linear:
    """A weight that is ready to be multiplied with.

    On the CPU it is packed into oneDNN's blocked layout, once. With plain weights torch takes MKL for
    float32, which was 2 to 3 times slower for 4 to 64 rows (AMD EPYC, torch 2.13), and repacks bfloat16
    weights at every call, half the speed for one row. What is more, a row's result then does not depend on
    how many rows are computed with it, bit by bit, which MKL's does: a request's tokens cannot depend on what
    else is in the batch.

    On CUDA it is left as it is, and few rows are multiplied by kernels of our own where they are faster than
    the library's: one row on any GPU, up to 64 on Hopper.

    Args:
        weight: [out, in]; dropped after packing.
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.is_packed = can_pack(weight.device, weight.dtype)
        self._fewest_rows = 2 if weight.shape[1] > _SHORT_ROW else 1
        if self.is_packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        elif weight.is_cuda:
            few_rows.counters(weight.device)
        self.weight = weight

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[T, in] to [T, out]."""
        if self.weight.is_cuda:
            return self._multiply_on_cuda(x, gated=False)
        x = layer_ops.tensor_of(x)
        return self._multiply_packed(x) if self.is_packed else F.linear(x, self.weight, self.bias)

    def gated(self, x: Tensor | Normed) -> Tensor:
        """silu(gate) * up, [T, F], of a product [T, 2 F], gate then up."""
        if self.weight.is_cuda:
            return self._multiply_on_cuda(x, gated=True)
        return layer_ops.silu_mul(self(x))

    def add_to(self, residual: Tensor, x: Tensor, norm_weight: Tensor, eps: float) -> Normed | None:
        """See `Product.add_to`."""
        if not self.weight.is_cuda or x.dtype == torch.float16:
            return None  # the residual times the norm's weight, not yet divided, is beyond float16
        from tpworker.kernels import skinny_kernel

        rule = skinny_kernel.choose(len(x), self.weight, gated=False)
        if rule is None:
            return None
        target = Normed(residual, norm_weight, eps)
        skinny_kernel.multiply_add(x, self.weight, self.bias, rule, target)
        return target

    def _multiply_on_cuda(self, x: Tensor | Normed, gated: bool) -> Tensor:
        from tpworker.kernels import skinny_kernel

        num_rows = len(x if isinstance(x, Tensor) else x.x)
        rule = skinny_kernel.choose(num_rows, self.weight, gated)
        if rule is not None:
            return skinny_kernel.multiply(x, self.weight, self.bias, rule, gated)
        y = F.linear(layer_ops.tensor_of(x), self.weight, self.bias)
        return layer_ops.silu_mul(y) if gated else y

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        yield self.weight
        if self.bias is not None:
            yield self.bias

    def _multiply_packed(self, x: Tensor) -> Tensor:
        count = len(x)
        padded = max(padded_rows(count), self._fewest_rows)
        if padded > count:
            x = F.pad(x, (0, 0, 0, padded - count))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y[:count]


def padded_rows(count: int) -> int:
    """The number of rows that a packed product has for `count` of them: four between powers of two.

    oneDNN compiles and keeps a kernel with its buffers, a MB or more, for every number of rows and shape of
    weights. Beyond a thousand it makes them again and again, and memory grows without end: to 4 GB with the
    default model's products. These are 32 sizes up to 512 rows; on average a tenth of them is padding.
    """
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


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
