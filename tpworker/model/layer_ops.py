"""What a layer does between its matrix products: plain torch on the CPU, one fused kernel each on CUDA.

The torch code is the definition and the reference; kernels/triton_kernels.py has the kernel of the same name.
On a GPU these operations cost their launches and little else, and there are dozens of them a layer in plain
torch, so each function is one kernel there:

    add_norm            x += summand; RMSNorm(x)                         twice a layer
    norm_rotate_store   norm of query and key heads, rotation, KV write  once a layer
    store_and_attend    the same, and attention: one kernel in decode steps
    silu_mul            silu(gate) * up                                  once a layer
    places              rotary angles and cache rows of the tokens       once a step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpworker.kernels.operands import NewTokens, Normed, Product
from tpworker.model.attention import Attention
from tpworker.model.attention.split import SplitAttention
from tpworker.model.batch import Batch
from tpworker.model.kv_cache import KVCache
from tpworker.model.tp import Collectives


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(x: Tensor, summand: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += summand, in place, and the RMSNorm of the sum.

    Args:
        x: [T, D], the residual stream.
        summand: [T, D]; None: nothing is added.
        weight: [D].

    Returns:
        [T, D].
    """
    if x.is_cuda:
        from tpworker.kernels import triton_kernels

        return triton_kernels.add_norm(x, summand, weight, eps)
    if summand is not None:
        x += summand
    return norm(x, weight, eps)


def tensor_of(value: Tensor | Normed | Product) -> Tensor:
    """Computed, if it is not."""
    if isinstance(value, Normed):
        return add_norm(value.x, None, value.weight, value.eps)
    return value.linear(value.x) if isinstance(value, Product) else value


def reduce_add_norm(
    x: Tensor, part: Tensor | Product | None, weight: Tensor, eps: float, collectives: Collectives
) -> Tensor | Normed:
    """Add up what the ranks have of a sum, add it to x in place, and norm the result.

    Args:
        x: [T, D], the residual stream, the same on all ranks.
        part: [T, D], this rank's summand; it may be overwritten. None: nothing is added.
        weight: [D], of the RMSNorm.

    Returns:
        [T, D], the same on all ranks; a `Normed` only for a `Product`.
    """
    if part is None:
        return add_norm(x, None, weight, eps)
    if isinstance(part, Product):
        if collectives.size == 1 and (normed := part.add_to(x, weight, eps)) is not None:
            return normed
        part = tensor_of(part)
    fused = collectives.reduce_add_norm(x, part, weight, eps)
    return add_norm(x, collectives.all_reduce(part), weight, eps) if fused is None else fused


@dataclass(frozen=True, slots=True)
class Places:
    """Where the T tokens of a step are in their sequences and in the cache. The same for all layers."""

    cos: Tensor  # float32 [T, 1, rotary_dim], rows of `rope_tables`
    sin: Tensor  # float32 [T, 1, rotary_dim]
    rows: Tensor  # int64 [T], block * block_size + offset in the block


def places(batch: Batch, cache: KVCache, cos_table: Tensor, sin_table: Tensor) -> Places:
    """Look up the places of a step's tokens; the tables are `rope_tables`, [num_positions, rotary_dim]."""
    if batch.positions.is_cuda:
        from tpworker.kernels import triton_kernels

        found = triton_kernels.places(
            batch.positions, batch.sequence_of, batch.block_tables, cos_table, sin_table, cache.block_size
        )
        return Places(*found)
    cos = cos_table.index_select(0, batch.positions)[:, None]
    sin = sin_table.index_select(0, batch.positions)[:, None]
    return Places(cos, sin, cache.rows_of(batch))


def norm_rotate_store(
    heads: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    places: Places,
    cache: KVCache,
    layer: int,
) -> Tensor:
    """Norm and rotate query and key heads, and write keys and values to the cache.

    Args:
        heads: [T, H + 2 K, head_dim]: query heads, key heads, value heads.
        norms: weights [head_dim] of the RMSNorm of each query and each key head; None: no norm.
        cache: of K key-value heads.

    Returns:
        The queries, [T, H, head_dim].
    """
    if heads.is_cuda:
        from tpworker.kernels import triton_kernels

        keys, values = cache.keys[layer], cache.values[layer]
        return triton_kernels.norm_rotate_store(
            heads, norms, eps, places.cos, places.sin, places.rows, keys, values
        )
    num_kv_heads = cache.keys[layer].shape[2]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    num_rotated = num_heads + num_kv_heads
    rotated = heads[:, :num_rotated]
    if norms is not None:
        query = norm(heads[:, :num_heads], norms[0], eps)
        key = norm(heads[:, num_heads:num_rotated], norms[1], eps)
        rotated = torch.cat((query, key), dim=1)
    rotated = rotate(rotated, places.cos, places.sin)
    cache.write(layer, places.rows, rotated[:, num_heads:], heads[:, num_rotated:])
    return rotated[:, :num_heads]


def store_and_attend(
    attention: Attention,
    plan: Any,
    heads: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    places: Places,
    cache: KVCache,
    layer: int,
) -> Tensor:
    """`norm_rotate_store`, and the attention of its queries to what the cache then holds.

    Args:
        plan: what `attention.prepare` returned.
        heads, norms, cache: see `norm_rotate_store`.

    Returns:
        [T, H * head_dim].
    """
    keys, values = cache.keys[layer], cache.values[layer]
    if isinstance(attention, SplitAttention):
        tokens = NewTokens(norms, eps, places.cos, places.sin, places.rows)
        attended = attention.store_and_attend(heads, keys, values, plan, tokens)
        if attended is not None:
            return attended
    query = norm_rotate_store(heads, norms, eps, places, cache, layer)
    return attention(query, keys, values, plan)


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
    """[T, 2 F], gate then up, to silu(gate) * up [T, F]."""
    if gate_up.is_cuda:
        from tpworker.kernels import triton_kernels

        return triton_kernels.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.dtype != torch.float32:
        return F.silu(gate).mul_(up)
    return sigmoid(gate).mul_(gate).mul_(up)


def sigmoid(x: Tensor) -> Tensor:
    """Sigmoid of float32, of which an element has the same bits wherever it is, and whatever is beside it.

    On the CPU torch's own, and its silu, take another exponential for what is left over of a thread's part.
    """
    return x.neg().exp_().add_(1).reciprocal_()
