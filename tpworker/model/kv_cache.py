"""The keys and values of past tokens, in blocks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tpworker.model.families import ModelSpec
from tpworker.model.tp import Shard

FP8 = torch.float8_e4m3fn
"""What keys and values may be rounded to (`--kv-cache-dtype fp8`), whatever the model's dtype."""

FP8_LARGEST = 448.0
"""Of E4M3, which has no infinity."""


class KVCache:
    """One rank's paged keys and values.

    Block 0 is the null block: rows that only pad a batch write there, and it is never granted. The memory is
    zeroed once, so that what nobody has written yet is finite.

    Args:
        dtype: of the model, or FP8.
        num_blocks: blocks, the null block included.
        block_size: tokens in a block.
        num_layers: None: the model's; one more where its head for multi-token prediction is served.
        memory: uint8, `num_blocks * bytes_per_block(…)` on the device: zeros, or what an earlier cache of the
            same sizes left. None: new memory.

    Attributes:
        keys, values: for each layer [num_blocks, block_size, kv_heads_local, head_dim].
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_layers: int | None = None,
        memory: Tensor | None = None,
    ) -> None:
        num_layers = num_layers or spec.num_layers
        shape = (2, num_layers, num_blocks, block_size, shard.num_kv_heads, spec.head_dim)
        whole = zeroed(shape, dtype, device) if memory is None else memory.view(dtype).view(shape)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys: list[Tensor] = list(whole[0].unbind(0))
        self.values: list[Tensor] = list(whole[1].unbind(0))

    @staticmethod
    def bytes_per_block(
        spec: ModelSpec, shard: Shard, block_size: int, dtype: torch.dtype, num_layers: int | None = None
    ) -> int:
        """Bytes of one block of one rank, over all layers, keys and values; num_layers: see the class."""
        num_layers = num_layers or spec.num_layers
        return 2 * num_layers * block_size * shard.num_kv_heads * spec.head_dim * dtype.itemsize


def cache_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of keys and values, by what the option says (`RuntimeConfig.kv_cache_dtype`) and the model's dtype."""
    return FP8 if name == "fp8" else dtype


def store(cache: Tensor, rows: Tensor, values: Tensor) -> None:
    """Put values [T, K, head_dim] into rows (int64 [T]) of a layer's cache, rounded to its dtype.

    In FP8 what is beyond its range becomes the greatest that there is, as CUDA's conversions have it.
    """
    target = cache.flatten(0, 1)
    if cache.dtype != FP8:
        target.index_copy_(0, rows, values)
        return
    narrow = values.float().clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)
    target.view(torch.uint8).index_copy_(0, rows, narrow.view(torch.uint8))


def take(cache_rows: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (int64 [n]) of a cache, seen as [rows, …]; of FP8 in this dtype, which is exact."""
    if cache_rows.dtype != FP8:
        return cache_rows.index_select(0, rows)
    return cache_rows.view(torch.uint8).index_select(0, rows).view(FP8).to(dtype)


def zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed memory. On the CPU the kernel's own zero pages: what no request has used yet costs nothing."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
