"""Who makes drafts: guesses at the next tokens of slots, which the next step checks all at once.

They are made at the end of a step, from device state alone, and are device state: the host does not see them.
A guess that is wrong costs its share of a step and changes no token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tpworker.kernels.operands import SamplingRows
from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder
from tpworker.model.kv_cache import KVCache
from tpworker.model.mtp import MtpHead
from tpworker.model.sampling import SamplingMode
from tpworker.model.tp import argmax_ranks
from tpworker.rank.slots import SlotTable


@dataclass(frozen=True, slots=True)
class Computed:
    """What a step has computed of T tokens, for who makes drafts of hidden states; P slots were sampled."""

    batch: Batch
    hidden: Tensor  # [T, D], after the final norm
    following: Tensor  # int64 [T], the token behind each; of what nobody takes, any
    last_rows: Tensor  # int64 [P], of the last token of each slot that has KV


class Drafter(Protocol):
    """A way to make drafts."""

    @property
    def reads_hidden(self) -> bool:
        """Whether it is told what a step has computed, and wants to be after every step."""
        ...

    def draft(self, slots: Tensor, num_drafts: int, computed: Computed | None, is_random: bool) -> None:
        """Writes drafts of slots (int64 [P]) into the slot table, behind the tokens that a step gave them.

        Args:
            num_drafts: of each; 0: only what later drafts will need is kept.
            computed: by the step, if it reads that.
            is_random: some temperature is not 0.
        """
        ...


class NgramDrafter:
    """From what sequences repeat, see `Operations.look_up`.

    Args:
        table: with a history.
        longest, shortest: n-grams that are looked up, tokens.
    """

    reads_hidden = False

    def __init__(self, table: SlotTable, longest: int, shortest: int) -> None:
        self._table = table
        self._longest = longest
        self._shortest = shortest

    def draft(self, slots: Tensor, num_drafts: int, computed: Computed | None, is_random: bool) -> None:
        """See `Drafter`."""
        table = self._table
        if num_drafts and len(slots):
            table.operations.look_up(slots, num_drafts, self._longest, self._shortest, table.state)


class MtpDrafter:
    """By the model's head for multi-token prediction; several by feeding it what it has drafted.

    It chooses with the noise that the model will choose with, a function of seed, position and token. So a
    draft is right more often than two independent draws would agree, at any temperature.

    Args:
        decoder: whose head it is.
        cache: with the head's layer.
        table: the slot table.
    """

    reads_hidden = True

    def __init__(self, decoder: Decoder, cache: KVCache, table: SlotTable) -> None:
        assert decoder.weights.mtp is not None
        self._head = MtpHead(decoder, decoder.weights.mtp)
        self._decoder = decoder
        self._cache = cache
        self._table = table
        device = table.state.position.device
        self._rows = torch.arange(table.num_slots + 1, device=device)
        self._starts = self._rows.int()

    def draft(self, slots: Tensor, num_drafts: int, computed: Computed | None, is_random: bool) -> None:
        """See `Drafter`."""
        assert computed is not None
        batch, following = computed.batch, computed.following
        if not num_drafts or not len(slots):
            self._head.keep(batch, computed.hidden, following, self._cache)
            return
        hidden = self._head.forward(batch, computed.hidden, following, self._cache)[computed.last_rows]
        rows = self._table.sampling_rows(slots, 1, SamplingMode(is_random, False, False))
        tokens = self._choose(slots, 0, hidden, rows, is_random)
        if num_drafts == 1:
            return
        batch = self._behind(slots)
        for number in range(1, num_drafts):
            hidden = self._head.forward(batch, hidden, tokens, self._cache)
            tokens = self._choose(slots, number, hidden, rows, is_random)
            batch.positions, batch.lengths = batch.positions + 1, batch.lengths + 1

    def _behind(self, slots: Tensor) -> Batch:
        """One token of each slot, behind those that the head has been fed: where the first draft is fed."""
        table, count = self._table, len(slots)
        token_ids, positions, lengths, block_tables = table.operations.begin_decode(slots, 1, table.state)
        return Batch(
            token_ids=token_ids,
            positions=positions,
            sequence_of=self._rows[:count],
            block_tables=block_tables,
            lengths=lengths,
            query_starts=self._starts[: count + 1],
            num_decodes=count,
            max_query=1,
        )

    def _choose(
        self, slots: Tensor, number: int, hidden: Tensor, rows: SamplingRows, is_random: bool
    ) -> Tensor:
        """The slots' draft of this number, from 0 on; int64 [P], which is also written to the table."""
        decoder, state = self._decoder, self._table.state
        if number and is_random:
            rows.position = rows.position + 1
        logits = self._head.logits(hidden)
        best, token = decoder.operations.best_tokens(logits, rows, is_random, decoder.vocab_start)
        tokens = argmax_ranks(best, token, decoder.collectives)
        may_have = state.most_drafts[slots] > number
        state.drafts[:, number].index_copy_(0, slots, torch.where(may_have, tokens.clamp(min=-1), -1))
        return tokens.clamp_(min=0)
