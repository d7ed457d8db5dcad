"""What a step reads from the slot table and writes to it. See `Operations` for what each does."""

from __future__ import annotations

import torch
from torch import Tensor


def begin_decode(
    slots: Tensor, last_token: Tensor, position: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Operations.begin_decode`."""
    positions = position[slots]
    ends = positions + 1
    position[slots] = ends
    position[-1:].zero_()
    return last_token[slots], positions, ends.int(), block_table[slots]


def begin_mixed(
    slots: Tensor,
    counts: Tensor,
    starts: Tensor,
    tokens: Tensor,
    last_token: Tensor,
    position: Tensor,
    block_table: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Operations.begin_mixed`."""
    null_slot, index = len(position) - 1, torch.arange(len(tokens), device=slots.device)
    sequence_of = torch.searchsorted(starts[1:-1], index, right=True)
    slot_of = slots[sequence_of]
    offsets = index - starts[sequence_of]
    positions = (position[slot_of] + offsets).masked_fill_(slot_of == null_slot, 0)
    ends = position[slots] + counts
    position[slots] = ends
    position[-1:].zero_()
    return (
        torch.where(tokens < 0, last_token[slot_of], tokens),
        positions,
        ends.int(),
        starts.int(),
        block_table[slots],
    )


def finish_step(slots: Tensor, tokens: Tensor, last_token: Tensor, counter: Tensor, ring: Tensor) -> None:
    """See `Operations.finish_step`."""
    counter += 1
    last_token[slots] = tokens ^ (tokens >> 63)
    row = torch.cat([counter, tokens]).unsqueeze(0)
    ring[:, : row.shape[1]].index_copy_(0, counter % len(ring), row)
