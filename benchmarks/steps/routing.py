"""Uniformly random routing: with dummy weights, a model's own router sends most tokens to a few experts.

Which experts a token goes to depends on the step, the layer and the token's row alone: each layer has a table
of random choices, and a step begins in it at another row. Everything is on the device and can be captured in
a graph; tables come from the layer's number, so that all ranks choose alike. The model's own router runs too,
and its weights are used: it costs what it costs. What is added is five kernels a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from tpworker.model.families import MoeSpec
from tpworker.model.moe import Moe, Router

_ROWS = 4096
"""Of a table; steps that are as many apart choose alike."""
_STRIDE = 2731
"""Rows from where a step begins to where the next one does; has no divisor in common with _ROWS."""


class UniformRouting:
    """Takes the place of the routers of a model's layers.

    Args:
        layers: the mixtures, in the order in which a forward calls them; their routers are replaced.
        step: int64 [1] on the device, another number in every step.
    """

    def __init__(self, layers: Iterable[Moe], step: Tensor) -> None:
        mixtures = list(layers)
        tables = torch.stack([_table(moe.spec, number) for number, moe in enumerate(mixtures)])
        self._step = step
        self._tables = tables.to(step.device)  # int32 [layers, _ROWS, k + S]
        self._ids = self._tables  # int32 [layers, T, k + S], from the first layer of a forward on
        for number, moe in enumerate(mixtures):
            moe.router = partial(self._route, number, moe.route)

    def _route(self, number: int, own: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        _, weights = own(x)
        if number == 0:
            rows = (torch.arange(len(x), device=x.device) + self._step * _STRIDE) % _ROWS
            self._ids = self._tables.index_select(1, rows)
        return self._ids[number], weights

    def touched(self, count: int) -> float:
        """Experts that `count` tokens of a step go to, shared ones included: the mean of layers and steps."""
        rows = [(torch.arange(count) + step * _STRIDE) % _ROWS for step in range(32)]
        return fmean(len(table[some].unique()) for table in self._tables.cpu() for some in rows)


def _table(spec: MoeSpec, number: int) -> Tensor:
    """int32 [_ROWS, k + S]: k different experts, any with the same chance, then the shared ones."""
    draw = torch.Generator().manual_seed(number)
    chosen = torch.rand(_ROWS, spec.num_experts, generator=draw).argsort(dim=-1)[:, : spec.experts_per_token]
    shared = torch.arange(spec.num_experts, spec.num_experts + spec.num_shared).expand(_ROWS, -1)
    return torch.cat((chosen, shared), dim=-1).to(torch.int32)
