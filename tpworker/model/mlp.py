"""The dense MLP of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from tpworker.kernels.operands import Matrix, Normed, Product


@dataclass(frozen=True, slots=True)
class Mlp:
    """Gated MLP (Shazeer, arXiv 2002.05202). F: this rank's part of its width."""

    gate_up: Matrix  # [2 F, D]: gate, then up
    down: Matrix  # [D, F]
    gating: Callable[[Tensor], Tensor] | None = None
    """From [T, 2 F], gate then up, to [T, F]; None: silu(gate) * up, which products do by themselves."""

    def __call__(self, x: Tensor | Normed) -> Product:
        """From [T, D] to this rank's summand of the output, [T, D]."""
        gated = self.gate_up.gated(x) if self.gating is None else self.gating(self.gate_up(x))
        return Product(self.down, gated)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        yield from self.gate_up.tensors()
        yield from self.down.tensors()
