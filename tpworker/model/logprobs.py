"""Log-probabilities of chosen tokens and of the likeliest ones, over the whole vocabulary, in float32.

They are those of the logits as the model gives them: before temperature, penalties, bias and masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpworker.kernels.operands import LOGPROB_ROW, MOST_LOGPROBS
from tpworker.kernels.operations import Operations
from tpworker.model.tp import Collectives


def logprob_rows(
    operations: Operations, logits: Tensor, tokens: Tensor, vocab_start: int, collectives: Collectives
) -> Tensor:
    """A logprob row (see LOGPROB_ROW) for each token: float32 [R, LOGPROB_ROW], the same on all ranks.

    Args:
        logits, tokens, vocab_start: see `Operations.logprob_parts`.
    """
    parts = operations.logprob_parts(logits, tokens, vocab_start)
    if collectives.size > 1:
        parts = _merged(collectives.all_gather(parts))
    greatest, total, own = parts[:, :3].unbind(1)
    log_total = total.log()[:, None]
    likeliest = parts[:, 3 : 3 + MOST_LOGPROBS]
    rows = parts.new_empty(len(parts), LOGPROB_ROW)
    # Distances first: added to a large logit, the total's logarithm would be rounded away.
    rows[:, :1] = (own - greatest)[:, None] - log_total
    rows[:, 1 : 1 + MOST_LOGPROBS] = (likeliest - greatest[:, None]) - log_total
    rows[:, 1 + MOST_LOGPROBS :] = parts[:, 3 + MOST_LOGPROBS :]
    return rows


def _merged(parts: Tensor) -> Tensor:
    """From the parts of each rank [size, R, n] to those of the whole vocabulary [R, n]."""
    greatest, totals, owns = parts[..., :3].unbind(-1)  # [size, R] each
    highest = greatest.amax(dim=0)
    total = (totals * (greatest - highest).exp()).sum(dim=0)
    values = parts[..., 3 : 3 + MOST_LOGPROBS].transpose(0, 1).flatten(1)  # lower ids first, by rank
    ids = parts[..., 3 + MOST_LOGPROBS :].transpose(0, 1).flatten(1)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    first = order[:, :MOST_LOGPROBS]
    head = torch.stack((highest, total, owns.amax(dim=0)), dim=-1)
    return torch.cat((head, values[:, :MOST_LOGPROBS], ids.gather(1, first)), dim=-1)


def logprob_parts(logits: Tensor, tokens: Tensor, vocab_start: int) -> Tensor:
    """See `Operations.logprob_parts`."""
    logits = logits.float()
    tokens = tokens ^ (tokens >> 63)
    columns = tokens - vocab_start
    is_here = (columns >= 0) & (columns < logits.shape[1])
    own = logits.gather(1, torch.where(is_here, columns, 0)[:, None])[:, 0]
    own = torch.where(is_here, own, float("-inf"))
    greatest = logits.amax(dim=-1)
    # Where there is nothing but padding, the greatest is -inf, and the sum 0.
    total = (logits - greatest.where(greatest > float("-inf"), 0)[:, None]).exp().sum(dim=-1)
    count = min(MOST_LOGPROBS, logits.shape[1])
    values, ids = _likeliest(logits, count)
    ids = torch.where(values > float("-inf"), ids + vocab_start, -1).to(torch.float32)
    if count < MOST_LOGPROBS:
        missing = logits.new_full((len(logits), MOST_LOGPROBS - count), 0.0)
        values = torch.cat((values, missing - float("inf")), dim=-1)
        ids = torch.cat((ids, missing - 1), dim=-1)
    return torch.cat((torch.stack((greatest, total, own), dim=-1), values, ids), dim=-1)


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row and their columns; of equal ones the lowest columns, and first."""
    logits = logits.masked_fill(logits.isnan(), float("-inf"))
    least = logits.topk(count, dim=-1, sorted=True).values[:, -1:]
    # Above the least all are in, and of those that equal it the first ones.
    equal = logits == least
    room = count - (logits > least).sum(dim=-1, keepdim=True)
    is_in = (logits > least) | (equal & (equal.cumsum(dim=-1) <= room))
    columns = is_in.nonzero()[:, 1].view(len(logits), count)  # ascending
    values, order = logits.gather(1, columns).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(1, order)
