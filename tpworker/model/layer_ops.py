"""What a layer does between its matrix products, in torch: the definitions of `Operations`.

On a GPU these cost their launches and little else, and there are dozens of kernels a layer in plain torch; so
each of these functions is one kernel there:

    add_norm            x += delta; RMSNorm(x)                           twice a layer
    norm_rotate_store   norm of query and key heads, rotation, KV write  once a layer
    silu_mul            silu(gate) * up                                  once a layer
    gelu_mul            gelu(gate) * up, in models that have it so       once a layer
    places              rotary angles and cache rows of the tokens       once a step
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tpworker.kernels.operands import Places
from tpworker.model.kv_cache import store


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `Operations.add_norm`."""
    if delta is not None:
        x += delta
    return norm(x, weight, eps)


def places(
    positions: Tensor,
    sequence_of: Tensor,
    block_tables: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    block_size: int,
) -> Places:
    """See `Operations.places`."""
    cos = cos_table.index_select(0, positions)[:, None]
    sin = sin_table.index_select(0, positions)[:, None]
    columns = torch.div(positions, block_size, rounding_mode="floor")
    blocks = block_tables[sequence_of, columns].to(torch.int64)
    return Places(cos, sin, blocks * block_size + positions % block_size)


def norm_rotate_store(
    heads: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    places: Places,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """See `Operations.norm_rotate_store`."""
    num_kv_heads = keys.shape[2]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    num_rotated = num_heads + num_kv_heads
    rotated = heads[:, :num_rotated]
    if norms is not None:
        query = norm(heads[:, :num_heads], norms[0], eps)
        key = norm(heads[:, num_heads:num_rotated], norms[1], eps)
        rotated = torch.cat((query, key), dim=1)
    rotated = rotate(rotated, places.cos, places.sin)
    store(keys, places.rows, rotated[:, num_heads:])
    store(values, places.rows, heads[:, num_rotated:])
    return rotated[:, :num_heads]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + rotary_dim / 2]) by its angle; computed in float32.

    Args:
        x: [T, heads, head_dim]; dimensions from rotary_dim on stay as they are.
        cos, sin: float32 [T, 1, rotary_dim] rows of `rope_tables`.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), dim=-1)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `Operations.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.dtype != torch.float32:
        return F.silu(gate).mul_(up)
    return sigmoid(gate).mul_(gate).mul_(up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See `Operations.gelu_mul`. Not torch's own gelu, of which the same is true as of its sigmoid."""
    gate, up = gate_up.chunk(2, dim=-1)
    x = gate.float()
    inner = x.pow(3).mul_(0.044715).add_(x).mul_(math.sqrt(2 / math.pi))
    return inner.tanh_().add_(1).mul_(x).mul_(0.5).to(gate.dtype).mul_(up)


def sigmoid(x: Tensor) -> Tensor:
    """Sigmoid of float32, of which an element has the same bits wherever it is, and whatever is beside it.

    On the CPU torch's own, and its silu, take another exponential for what is left over of a thread's part.
    """
    return x.neg().exp_().add_(1).reciprocal_()
