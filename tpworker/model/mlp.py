"""The dense MLP of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from tpworker.kernels.operands import Matrix, Normed, Product


@dataclass(frozen=True, slots=True)
class Mlp:
    """Gated SiLU MLP (Shazeer, arXiv 2002.05202). F: this rank's part of its width."""

    gate_up: Matrix  # [2 F, D]: gate, then up
    down: Matrix  # [D, F]

    def __call__(self, x: Tensor | Normed) -> Product:
        """From [T, D] to this rank's summand of the output, [T, D]."""
        return Product(self.down, self.gate_up.gated(x))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        yield from self.gate_up.tensors()
        yield from self.down.tensors()
