"""Runners of one CUDA rank, for tests that launch steps themselves, and what their tiny models share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tpworker.checkpoint.weights import load_weights
from tpworker.model.decoder import Decoder
from tpworker.model.families import read_spec
from tpworker.model.kv_cache import KVCache
from tpworker.model.tp import Shard
from tpworker.rank.collectives import SoleRank
from tpworker.rank.cuda import CudaDevice
from tpworker.rank.drafter import Drafter, MtpDrafter, NgramDrafter
from tpworker.rank.runner import Runner
from tpworker.rank.slots import SlotTable

NUM_SLOTS = 12
BLOCK_SIZE = 16
BLOCKS_PER_SLOT = 32
MAX_MODEL_LEN = BLOCK_SIZE * BLOCKS_PER_SLOT

TINY: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": MAX_MODEL_LEN,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Of a config of transformers: heads that the kernels for GPUs serve, and nothing that ends an output."""


def cuda_runners(
    folder: Path,
    device: CudaDevice,
    count: int = 1,
    method: str = "",
    num_drafts: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Runner]:
    """Runners of one rank, with the same weights, and slots and KV of their own.

    Args:
        method: who makes drafts: 'ngram' (of 1 to 3 tokens), 'mtp', or '': nobody.
    """
    spec, here = read_spec(folder), device.torch_device
    shard, with_mtp = Shard.of(spec, 0, 1), method == "mtp"
    with torch.inference_mode():
        weights = load_weights(folder, spec, shard, dtype, here, with_mtp=with_mtp)
        decoder = Decoder(spec, weights, shard, SoleRank(), MAX_MODEL_LEN + num_drafts)
        num_blocks = NUM_SLOTS * BLOCKS_PER_SLOT + 1
        runners = []
        for _ in range(count):
            cache = KVCache(spec, shard, num_blocks, BLOCK_SIZE, dtype, here, spec.num_layers + with_mtp)
            width = BLOCKS_PER_SLOT + (num_drafts > 0)
            history = MAX_MODEL_LEN if method == "ngram" else 0
            vocab = (0, shard.vocab.local)
            table = SlotTable(NUM_SLOTS, width, here, vocab, None, num_drafts, history)
            drafter: Drafter | None = NgramDrafter(table, 3, 1) if history else None
            if with_mtp:
                drafter = MtpDrafter(decoder, cache, table)
            runners.append(Runner(decoder, cache, table, device, SoleRank(), 4, drafter=drafter))
    return runners
