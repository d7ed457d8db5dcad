"""Mixture of experts: which experts a token goes to, and what they make of it.

The functions here are the definitions (see `Operations`). E routed experts and S shared ones are one stack,
the shared ones last: every token goes to them with weight 1, so that nothing else tells them apart. D is the
hidden size, F this rank's part of an expert's width, k the number of routed experts of a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tpworker.kernels.operands import Fp8Weight, Matrix, Normed, Routing, Stack
from tpworker.kernels.operations import Operations
from tpworker.model import layer_ops
from tpworker.model.families import MoeSpec
from tpworker.model.fp8 import dequantise

Router = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From [T, D] to ids int32 [T, k + S] and weights float32 [T, k + S], shared experts included."""


class Moe:
    """The mixture of one layer.

    Attributes:
        router: chooses the experts; may be replaced, e.g. by one that chooses at random.

    Args:
        spec: how the router chooses.
        gate: [E, D], the router's weight. In float32 on the CPU.
        bias: float32 [E], the router's correction bias; None: it has none.
        gate_up: [E + S, 2 F, D], gate rows and then up rows; or, to be packed, a `Linear` for each expert.
        down: [E + S, D, F]; or a `Linear` for each expert. Both may be in FP8.
        operations: of the device.
    """

    def __init__(
        self,
        spec: MoeSpec,
        gate: Matrix,
        bias: Tensor | None,
        gate_up: Stack,
        down: Stack,
        operations: Operations,
    ) -> None:
        self.spec = spec
        self.gate = gate
        self.bias = bias
        self.gate_up = gate_up
        self.down = down
        self.router: Router = self.route
        self._operations = operations

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """From [T, D] to this rank's summand of the output, [T, D]."""
        if isinstance(x, Normed):
            x = self._operations.add_norm(x.x, None, x.weight, x.eps)
        ids, weights = self.router(x)
        return self._operations.experts(x, ids, weights, self.gate_up, self.down)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own router."""
        return self._operations.route(x, self.gate, self.bias, self.spec)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        yield from self.gate.tensors()
        if self.bias is not None:
            yield self.bias
        for part in (self.gate_up, self.down):
            if isinstance(part, Tensor):
                yield part
            elif isinstance(part, Fp8Weight):
                yield from part.tensors()
            else:
                for linear in part:
                    yield from linear.tensors()


def route(x: Tensor, gate: Tensor, bias: Tensor | None, spec: Routing) -> tuple[Tensor, Tensor]:
    """`Operations.route` of a plain weight: gate [E, D]."""
    return choose(F.linear(x.float(), gate.float()), bias, spec)


def choose(logits: Tensor, bias: Tensor | None, spec: Routing) -> tuple[Tensor, Tensor]:
    """The second half of `route`: from float32 logits [T, E]."""
    scores = logits.softmax(dim=-1) if spec.score == "softmax" else layer_ops.sigmoid(logits)
    ranked = scores if bias is None else scores + bias
    if spec.num_groups > 1:
        grouped = ranked.view(len(ranked), spec.num_groups, -1)  # [T, groups, E / groups]
        of_group = grouped.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(of_group, dtype=torch.bool)
        kept.scatter_(-1, _best(of_group, spec.top_groups), True)
        ranked = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    chosen = _best(ranked, spec.experts_per_token)  # [T, k]
    weights = scores.gather(-1, chosen)
    if spec.normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_(min=spec.norm_min)
    weights = weights * spec.scale
    shared = torch.arange(spec.num_experts, spec.num_experts + spec.num_shared, device=logits.device)
    ids = torch.cat((chosen, shared.expand(len(logits), -1)), dim=-1).to(torch.int32)
    return ids, torch.cat((weights, weights.new_ones(len(logits), spec.num_shared)), dim=-1)


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest along the last dimension, best first; of equal ones the lower index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Stack,
    down: Stack,
) -> Tensor:
    """See `Operations.experts`."""
    return _compute(x, ids, weights, _products(gate_up), _products(down))


def _products(stack: Stack) -> Sequence[Callable[[Tensor], Tensor]]:
    if isinstance(stack, Fp8Weight):
        stack = dequantise(stack)
    if isinstance(stack, Tensor):
        return [functools.partial(F.linear, weight=weight) for weight in stack]
    return stack


def _compute(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Sequence[Callable[[Tensor], Tensor]],
    down: Sequence[Callable[[Tensor], Tensor]],
) -> Tensor:
    """`experts`, expert by expert, with a product each. Looks at values on the host.

    A token's summands are added up in the order of its choices, each product and each sum rounded by itself,
    so that its bits depend neither on the other tokens nor on the order of the loop.
    """
    num_choices = ids.shape[1]
    flat_ids = ids.flatten()
    order = flat_ids.argsort(stable=True)  # choices, by expert
    counts = torch.bincount(flat_ids, minlength=len(gate_up)).tolist()
    outputs = x.new_empty(len(flat_ids), x.shape[1])  # one row a choice
    start = 0
    for expert, count in enumerate(counts):
        if count:
            choices = order[start : start + count]
            rows = x.index_select(0, choices // num_choices)
            outputs.index_copy_(0, choices, down[expert](layer_ops.silu_mul(gate_up[expert](rows))))
            start += count
    summands = outputs.view(-1, num_choices, x.shape[1]).float() * weights[..., None]
    total = summands[:, 0].contiguous()
    for choice in range(1, num_choices):
        total += summands[:, choice]
    return total.to(x.dtype)
