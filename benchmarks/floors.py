"""What a decode step cannot but read: the yardstick that needs no other program. Needs no GPU."""

from __future__ import annotations

import torch

from tpworker.model.families import ModelSpec
from tpworker.model.kv_cache import KVCache
from tpworker.model.tp import Shard
from tpworker.model.weights import shard_bytes

BYTES_PER_SECOND = 4.3e12
"""Of an H200's memory, as measured: a copy 4.26, a product of a matrix and a vector 4.37 TB/s."""


def floor_bytes(spec: ModelSpec, shard: Shard, num_tokens: float, batch: int = 0) -> float:
    """Bytes that one rank reads in a decode step, in bfloat16.

    Every weight once, the output head among them; of the embedding a row for each of `batch` sequences; and
    keys and values of `num_tokens` tokens, of all sequences together. Activations stay in the L2 cache.
    """
    dtype = torch.bfloat16
    row = spec.hidden_size * dtype.itemsize
    weights = shard_bytes(spec, shard, dtype, torch.device("meta"))  # tied embeddings once
    if not spec.tie_embeddings:
        weights -= shard.vocab.local * row
    return weights + batch * row + num_tokens * KVCache.bytes_per_block(spec, shard, 1, dtype)


def floor_ms(spec: ModelSpec, num_ranks: int, batch: int, length: float) -> float:
    """Milliseconds that reading those bytes takes, for sequences of `length` tokens each."""
    return 1e3 * floor_bytes(spec, Shard.of(spec, 0, num_ranks), batch * length, batch) / BYTES_PER_SECOND
