"""`Operations` in torch: the definitions and the reference, and what CPU ranks run."""

from __future__ import annotations

from torch import Tensor

from tpworker.kernels.operands import Matrix, Routing
from tpworker.model.layer_ops import add_norm, gelu_mul, norm_rotate_store, places, silu_mul
from tpworker.model.linear import Linear as linear
from tpworker.model.logit_rules import adjust, count_tokens, take_masks
from tpworker.model.logprobs import logprob_parts
from tpworker.model.moe import choose, experts
from tpworker.model.ngram import look_up
from tpworker.model.sampling import best_tokens, sample_truncated
from tpworker.model.slot_ops import begin_decode, begin_mixed, finish_step

__all__ = [
    "add_norm",
    "adjust",
    "begin_decode",
    "begin_mixed",
    "best_tokens",
    "count_tokens",
    "experts",
    "finish_step",
    "gelu_mul",
    "linear",
    "logprob_parts",
    "look_up",
    "norm_rotate_store",
    "places",
    "ready_logits",
    "route",
    "sample_truncated",
    "silu_mul",
    "take_masks",
]


def route(x: Tensor, gate: Matrix, bias: Tensor | None, spec: Routing) -> tuple[Tensor, Tensor]:
    """See `Operations.route`."""
    return choose(gate(x.float()), bias, spec)


def ready_logits(logits: Tensor) -> Tensor:
    """In float32."""
    return logits.float()
