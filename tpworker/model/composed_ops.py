"""What layers do with several operations at once; some devices have one kernel for it, at some sizes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tpworker.kernels.operands import NewTokens, Normed, Places, Product
from tpworker.kernels.operations import Operations
from tpworker.model.attention import Attention
from tpworker.model.attention.split import SplitAttention
from tpworker.model.tp import Collectives


def tensor_of(operations: Operations, value: Tensor | Normed | Product) -> Tensor:
    """Computed, if it is not."""
    if isinstance(value, Normed):
        return operations.add_norm(value.x, None, value.weight, value.eps)
    return value.linear(value.x) if isinstance(value, Product) else value


def reduce_add_norm(
    operations: Operations,
    x: Tensor,
    part: Tensor | Product | None,
    weight: Tensor,
    eps: float,
    collectives: Collectives,
    post_norm: Tensor | None = None,
) -> Tensor | Normed:
    """Add up what the ranks have of a sum, add it to x in place, and norm the result.

    Args:
        x: [T, D], the residual stream, the same on all ranks.
        part: [T, D], this rank's summand; it may be overwritten. None: nothing is added.
        weight: [D], of the RMSNorm.
        post_norm: [D], of the RMSNorm of what is added; None: it is added as it is.

    Returns:
        [T, D], the same on all ranks; a `Normed` only for a `Product`.
    """
    if part is None:
        return operations.add_norm(x, None, weight, eps)
    if post_norm is not None:
        whole = collectives.all_reduce(tensor_of(operations, part))
        return operations.add_norm(x, operations.add_norm(whole, None, post_norm, eps), weight, eps)
    if isinstance(part, Product):
        if collectives.size == 1 and (normed := part.add_to(x, weight, eps)) is not None:
            return normed
        part = tensor_of(operations, part)
    fused = collectives.reduce_add_norm(x, part, weight, eps)
    return operations.add_norm(x, collectives.all_reduce(part), weight, eps) if fused is None else fused


def store_and_attend(
    operations: Operations,
    attention: Attention,
    plan: Any,
    heads: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    places: Places,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """`norm_rotate_store`, and the attention of its queries to what the cache then holds.

    Args:
        plan: what `attention.prepare` returned.
        heads, norms, keys, values: see `Operations.norm_rotate_store`.

    Returns:
        [T, H * head_dim].
    """
    if isinstance(attention, SplitAttention):
        tokens = NewTokens(norms, eps, places.cos, places.sin, places.rows)
        attended = attention.store_and_attend(heads, keys, values, plan, tokens)
        if attended is not None:
            return attended
    query = operations.norm_rotate_store(heads, norms, eps, places, keys, values)
    return attention(query, keys, values, plan)
