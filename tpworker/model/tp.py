"""All tensor parallelism in one file: how tensors are split over the ranks, and results put together.

A model's tensors fall into these kinds (Megatron-LM, arXiv 1909.08053); nothing else in `tpworker.model`
knows how many ranks there are:

    tensor                     split along           by
    query, key, value, biases  output rows           heads  (HeadLayout)
    attention output           input columns         heads
    gate, up, biases           output rows           MLP width, or each expert's (Split.even)
    down                       input columns         MLP width, or each expert's
    embedding, output head     vocabulary rows       vocabulary (Split.even)
    output and down biases     not: rank 0 has them, the others have zeros
    norms, routers             not: every rank has them

After the attention's output and after down, each rank holds a summand: an all-reduce gives the sum. What does
not divide is padded with zeros, which adds exact zeros to those sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tpworker.model.families import ModelSpec

ALIGNMENT = 8  # local MLP width and vocabulary, in elements: 16 bytes of bfloat16, as fast GEMM kernels need


class Collectives(Protocol):
    """What ranks do together. Every rank calls the same methods in the same order, with equal shapes."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place; returns x. The result is the same on all ranks, bit by bit."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], in the order of the ranks."""
        ...

    # What some can do in one kernel with what follows. None: not these, or not at this size, and the caller
    # takes the steps one by one. All ranks get the same answer.

    def reduce_add_norm(self, x: Tensor, part: Tensor, weight: Tensor, eps: float) -> Tensor | None:
        """`tpworker.model.composed_ops.reduce_add_norm`, in one kernel."""
        return None

    def look_up(self, token_ids: Tensor, table: Tensor, vocab_start: int) -> Tensor | None:
        """`embed`, in one kernel; vocab_start: the token of the table's first row."""
        return None

    def argmax(self, best: Tensor, token: Tensor) -> Tensor | None:
        """`argmax_ranks`, in one kernel."""
        return None


@dataclass(frozen=True, slots=True)
class Run:
    """`length` consecutive entries of an axis: from `source` of the full tensor to `target` of the rank's."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Split:
    """One rank's part of an axis: `local` entries, of which those in no run are zeros."""

    full: int
    local: int
    runs: tuple[Run, ...]

    @classmethod
    def even(cls, full: int, rank: int, size: int, alignment: int = 1) -> Split:
        """Equal parts, padded at the end to `alignment` times whatever is needed."""
        local = -(-full // size)
        local = -(-local // alignment) * alignment
        source = rank * local
        length = min(local, full - source)
        return cls(full, local, (Run(source, 0, length),) if length > 0 else ())

    @classmethod
    def whole(cls, full: int) -> Split:
        """All of it, on every rank."""
        return cls.even(full, 0, 1)

    def scaled(self, factor: int) -> Split:
        """The same split of an axis on which each entry takes `factor` places, e.g. heads of head_dim."""
        runs = tuple(Run(run.source * factor, run.target * factor, run.length * factor) for run in self.runs)
        return Split(self.full * factor, self.local * factor, runs)

    def at(self, start: int, full: int) -> Split:
        """The same split of a part of a longer axis, of `full` entries: of those from `start` on."""
        runs = tuple(Run(start + run.source, run.target, run.length) for run in self.runs)
        return Split(full, self.local, runs)

    @property
    def num_real(self) -> int:
        """Entries that are not padding."""
        return sum(run.length for run in self.runs)


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Which heads a rank computes: units of one key-value head with the same number of query heads each.

    With up to `num_kv_heads` ranks, a unit is a key-value head with all its query heads. With more, each
    key-value head is replicated, and its query heads are shared out among the replicas; there are as many
    replicas as fit while no rank has more key-value heads than it must, because the KV cache is what limits
    the batch. Units that are missing to a whole number a rank, and query heads that are missing in a unit,
    are zeros. Example, 3 key-value heads with 3 query heads each (9 and 3, SmolLM2):

        2 ranks: rank 0: k0 (q0 q1 q2), k1 (q3 q4 q5)    rank 1: k2 (q6 q7 q8), 0 (0 0 0)
        6 ranks: k0 (q0 q1) | k0 (q2 0) | k1 (q3 q4) | k1 (q5 0) | k2 (q6 q7) | k2 (q8 0)
    """

    queries: Split
    """Query heads, in units of one head."""
    keys: Split
    """Key-value heads, in units of one head."""

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, rank: int, size: int) -> HeadLayout:
        """The layout of one rank. `num_heads` is a multiple of `num_kv_heads`; any size will do."""
        group = num_heads // num_kv_heads
        replicas = max(1, min(group, size // num_kv_heads))
        group_local = -(-group // replicas)
        replicas = -(-group // group_local)  # a replica with no query head at all is not needed
        num_units = num_kv_heads * replicas
        units_local = -(-num_units // size)
        queries: list[Run] = []
        keys: list[Run] = []
        for target in range(units_local):
            unit = rank * units_local + target
            if unit >= num_units:
                break
            head, part = divmod(unit, replicas)
            first = part * group_local
            length = min(group_local, group - first)
            queries.append(Run(head * group + first, target * group_local, length))
            keys.append(Run(head, target, 1))
        return cls(
            Split(num_heads, units_local * group_local, _merged(queries)),
            Split(num_kv_heads, units_local, _merged(keys)),
        )


def _merged(runs: list[Run]) -> tuple[Run, ...]:
    """Neighbours that follow each other in both the full tensor and the rank's become one: one read."""
    merged: list[Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        if last and (last.source + last.length, last.target + last.length) == (run.source, run.target):
            merged[-1] = Run(last.source, last.target, last.length + run.length)
        else:
            merged.append(run)
    return tuple(merged)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank of `size` holds of a model."""

    rank: int
    size: int
    heads: HeadLayout
    mlp: Split
    expert: Split | None
    """The width of one expert; None: the model has none."""
    vocab: Split

    @classmethod
    def of(cls, spec: ModelSpec, rank: int, size: int) -> Shard:
        """The shard of rank `rank`; every rank's tensors have the same shapes."""
        assert 0 <= rank < size, (rank, size)
        expert = Split.even(spec.moe.intermediate_size, rank, size, ALIGNMENT) if spec.moe else None
        return cls(
            rank=rank,
            size=size,
            heads=HeadLayout.of(spec.num_heads, spec.num_kv_heads, rank, size),
            mlp=Split.even(spec.intermediate_size, rank, size, ALIGNMENT),
            expert=expert,
            vocab=Split.even(spec.vocab_size, rank, size, ALIGNMENT),
        )

    @property
    def num_heads(self) -> int:
        """Query heads of this rank, padding included."""
        return self.heads.queries.local

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of this rank, padding included."""
        return self.heads.keys.local

    @property
    def vocab_start(self) -> int:
        """Token id of the first row of this rank's embedding and of the first of its logits."""
        return self.rank * self.vocab.local


def embed(token_ids: Tensor, table: Tensor, shard: Shard, collectives: Collectives) -> Tensor:
    """Look tokens up in an embedding that is split by vocabulary.

    Args:
        token_ids: int64 [T], all below the vocabulary size.
        table: [vocab_local, D], this rank's rows.

    Returns:
        [T, D], the same on all ranks: one rank has a token's row, the others add zeros.
    """
    if shard.size == 1:
        return table.index_select(0, token_ids)
    fused = collectives.look_up(token_ids, table, shard.vocab_start)
    if fused is not None:
        return fused
    local_ids = token_ids - shard.vocab_start
    elsewhere = (local_ids < 0) | (local_ids >= shard.vocab.local)
    rows = table.index_select(0, local_ids.masked_fill_(elsewhere, 0))
    return collectives.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))


def gather_vocab(x: Tensor, collectives: Collectives) -> Tensor:
    """From each rank's [R, vocab_local] to [R, size * vocab_local] on all: column i is token i."""
    if collectives.size == 1:
        return x
    return collectives.all_gather(x).transpose(0, 1).reshape(x.shape[0], -1)


def argmax_ranks(best: Tensor, token: Tensor, collectives: Collectives) -> Tensor:
    """Of every rank's best tokens the best; of equal ones the lowest id.

    Args:
        best: float32 [R], the highest score of this rank's part of the vocabulary.
        token: int64 [R], the token that has it; ~token if the score is NaN, which is above all others.

    Returns:
        int64 [R], the same on all ranks; ~token where the score is NaN.
    """
    if collectives.size == 1:
        return token
    fused = collectives.argmax(best, token)
    if fused is not None:
        return fused
    # One exchange for both: float32 holds every id below 2**24 exactly.
    pairs = collectives.all_gather(torch.stack((best, token.to(torch.float32)), dim=-1))  # [size, R, 2]
    winner = pairs[..., 0].argmax(dim=0, keepdim=True)  # the first of equal ones has the lowest ids
    return pairs[..., 1].gather(0, winner)[0].to(torch.int64)
