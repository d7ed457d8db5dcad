"""Penalties, bias, allowed tokens and barred words: what changes logits before a token is chosen, in torch.

The definition of `Operations.adjust`, `take_masks` and `count_tokens`; the tables are kept by
`tpworker.rank.logit_state`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpworker.kernels.operands import (
    BIASED,
    GUIDED,
    IN_PROMPT,
    MASKED,
    PENALISED,
    WORDS_BARRED,
    HostMasks,
    LogitTables,
)


def adjust(logits: Tensor, slots: Tensor, positions: Tensor, tables: LogitTables, drafts: Tensor) -> Tensor:
    """See `Operations.adjust`."""
    out = logits.to(torch.float32, copy=True)
    width = 1 + drafts.shape[1]
    slots, drafts = slots.repeat_interleave(width), _before(drafts)
    uses = tables.uses[slots]
    rows = (uses & BIASED).nonzero()[:, 0]
    if len(rows):
        out[rows] = _add_bias(out[rows], slots[rows], tables)
    rows = (uses & PENALISED).nonzero()[:, 0]
    if len(rows):
        out[rows] = _penalise(out[rows], slots[rows], tables, drafts[rows])
    rows = (uses & MASKED).nonzero()[:, 0]
    if len(rows):
        out[rows] = _mask(out[rows], slots[rows], tables)
    rows = (uses & WORDS_BARRED).nonzero()[:, 0]
    if len(rows):
        out[rows] = _bar_words(out[rows], slots[rows], positions[rows], tables, drafts[rows])
    return out


def _before(drafts: Tensor) -> Tensor:
    """The drafts that stand before each row: from [S, W - 1] to [S W, W - 1], filled up with -1 behind."""
    width = 1 + drafts.shape[1]
    place = torch.arange(width, device=drafts.device)
    is_before = place[:, None] > place[:-1]  # [W, W - 1]
    return torch.where(is_before, drafts[:, None], -1).flatten(0, 1)


def _add_bias(logits: Tensor, slots: Tensor, tables: LogitTables) -> Tensor:
    columns = tables.bias_ids[slots].long() - tables.vocab_start
    is_here = (tables.bias_ids[slots] >= 0) & (columns >= 0) & (columns < logits.shape[1])
    bias = torch.where(is_here, tables.bias[slots], 0.0)
    return logits.scatter_add_(1, torch.where(is_here, columns, 0), bias)


def _penalise(logits: Tensor, slots: Tensor, tables: LogitTables, drafts: Tensor) -> Tensor:
    repetition, presence, frequency = tables.penalties[slots].unbind(1)
    counts = tables.counts[slots]
    columns = drafts - tables.vocab_start
    is_here = (drafts >= 0) & (columns >= 0) & (columns < counts.shape[1])
    counts.scatter_add_(1, torch.where(is_here, columns, 0), is_here.to(counts.dtype))
    repeated = torch.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
    logits = torch.where(counts > 0, repeated, logits)
    of_output = counts & (IN_PROMPT - 1)
    logits = logits - of_output * frequency[:, None]
    return logits - (of_output > 0) * presence[:, None]


def _mask(logits: Tensor, slots: Tensor, tables: LogitTables) -> Tensor:
    column = torch.arange(logits.shape[1], device=logits.device)
    words = tables.allowed[slots][:, column // 32]
    return logits.masked_fill_((words >> (column % 32)) & 1 == 0, float("-inf"))


def _bar_words(
    logits: Tensor, slots: Tensor, positions: Tensor, tables: LogitTables, drafts: Tensor
) -> Tensor:
    words, history = tables.barred[slots], tables.history[slots]  # [R, W, L], [R, H]
    length = words.shape[2]
    back = torch.arange(length - 1, 0, -1, device=logits.device)
    places = positions[:, None] - back  # of the last L - 1 tokens
    recent = history.gather(1, places % history.shape[1])
    if drafts.shape[1]:
        num_before = (drafts >= 0).sum(dim=1, keepdim=True)  # of a row, which stand right before it
        number = num_before - back
        drafted = drafts.gather(1, number.clamp(min=0)).int()
        recent = torch.where(number >= 0, drafted, recent)
    recent = torch.where(places >= 0, recent, -2)  # before the sequence's first token
    begins = words[:, :, :-1]
    is_next = ((begins == recent[:, None]) | (begins < 0)).all(dim=-1)
    columns = words[:, :, -1].long() - tables.vocab_start
    is_barred = is_next & (words[:, :, -1] >= 0) & (columns >= 0) & (columns < logits.shape[1])
    ceiling = torch.where(is_barred, float("-inf"), float("inf"))
    return logits.scatter_reduce_(1, torch.where(is_barred, columns, 0), ceiling, reduce="amin")


def take_masks(slots: Tensor, counter: Tensor, tables: LogitTables, masks: HostMasks) -> None:
    """See `Operations.take_masks`."""
    guided = slots[(tables.uses[slots] & GUIDED) != 0]
    if len(guided):
        step = int(counter) + 1
        masks.wait(step)
        allowed = tables.allowed.view(torch.uint8)
        first = tables.vocab_start // 8
        rows = masks.rows[step % len(masks.rows)].view(torch.uint8)[:, first : first + allowed.shape[1]]
        allowed[guided] = rows[guided]


def count_tokens(slots: Tensor, tokens: Tensor, positions: Tensor, tables: LogitTables) -> None:
    """See `Operations.count_tokens`."""
    tokens = tokens ^ (tokens >> 63)
    columns = tokens - tables.vocab_start
    is_here = (columns >= 0) & (columns < tables.counts.shape[1])
    places = (slots, torch.where(is_here, columns, 0))
    tables.counts.index_put_(places, is_here.to(torch.int32), accumulate=True)
    tables.history[slots, positions % tables.history.shape[1]] = tokens.to(torch.int32)
