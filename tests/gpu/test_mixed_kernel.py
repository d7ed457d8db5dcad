"""The input of steps with chunks, by one kernel: against the torch code.

With TRITON_INTERPRET=1 and Triton installed it runs on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from tpworker.ipc.messages import Chunk
from tpworker.rank.mixed import MixedInputs, MixedShape, pack
from tpworker.rank.slots import SlotTable

HAS_GPU = torch.cuda.is_available()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not HAS_GPU
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
NUM_SLOTS = 40

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]


@pytest.mark.parametrize("width", [3, 200, 1500])
@pytest.mark.parametrize("size", [None, 900, 1024])
def test_against_indexing(width: int, size: int | None) -> None:
    """Decoding requests beside chunks shorter and longer than a program takes at a time, and padding."""
    from tpworker.kernels import slot_kernels

    draw = random.Random(width)
    slots = draw.sample(range(NUM_SLOTS), 25)
    decode, rest = slots[:15], slots[15:]
    chunks = [Chunk(slot, 0, draw.choice([1, 5, 130]), bool(slot % 2)) for slot in rest]
    prompts = {slot: np.array(draw.choices(range(1000), k=130), np.int32) for slot in rest}
    shape = MixedShape.exact(15, chunks) if size is None else MixedShape.padded(size, NUM_SLOTS)
    packed = torch.from_numpy(pack(decode, chunks, prompts, shape, NUM_SLOTS))
    table = SlotTable(NUM_SLOTS, width, torch.device("cpu"))
    table.position[:-1].random_(0, 1 << 20)
    table.last_token.random_(0, 1 << 20)
    table.block_table.random_(0, 1 << 20)
    there = MixedInputs.of(packed.to(DEVICE, copy=True), shape)
    last_token, position, block_table = (
        x.to(DEVICE, copy=True) for x in (table.last_token, table.position, table.block_table)
    )
    for _ in range(2):  # the second time from where the first has left the slots
        expected = MixedInputs.of(packed, shape).begin(table, 0, 1)
        found = slot_kernels.begin_mixed(
            there.slots, there.counts, there.starts, there.tokens, last_token, position, block_table
        )
        wanted = (
            expected.token_ids,
            expected.positions,
            expected.lengths,
            expected.query_starts,
            expected.block_tables,
        )
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.cpu(), theirs)
        assert torch.equal(position.cpu(), table.position)
