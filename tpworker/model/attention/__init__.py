"""Attention over the paged KV cache: which backend is taken."""

from __future__ import annotations

import logging

import torch

from tpworker.model.attention import flash
from tpworker.model.attention.backend import Attention, Scores
from tpworker.model.attention.paged import PagedAttention
from tpworker.model.attention.split import SplitAttention

__all__ = ["Attention", "PagedAttention", "Scores", "choose"]

logger = logging.getLogger(__name__)


def choose(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    scores: Scores | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Attention:
    """The fastest backend that serves these heads on this device; on CUDA the log says which, and why.

    Args:
        num_heads, num_kv_heads: query and key-value heads of this rank.
        dtype: of queries.
        scores: None: plain ones. Our own kernel takes no others.
        kv_dtype: of keys and values; None: the same.
    """
    reference = PagedAttention(num_heads, num_kv_heads, head_dim, dtype, scores)
    if device.type == "cpu":
        return reference
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    reason = flash.why_not(head_dim, dtype, device, scores)
    if reference.scores != Scores.plain(head_dim):
        if reason is None:
            logger.info("attention: FlashAttention 3, for %s", reference.scores)
            return flash.FlashAttention(num_heads, num_kv_heads, head_dim, dtype, scores, kv_dtype=kv_dtype)
        logger.warning(
            "attention: the slow torch reference, which reads lengths on the host, so that no step is "
            "captured, for %s; no FlashAttention 3, because %s",
            reference.scores,
            reason,
        )
        return reference
    if reason is None:
        logger.info("attention: decode steps by our own kernel, steps with prompts by FlashAttention 3")
        others = flash.FlashAttention(num_heads, num_kv_heads, head_dim, dtype, kv_dtype=kv_dtype)
        return SplitAttention(num_heads, num_kv_heads, head_dim, others, processors)
    logger.warning(
        "attention: decode steps by our own kernel, prompts by the slow torch reference, which reads lengths "
        "on the host; no FlashAttention 3, because %s",
        reason,
    )
    return SplitAttention(num_heads, num_kv_heads, head_dim, reference, processors)
