"""What a decode step cannot but read: the yardstick that needs no other program. Needs no GPU."""

from __future__ import annotations

import torch

from tpworker.checkpoint.weights import shard_bytes
from tpworker.model.families import ModelSpec
from tpworker.model.kv_cache import KVCache
from tpworker.model.tp import Shard

BYTES_PER_SECOND = 4.3e12
"""Of an H200's memory, as measured: a copy 4.26, a product of a matrix and a vector 4.37 TB/s."""


def floor_bytes(
    spec: ModelSpec, shard: Shard, num_tokens: float, batch: int = 0, touched: float | None = None
) -> float:
    """Bytes that one rank reads in a decode step, in bfloat16.

    Every weight once, the output head among them; of the embedding a row for each of `batch` sequences; and
    keys and values of `num_tokens` tokens, of all sequences together. Activations stay in the L2 cache.

    Args:
        touched: experts of a layer that some token goes to, shared ones included; None: all.
    """
    dtype = torch.bfloat16
    row = spec.hidden_size * dtype.itemsize
    weights = float(shard_bytes(spec, shard, dtype, torch.device("meta")))  # tied embeddings once
    if not spec.tie_embeddings:
        weights -= shard.vocab.local * row
    if spec.moe is not None and shard.expert is not None and touched is not None:
        idle = spec.moe.num_experts + spec.moe.num_shared - touched
        weights -= len(spec.moe.layers) * idle * 3 * shard.expert.local * row
    return weights + batch * row + num_tokens * KVCache.bytes_per_block(spec, shard, 1, dtype)


def floor_ms(
    spec: ModelSpec, num_ranks: int, batch: int, length: float, touched: float | None = None
) -> float:
    """Milliseconds that reading those bytes takes, for sequences of `length` tokens each."""
    num_bytes = floor_bytes(spec, Shard.of(spec, 0, num_ranks), batch * length, batch, touched)
    return 1e3 * num_bytes / BYTES_PER_SECOND
