"""`Operations` of CUDA devices: kernels of our own. Imports Triton: import it on CUDA only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tpworker.kernels import moe_kernels, moe_routing
from tpworker.kernels.cuda_linear import linear
from tpworker.kernels.logit_kernels import adjust, count_tokens
from tpworker.kernels.logprob_kernel import logprob_parts
from tpworker.kernels.mask_kernel import take_masks
from tpworker.kernels.ngram_kernel import look_up
from tpworker.kernels.operands import Fp8Weight, Matrix, Routing, Stack
from tpworker.kernels.sampling_kernel import best_tokens
from tpworker.kernels.slot_kernels import begin_decode, begin_mixed, finish_step
from tpworker.kernels.triton_kernels import add_norm, norm_rotate_store, places, silu_mul
from tpworker.kernels.truncation_kernel import sample_truncated

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


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See `Operations.gelu_mul`: two kernels of torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def route(x: Tensor, gate: Matrix, bias: Tensor | None, spec: Routing) -> tuple[Tensor, Tensor]:
    """See `Operations.route`."""
    return moe_routing.route(x, gate.weight, bias, spec)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Stack,
    down: Stack,
) -> Tensor:
    """See `Operations.experts`; here weights are not packed, and all experts are one tensor."""
    assert isinstance(gate_up, Tensor | Fp8Weight)
    assert isinstance(down, Tensor | Fp8Weight)
    return moe_kernels.experts(x, ids, weights, gate_up, down)


def ready_logits(logits: Tensor) -> Tensor:
    """As they are: kernels widen them as they read, and a copy would cost more than sampling itself."""
    return logits
