"""y = x Wᵀ + b in torch, with the weight packed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tpworker.kernels.operands import Fp8Weight, Gated, Normed
from tpworker.model import layer_ops
from tpworker.model.fp8 import dequantise

_PACK_ROWS = 64  # the number of input rows that a packed layout is chosen for; others run well in it too
_SHORT_ROW = 768  # inputs; for one row of more (1536, not 768) oneDNN sums in another order than for several


class Linear:
    """A weight that is ready to be multiplied with.

    On the CPU it is packed into oneDNN's blocked layout, once. With plain weights torch takes MKL for
    float32, which was 2 to 3 times slower for 4 to 64 rows (AMD EPYC, torch 2.13), and repacks bfloat16
    weights at every call, half the speed for one row. What is more, a row's result then does not depend on
    how many rows are computed with it, bit by bit, which MKL's does: a request's tokens cannot depend on what
    else is in the batch.

    Elsewhere, and in other dtypes, it is left as it is. See `operands.Matrix`.

    Args:
        weight: [out, in]; dropped after packing. In FP8 each product is with what it stands for.
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.fp8 = weight if isinstance(weight, Fp8Weight) else None
        plain = weight.values if isinstance(weight, Fp8Weight) else weight
        self.is_packed = can_pack(plain.device, plain.dtype)
        self._fewest_rows = 2 if plain.shape[1] > _SHORT_ROW else 1
        if self.is_packed:
            plain = torch.ops.mkldnn._reorder_linear_weight(plain, _PACK_ROWS)
        self.weight: Tensor = plain

    def __call__(self, x: Tensor | Normed | Gated) -> Tensor:
        """[T, in] to [T, out]."""
        if isinstance(x, Normed):
            x = layer_ops.norm(x.x, x.weight, x.eps)
        elif isinstance(x, Gated):
            x = layer_ops.silu_mul(x.x)
        if self.is_packed:
            return self._multiply_packed(x)
        return F.linear(x, self.weight if self.fp8 is None else dequantise(self.fp8), self.bias)

    def gated(self, x: Tensor | Normed) -> Tensor:
        """silu(gate) * up, [T, F], of a product [T, 2 F], gate then up."""
        return layer_ops.silu_mul(self(x))

    def add_to(self, residual: Tensor, x: Tensor | Gated, norm_weight: Tensor, eps: float) -> Normed | None:
        """See `Product.add_to`: here it takes a kernel each."""
        return None

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        yield from (self.weight,) if self.fp8 is None else self.fp8.tensors()
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
