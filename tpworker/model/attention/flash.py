"""Paged attention by FlashAttention 3 (Shah et al., arXiv 2407.08608), on Hopper GPUs.

Lengths and block tables are read on the device and nothing is planned on the host, so a decode step can be
captured in a CUDA graph and replayed at other lengths. Decoding sequences and chunks of prompts go through
one call; so do the tokens of sequences with drafts, which see each other as chunks do.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpworker.model.attention.backend import Scores
from tpworker.model.batch import Batch
from tpworker.model.kv_cache import FP8

_ops: Any = torch.ops

MODULE = "flash_attn_interface"
WHOLE_FROM = 64
"""Where a sequence may have so many tokens, none is split into parts: putting them together, for that many
tokens in every sequence, would take the longest. (One H200, 16 heads on 8, 65 sequences: one of 512 tokens
and the others empty, 71 µs a layer and 34 unsplit; the others decoding, 127 and 73.)"""

MAX_BLOCK_SIZE = 64
"""Blocks of 128 tokens ended in an illegal memory access (tokenspeed-fa3 3.0.0.post20260810, H200)."""


def why_not(
    head_dim: int, dtype: torch.dtype, device: torch.device, scores: Scores | None = None
) -> str | None:
    """Why FlashAttention 3 cannot serve here; None: it can. scores: None: plain ones."""
    if scores is not None and scores.softcap is not None:
        return "its build, tokenspeed-fa3, has no softcap"
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return f"{torch.cuda.get_device_name(device)} is not a Hopper GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, not in {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"heads of {head_dim} are not a multiple of 8 up to 256"
    try:
        importlib.import_module(MODULE)
    except (ImportError, OSError) as error:
        return f"{MODULE} cannot be imported: {error}"
    return None


@dataclass(frozen=True, slots=True)
class _Plan:
    block_tables: Tensor  # int32 [S, max_blocks]
    lengths: Tensor  # int32 [S]
    query_starts: Tensor | None  # int32 [S + 1]; None: `max_query` tokens a sequence
    max_query: int  # tokens of a sequence in this batch, at most
    num_splits: int  # 0: the library decides
    schedule: Tensor | None  # how the kernel's blocks share the work, computed on the device


class FlashAttention:
    """See the module.

    The kernel's own preparation (how many parts each sequence is split into) depends on lengths alone: it
    runs once a step and not once a layer.

    Args:
        num_heads, num_kv_heads: query heads and key-value heads of this rank.
        head_dim: size of a head.
        dtype: of queries, and of what is attended.
        scores: None: plain ones.
        kv_dtype: of keys and values; None: the same. The library wants queries in it, too: in FP8 these, and
            the weights of values, are rounded to it.
        share_schedule: False: let every layer prepare for itself.
    """

    reads_lengths = False

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        scores: Scores | None = None,
        *,
        kv_dtype: torch.dtype | None = None,
        share_schedule: bool = True,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = kv_dtype or dtype
        self.scores = scores or Scores.plain(head_dim)
        # To the left of a token, itself not counted; -1: all. As the library has it.
        self._left = -1 if self.scores.window is None else self.scores.window - 1
        self._share_schedule = share_schedule
        self._library: Any = importlib.import_module(MODULE)

    def prepare(self, batch: Batch, block_size: int) -> _Plan:
        """See `Attention`.

        Raises:
            ValueError: blocks of this size are not supported.
        """
        if block_size > MAX_BLOCK_SIZE:
            raise ValueError(
                f"--block-size {block_size}: FlashAttention 3 takes blocks of up to {MAX_BLOCK_SIZE} tokens"
            )
        is_decode = batch.num_decodes == len(batch.lengths)
        query_starts = None if is_decode else batch.query_starts
        max_query = batch.width if is_decode else batch.max_query
        num_splits = 0 if is_decode or max_query < WHOLE_FROM else 1
        schedule = None
        if self._share_schedule:
            schedule = self._library.get_scheduler_metadata(
                batch_size=len(batch.lengths),
                max_seqlen_q=max_query,
                max_seqlen_k=batch.block_tables.shape[1] * block_size,
                num_heads_q=self.num_heads,
                num_heads_kv=self.num_kv_heads,
                headdim=self.head_dim,
                cache_seqlens=batch.lengths,
                qkv_dtype=self.dtype,
                cu_seqlens_q=query_starts,
                page_size=block_size,
                causal=True,
                window_size=(self._left, -1),
                num_splits=num_splits,
            )
        return _Plan(batch.block_tables, batch.lengths, query_starts, max_query, num_splits, schedule)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, plan: _Plan) -> Tensor:
        """See `Attention`."""
        is_decode = plan.query_starts is None
        if keys.dtype == FP8:
            from tpworker.kernels.triton_kernels import narrow

            queries = narrow(queries)
        # Not the library's own `flash_attn_with_kvcache`, a Python operator around this one: the first call
        # of such an operator imports torch's compiler, which takes seconds, and each one takes 10 µs more.
        attended: Tensor = _ops.flash_attn_3.fwd(
            queries.view(-1, plan.max_query, *queries.shape[1:]) if is_decode else queries,
            keys,
            values,
            seqused_k=plan.lengths,
            page_table=plan.block_tables,
            cu_seqlens_q=plan.query_starts,
            max_seqlen_q=None if is_decode else plan.max_query,
            softmax_scale=self.scores.scale,
            is_causal=True,
            window_size_left=self._left,
            scheduler_metadata=plan.schedule,
            num_splits=plan.num_splits,
        )[0]
        return attended.view(len(queries), -1)
