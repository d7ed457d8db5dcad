"""From logits to tokens: greedy, temperature, min-p, top-k, top-p, minimum length; the same on every rank.

A token is the argmax of logits / T + g, with g independent Gumbel noise: this samples from
softmax(logits / T) (the Gumbel-max trick). The noise of a token id is a function of (seed, position, id)
alone: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) seeded by a mix of seed and position, its id-th output.
So a row's token depends neither on the rest of the batch nor on the number of ranks, and each rank computes
the noise of its own part of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpworker.kernels.operands import GREEDY_BELOW, SamplingRows
from tpworker.kernels.operations import Operations
from tpworker.model.tp import Collectives, argmax_ranks, gather_vocab

_NUM_CANDIDATES = 256  # most likely tokens that the CPU looks at before it sorts them all


@dataclass(frozen=True, slots=True)
class SamplingMode:
    """What any row of the batch needs; the host knows. A row that does not need it is not affected."""

    random: bool
    """Some temperature is not 0."""
    truncate: bool
    """Some random row has min_p, top_k or top_p."""
    suppress: bool
    """Some row may be below its min_length."""
    adjust: bool = False
    """Some row has a rule for its logits, see `LogitTables`."""
    logprobs: bool = False
    """Some row asks for logprobs."""
    guided: bool = False
    """Some row's mask comes from the host while the step runs, see `HostMasks`; `adjust` as well."""


def sample(
    operations: Operations,
    logits: Tensor,
    rows: SamplingRows,
    mode: SamplingMode,
    vocab_start: int,
    collectives: Collectives,
) -> Tensor:
    """Choose one token a row.

    Args:
        operations: of the device.
        logits: [R, vocab_local] of a float dtype, computed with in float32; -inf where it is padding; may be
            overwritten.
        vocab_start: token id of this rank's first logit.

    Returns:
        int64 [R], the same on all ranks, bit by bit. Of equal scores the lowest id wins. Where logits are
        NaN: ~token, which is negative, of the first that is. So it is seen without a look at the logits.
    """
    if mode.suppress:
        _suppress(logits, rows, vocab_start)
    best, token = operations.best_tokens(logits, rows, mode.random, vocab_start)
    tokens = argmax_ranks(best, token, collectives)
    if mode.random and mode.truncate:
        operations.sample_truncated(gather_vocab(logits, collectives), rows, tokens)
    return tokens


def _suppress(logits: Tensor, rows: SamplingRows, vocab_start: int) -> None:
    """Set the stop ids of rows below their minimum length to -inf, in place."""
    local_ids = rows.stop_ids - vocab_start
    is_here = (rows.stop_ids >= 0) & (local_ids >= 0) & (local_ids < logits.shape[1])
    is_suppressed = is_here & (rows.position < rows.min_length)[:, None]
    # Ids that are not suppressed aim at some column, too: shapes are fixed. The minimum with +inf leaves it.
    ceiling = torch.where(is_suppressed, float("-inf"), float("inf")).to(logits.dtype)
    logits.scatter_reduce_(1, torch.where(is_here, local_ids, 0), ceiling, reduce="amin")


def best_tokens(logits: Tensor, rows: SamplingRows, random: bool, vocab_start: int) -> tuple[Tensor, Tensor]:
    """See `Operations.best_tokens`."""
    scores = logits
    if random:
        ids = torch.arange(vocab_start, vocab_start + logits.shape[1])
        is_greedy = rows.temperature < GREEDY_BELOW
        noise = gumbel_noise(rows.seed, rows.position, ids).masked_fill_(is_greedy[:, None], 0)
        scores = noise.add_(_scaled(logits, rows))
    best, index = scores.max(dim=-1)  # the first of equal ones, or of NaNs
    token = index + vocab_start
    return best, torch.where(best.isnan(), ~token, token)


def _scaled(logits: Tensor, rows: SamplingRows) -> Tensor:
    """float32 [R, n]: logits / temperature; of greedy rows the logits themselves."""
    return logits / torch.where(rows.temperature < GREEDY_BELOW, 1.0, rows.temperature)[:, None]


# ---------------------------------------------------------------------------------- top-k and top-p


def sample_truncated(logits: Tensor, rows: SamplingRows, tokens: Tensor) -> None:
    """See `Operations.sample_truncated`."""
    is_greedy = rows.temperature < GREEDY_BELOW
    is_limited = (rows.top_p < 1) | (rows.top_k > 0) | (rows.log_min_p > float("-inf"))
    is_truncated = ~is_greedy & is_limited & (tokens >= 0)
    sampled = _sample_from_sets(_scaled(logits, rows), rows, is_truncated)
    tokens.copy_(torch.where(is_truncated, sampled, tokens))


def _sample_from_sets(full: Tensor, rows: SamplingRows, is_truncated: Tensor) -> Tensor:
    """Sample each row from its min-p, top-k and top-p set; rows that have none of them get some token.

    Args:
        full: float32 [R, V], logits / temperature.

    Returns:
        int64 [R].
    """
    if full.shape[1] <= _NUM_CANDIDATES:
        return _sample_ranked(full, rows, full.shape[1])[0]
    # The CPU may look at the result: most sets are small, and finding the first few hundred tokens is many
    # times faster than sorting them all.
    token, fits = _sample_ranked(full, rows, _NUM_CANDIDATES)
    large = (is_truncated & ~fits).nonzero()[:, 0]
    if large.numel():
        token[large] = _sample_ranked(full[large], rows.select(large), full.shape[1])[0]
    return token


def _sample_ranked(full: Tensor, rows: SamplingRows, count: int) -> tuple[Tensor, Tensor]:
    """Sample each row from those of its set that are among its `count` most likely tokens.

    Returns:
        int64 [R], tokens; bool [R], whether the set lies within them, so that the token is right.
    """
    vocab_size = full.shape[1]
    top_k = torch.where(rows.top_k > 0, rows.top_k, vocab_size).clamp_(max=vocab_size)
    values, ids = _ranked(full, count)
    keep = _keep(values, full.logsumexp(dim=-1), top_k, rows.top_p, rows.log_min_p, vocab_size)
    scores = gumbel_noise(rows.seed, rows.position, ids).add_(values).masked_fill_(~keep, float("-inf"))
    token = ids.gather(1, scores.argmax(dim=-1, keepdim=True))[:, 0]
    # Of values equal to the least one kept, the lowest ids were taken only if all such values are here.
    least_kept = values.gather(1, keep.sum(dim=-1, keepdim=True) - 1)[:, 0]
    is_min_p_within = values[:, -1] - values[:, 0] < rows.log_min_p
    is_unlimited = (top_k == vocab_size) & (rows.log_min_p == float("-inf"))
    is_total_known = (top_k <= count) | is_min_p_within | is_unlimited
    return token, (values[:, -1] < least_kept) & is_total_known


def _ranked(full: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values [R, count] of full [R, V] in descending order, and their columns.

    Equal values are in ascending order of columns; which of those that equal the last one are included is
    left open, unless count is V.
    """
    if count == full.shape[1]:
        return full.sort(dim=-1, descending=True, stable=True)
    values, ids = full.topk(count, dim=-1, sorted=False)
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _keep(
    values: Tensor, log_total: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor, vocab_size: int
) -> Tensor:
    """Which of the ranked values are in the row's set: a prefix of at least one. bool [R, C].

    First those that min_p leaves, of these the top_k, then the fewest whose share of the probability of these
    is at least top_p. This order is that of vLLM; without min_p also that of transformers.

    Args:
        values: float32 [R, C], descending.
        log_total: float32 [R], log of the sum of exp over the whole vocabulary.
        top_k: int64 [R], from 1 to `vocab_size`.
        top_p, log_min_p: float32 [R].
    """
    rank = torch.arange(values.shape[1], device=values.device)
    distance = values - values[:, :1]
    is_in = (rank < top_k[:, None]) & (distance >= log_min_p[:, None])
    weights = distance.exp().to(torch.float64)  # of the most likely token: 1
    is_limited = (top_k < vocab_size) | (log_min_p > float("-inf"))
    everything = (log_total - values[:, 0]).exp().to(torch.float64)
    total = torch.where(is_limited, (weights * is_in).sum(dim=-1), everything)
    before = weights.cumsum(dim=-1) - weights
    in_top_p = (before < (top_p * total)[:, None]) | (top_p >= 1)[:, None]
    return (is_in & in_top_p) | (rank == 0)


# ------------------------------------------------------------------------------------------- noise


def _signed(value: int) -> int:
    """The int64 of the same bits as an unsigned 64-bit integer: torch computes with int64, modulo 2**64."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, in place, on int64; torch's shifts copy the sign: it is masked."""
    z ^= (z >> 30).bitwise_and_((1 << 34) - 1)
    z *= _MULTIPLIER_1
    z ^= (z >> 27).bitwise_and_((1 << 37) - 1)
    z *= _MULTIPLIER_2
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    return z


def gumbel_noise(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, a function of each (seed, position, id) alone.

    Args:
        seed, position: int64 [R].
        ids: int64 [n], the same for each row, or [R, n].

    Returns:
        float32 [R, n], finite: from -2.9 to 43.7. What is cut off has a probability of 6e-8 a value.
    """
    key = _mix(_mix(seed + _GAMMA) + position * _GAMMA)
    bits = _mix(key[:, None] + (ids + 1) * _GAMMA).bitwise_and_((1 << 63) - 1)
    # Large noise comes from small uniform numbers, and float32(63 bits) is as precise there as elsewhere.
    uniform = bits.to(torch.float32).mul_(2.0**-63).clamp_(2.0**-63, 1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
