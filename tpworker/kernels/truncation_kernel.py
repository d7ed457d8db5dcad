"""Sampling from min-p, top-k and top-p sets without sorting the vocabulary. Imports Triton: on CUDA only.

What `sampling.sample_truncated` defines: of the tokens that min-p leaves the top-k most likely ones; of these
the fewest that have a share of top-p; of these the one with the best score, logit / temperature + noise. Here
one program a row

    1. finds the least value that min-p admits, and where that leaves more than k tokens, the k-th most likely
       one, both by bisection: of the value, then among equal values of the id
    2. takes the token with the best score of these (without min-p and top-k: of all, which is known already)
    3. adds up what the tokens more likely than that one weigh. If that is less than the share, it is in the
       set, and the answer; else no token but those can be, and the best of them is tried next

Each round of 3 leaves, of the tokens outside the set, a part that is drawn at random; few rows need a second
one. The vocabulary is seen as groups of 64 tokens: only groups whose greatest value is high enough are read.
Sums are taken in float64 and in a fixed order: every rank that has the same logits finds the same token.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels.operands import GREEDY_BELOW, SamplingRows
from tpworker.kernels.sampling_kernel import _gumbel

_GROUP = 64
_MAX_GROUPS = 4096  # a program holds the greatest values of all groups; a larger vocabulary has larger groups
_CHUNK = 4096  # tokens that a program reads at a time
_WARPS = 32
_LOWEST = tl.constexpr(-(1 << 31))  # below the key of every float


@triton.jit
def _key(value):
    """int32 in the order of float32 values, equal ones (0 and -0 too) alike."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _group_keys(logits, temperature, keys, size, stride, num_groups, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """One program a row and ROWS groups: the key of each group's greatest logit / temperature."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(logits + row * stride + column, mask=column < size, other=float("-inf")).to(tl.float32)
    greatest = tl.max(value, axis=1)
    degree = tl.load(temperature + row)
    greatest = tl.div_rn(greatest, tl.zeros_like(greatest) + degree)
    tl.store(keys + row * num_groups + group, _key(greatest), mask=group < num_groups)


@triton.jit
def _list_groups(keys, num_groups, bound, listed, GROUPS: tl.constexpr):
    """Writes down, in ascending order, the groups that hold something with a key of at least `bound`."""
    group = tl.arange(0, GROUPS)
    wanted = (group < num_groups) & (keys >= bound)
    place = tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    tl.debug_barrier()  # nobody reads the list of before any more
    tl.store(listed + place, group, mask=wanted)
    tl.debug_barrier()
    return tl.sum(wanted.to(tl.int32))


@triton.jit
def _read(logits, listed, first, num_listed, size, degree, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """ROWS groups of the list: their tokens, keys, and values; _LOWEST and -inf where there is none."""
    place = first + tl.arange(0, ROWS)
    group = tl.load(listed + place, mask=place < num_listed, other=0)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    exists = (place < num_listed)[:, None] & (token < size)
    value = tl.load(logits + token, mask=exists, other=float("-inf")).to(tl.float32)
    value = tl.div_rn(value, tl.zeros_like(value) + degree)
    return token, tl.where(exists, _key(value), _LOWEST), value


@triton.jit
def _count(
    logits, listed, num_listed, size, degree, key, equal_up_to, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    """How many tokens of the listed groups have a greater key, or this one and an id up to `equal_up_to`."""
    found = tl.zeros([ROWS, GROUP], tl.int32)
    for first in range(0, num_listed, ROWS):
        token, keys, _ = _read(logits, listed, first, num_listed, size, degree, GROUP, ROWS)
        found += ((keys > key) | ((keys == key) & (token <= equal_up_to))).to(tl.int32)
    return tl.sum(found)


@triton.jit
def _weigh(
    logits, listed, num_listed, size, degree, seed, position, highest, key, token, GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Of the listed groups: the weight of all tokens; of those ranked before (key, token): weight and best.

    Weights are exp(value - highest). The best is the token with the best score, -1 if there is none.
    """
    weight = tl.zeros([ROWS, GROUP], tl.float64)
    weight_before = tl.zeros([ROWS, GROUP], tl.float64)
    best_score = tl.full([ROWS, GROUP], float("-inf"), tl.float32)
    best_token = tl.full([ROWS, GROUP], 0x7FFFFFFF, tl.int32)
    for first in range(0, num_listed, ROWS):
        tokens, keys, values = _read(logits, listed, first, num_listed, size, degree, GROUP, ROWS)
        weights = tl.exp(values - highest).to(tl.float64)
        is_before = (keys > key) | ((keys == key) & (tokens < token) & (keys > _LOWEST))
        weight += weights
        weight_before += tl.where(is_before, weights, 0.0)
        if tl.max(is_before.to(tl.int32)) > 0:
            scores = values + _gumbel(seed, position, tokens.to(tl.int64))
            is_better = is_before & ((scores > best_score) | (best_token == 0x7FFFFFFF))
            best_score = tl.where(is_better, scores, best_score)  # of equal ones the first, the lowest
            best_token = tl.where(is_better, tokens, best_token)
    is_best = (best_score == tl.max(best_score)) & (best_token < 0x7FFFFFFF)
    best = tl.min(tl.where(is_best, best_token, 0x7FFFFFFF))
    return tl.sum(weight), tl.sum(weight_before), tl.where(best == 0x7FFFFFFF, -1, best)


@triton.jit
def _least_key(highest_key, floor):
    """int64, the least key whose value, less the highest one, is at least `floor`, which is 0 or less."""
    low = tl.full([], _LOWEST, tl.int64)
    high = highest_key.to(tl.int64)
    while low < high:
        middle = low + (high - low) // 2
        is_in = _value(middle.to(tl.int32)) - _value(highest_key) >= floor  # not, where it is no number's key
        low = tl.where(is_in, low, middle + 1)
        high = tl.where(is_in, middle, high)
    return low


@triton.jit
def _sample_row(
    logits, group_keys, lists, temperature, top_p, top_k, log_min_p, seeds, positions, tokens, size, stride,
    num_groups, GREEDY_BELOW: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    degree = tl.load(temperature + row)
    share = tl.load(top_p + row)
    most = tl.load(top_k + row)
    floor = tl.load(log_min_p + row)
    is_top_k = (most > 0) & (most < size)
    has_floor = floor > float("-inf")
    is_limited = is_top_k | has_floor
    is_nan = tl.load(tokens + row) < 0  # see `sampling.sample`: nothing can be ranked
    if (degree < GREEDY_BELOW) | ((share >= 1.0) & (is_limited == 0)) | is_nan:
        return
    logits += row * stride
    listed = lists + row * num_groups
    seed = tl.load(seeds + row)
    position = tl.load(positions + row)
    group = tl.arange(0, GROUPS)
    keys = tl.load(group_keys + row * num_groups + group, mask=group < num_groups, other=_LOWEST)
    highest_key = tl.max(keys)
    highest = _value(highest_key)
    chosen = tl.load(tokens + row).to(tl.int32)
    total = tl.zeros([], tl.float64)

    if is_limited:
        low = tl.full([], _LOWEST, tl.int64)
        if has_floor:
            low = _least_key(highest_key, floor)
        high = highest_key.to(tl.int64)
        if is_top_k & (most <= num_groups):  # as many tokens are at least as great as the k-th greatest group
            while low < high:
                middle = low + (high - low + 1) // 2
                is_enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32)) >= most
                low = tl.where(is_enough, middle, low)
                high = tl.where(is_enough, high, middle - 1)
        num_listed = _list_groups(keys, num_groups, low.to(tl.int32), listed, GROUPS)
        is_cut = is_top_k
        if is_top_k & has_floor:  # min-p may leave no more than k
            below = (low - 1).to(tl.int32)
            is_cut = _count(logits, listed, num_listed, size, degree, below, -1, GROUP, ROWS) > most
        high = tl.where(is_cut, highest_key.to(tl.int64), low)
        while low < high:  # the k-th greatest value
            middle = low + (high - low + 1) // 2
            below = (middle - 1).to(tl.int32)
            is_enough = _count(logits, listed, num_listed, size, degree, below, -1, GROUP, ROWS) >= most
            low = tl.where(is_enough, middle, low)
            high = tl.where(is_enough, high, middle - 1)
        cut_key = low.to(tl.int32)
        last = tl.zeros([], tl.int32) + size - 1
        first = tl.where(is_cut, 0, last)  # without a cut all that are as great are in
        while first < last:  # and the token that is the k-th
            half = (first + last) // 2
            is_enough = _count(logits, listed, num_listed, size, degree, cut_key, half, GROUP, ROWS) >= most
            first = tl.where(is_enough, first, half + 1)
            last = tl.where(is_enough, half, last)
        _, total, chosen = _weigh(
            logits, listed, num_listed, size, degree, seed, position, highest, cut_key, first + 1, GROUP, ROWS
        )

    is_open = share < 1.0
    is_total_known = is_limited
    while is_open:
        key = _key(tl.div_rn(tl.load(logits + chosen).to(tl.float32), degree))
        bound = tl.where(is_total_known, key, _LOWEST)
        num_listed = _list_groups(keys, num_groups, bound, listed, GROUPS)
        everything, before, best = _weigh(
            logits, listed, num_listed, size, degree, seed, position, highest, key, chosen, GROUP, ROWS
        )
        total = tl.where(is_total_known, total, everything)
        is_total_known = True
        is_open = (best >= 0) & (before >= share.to(tl.float64) * total)
        chosen = tl.where(is_open, best, chosen)
    tl.store(tokens + row, chosen.to(tl.int64))


def sample_truncated(logits: Tensor, rows: SamplingRows, tokens: Tensor) -> None:
    """See `Operations.sample_truncated`."""
    num_rows, size = logits.shape
    if num_rows == 0:
        return
    assert logits.stride(1) == 1
    group = max(_GROUP, triton.next_power_of_2(triton.cdiv(size, _MAX_GROUPS)))
    num_groups = triton.cdiv(size, group)
    keys, lists = torch.empty(2, num_rows, num_groups, dtype=torch.int32, device=logits.device)
    chunk = _CHUNK // group
    _group_keys[(num_rows, triton.cdiv(num_groups, chunk))](
        logits,
        rows.temperature,
        keys,
        size,
        logits.stride(0),
        num_groups,
        GROUP=group,
        ROWS=chunk,
        num_warps=8,
    )
    _sample_row[(num_rows,)](
        logits,
        keys,
        lists,
        rows.temperature,
        rows.top_p,
        rows.top_k,
        rows.log_min_p,
        rows.seed,
        rows.position,
        tokens,
        size,
        logits.stride(0),
        num_groups,
        GREEDY_BELOW=GREEDY_BELOW,
        GROUP=group,
        GROUPS=triton.next_power_of_2(num_groups),
        ROWS=chunk,
        num_warps=_WARPS,
    )
