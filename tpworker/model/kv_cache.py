"""The keys and values of past tokens, in blocks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tpworker.model.families import ModelSpec
from tpworker.model.tp import Shard


class KVCache:
    """One rank's paged keys and values.

    Block 0 is the null block: rows that only pad a batch write there, and it is never granted. The memory is
    zeroed once, so that what nobody has written yet is finite.

    Args:
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


def zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed memory. On the CPU the kernel's own zero pages: what no request has used yet costs nothing."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
