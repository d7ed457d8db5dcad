"""What a step reads from the slot table and writes to it. See `Operations` for what each does."""

from __future__ import annotations

import torch
from torch import Tensor

from tpworker.kernels.operands import NO_TOKEN, SlotState


def begin_decode(slots: Tensor, width: int, state: SlotState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Operations.begin_decode`."""
    stands = state.position[slots]
    drafts = state.drafts[slots, : width - 1].clamp_(min=0)
    token_ids = torch.cat((state.last_token[slots][:, None], drafts), dim=1).flatten()
    positions = stands[:, None] + torch.arange(width, device=slots.device)
    return token_ids, positions.flatten(), (stands + width).int(), state.block_table[slots]


def begin_mixed(
    slots: Tensor, counts: Tensor, moves: Tensor, starts: Tensor, tokens: Tensor, state: SlotState
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Operations.begin_mixed`."""
    null_slot, index = len(state.position) - 1, torch.arange(len(tokens), device=slots.device)
    sequence_of = torch.searchsorted(starts[1:-1], index, right=True)
    slot_of, offsets = slots[sequence_of], index - starts[sequence_of]
    known = torch.cat((state.last_token[:, None], state.drafts), dim=1)
    from_table = known[slot_of, (-1 - tokens).clamp_(min=0)].clamp_(min=0)
    positions = (state.position[slot_of] + offsets).masked_fill_(slot_of == null_slot, 0)
    lengths = (state.position[slots] + counts).int()
    state.drafts[slots[tokens[starts[:-1].clamp(max=len(tokens) - 1)] >= 0]] = -1
    state.position[slots] += moves
    state.position[-1:].zero_()
    token_ids = torch.where(tokens < 0, from_table, tokens)
    return token_ids, positions, lengths, starts.int(), state.block_table[slots]


def finish_step(
    slots: Tensor, tokens: Tensor, width: int, state: SlotState, counter: Tensor, ring: Tensor
) -> Tensor:
    """See `Operations.finish_step`."""
    counter += 1
    tokens = tokens.view(-1, width)
    drafts = state.drafts[slots, : width - 1]
    # ~token may be -1, which is no draft.
    was_right = ((drafts == tokens[:, :-1]) & (drafts >= 0)).cumprod(dim=1)
    stands = state.position[slots]
    counts = torch.minimum(1 + was_right.sum(dim=1), state.end[slots] - stands - 1).clamp_(min=0)
    place = torch.arange(width, device=slots.device)
    is_taken = place < counts[:, None]
    known = torch.cat((state.last_token[slots][:, None], tokens ^ (tokens >> 63)), dim=1)
    state.last_token[slots] = known.gather(1, counts[:, None])[:, 0]
    if state.history.shape[1]:
        rows, columns = is_taken.nonzero(as_tuple=True)
        state.history[slots[rows], stands[rows] + 1 + columns] = known[rows, 1 + columns].int()
    state.position[slots] = stands + counts
    state.position[-1:].zero_()
    state.drafts[slots] = -1
    told = torch.where(is_taken, tokens, NO_TOKEN)
    if width > 1:
        told = torch.cat((told, (drafts >= 0).cumprod(dim=1).sum(dim=1, keepdim=True)), dim=1)
    packed = torch.cat((counter, told.flatten())).unsqueeze(0)
    ring[:, : packed.shape[1]].index_copy_(0, counter % len(ring), packed)
    return counts
