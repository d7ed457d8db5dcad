"""Sums and norms that are left to the products around them, so that they need no kernel of their own.

    x += W a; y = V RMSNorm(x)        the first product adds to x as it stores, the second norms as it reads

What cannot be done so is done by `tensor()`, one kernel after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tpworker.model.linear import Linear


@dataclass(slots=True)
class Normed:
    """RMSNorm(x) * weight, not computed yet; x stays as it is until it is."""

    x: Tensor  # [T, D]
    weight: Tensor  # [D]
    eps: float
    scaled: Tensor | None = None  # [T, D], x * weight, rounded
    squares: Tensor | None = None  # float32 [n, T], each row's sum of squares in n parts; with `scaled`

    def tensor(self) -> Tensor:
        """[T, D]."""
        from tpworker.model import kernels

        return kernels.add_norm(self.x, None, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Product:
    """A product that is not computed yet."""

    linear: Linear
    x: Tensor  # [T, in]

    def tensor(self) -> Tensor:
        """[T, out]."""
        return self.linear(self.x)

    def add_to(self, residual: Tensor, weight: Tensor, eps: float) -> Normed | None:
        """Add it to residual [T, out], in place; None if a kernel each must do it, and nothing was done.

        Returns:
            The norm of the sum, with this weight.
        """
        return self.linear.add_to(residual, self.x, weight, eps)


def tensor_of(value: Tensor | Normed | Product) -> Tensor:
    """Computed, if it is not."""
    return value if isinstance(value, Tensor) else value.tensor()
