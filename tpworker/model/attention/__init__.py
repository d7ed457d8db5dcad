"""Attention over the paged KV cache: what a backend must do, and which one is taken."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
from torch import Tensor

from tpworker.model.attention import flash
from tpworker.model.attention.paged import PagedAttention
from tpworker.model.attention.split import SplitAttention
from tpworker.model.batch import Batch

__all__ = ["Attention", "PagedAttention", "choose"]

logger = logging.getLogger(__name__)


class Attention(Protocol):
    """A way to compute attention. Chosen once, when the decoder is built."""

    @property
    def reads_lengths(self) -> bool:
        """Whether it looks at lengths on the host in steps with chunks, which cannot be captured then."""
        ...

    def prepare(self, batch: Batch, block_size: int) -> Any:
        """What all layers of a step share. Called once a step, before the first layer."""
        ...

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, plan: Any) -> Tensor:
        """Causal attention of this step's tokens to all of their sequences, which the cache holds already.

        Args:
            queries: [T, heads_local, head_dim], rotated.
            keys, values: the layer's cache, [num_blocks, block_size, kv_heads_local, head_dim].
            plan: what `prepare` returned.

        Returns:
            [T, heads_local * head_dim], in the dtype of the queries.
        """
        ...


def choose(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Attention:
    """The fastest backend that serves these heads on this device; on CUDA the log says which, and why.

    Args:
        num_heads, num_kv_heads: query and key-value heads of this rank.
        dtype: of queries, keys and values.
    """
    reference = PagedAttention(num_heads, num_kv_heads, head_dim, dtype)
    if device.type == "cpu":
        return reference
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    reason = flash.why_not(head_dim, dtype, device)
    if reason is None:
        logger.info("attention: decode steps by our own kernel, steps with prompts by FlashAttention 3")
        others = flash.FlashAttention(num_heads, num_kv_heads, head_dim, dtype)
        return SplitAttention(num_heads, num_kv_heads, head_dim, others, processors)
    logger.warning(
        "attention: decode steps by our own kernel, prompts by the slow torch reference, which reads lengths "
        "on the host; no FlashAttention 3, because %s",
        reason,
    )
    return SplitAttention(num_heads, num_kv_heads, head_dim, reference, processors)
