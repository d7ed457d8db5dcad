"""The input of steps that hold chunks of prompts ('mixed' steps: requests may decode beside them).

    host                                     device
    one packed array of integers ──upload──► MixedInputs ──► Batch
    tokens of chunks, slots, counts          what decodes takes its token from the slot table; all take their
                                             positions from it: a chunk begins where its slot stands

What decodes has W tokens: the last one, and W - 1 drafts. So all slots that are sampled have W rows. Of those
at the end of a prompt the first counts; the others are the same once more, behind drafts that do not exist.

Sizes are a step's own, or rounded up to those of a captured graph. Then padding tokens make up a sequence of
the null slot, the last one, of length 0; and rows that are missing are sampled for the null slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpworker.ipc.messages import Chunk
from tpworker.model.batch import Batch
from tpworker.rank.drafter import Computed
from tpworker.rank.sampler import most_rows
from tpworker.rank.slots import SlotTable


@dataclass(frozen=True, slots=True)
class MixedShape:
    """T tokens of S sequences; R = P W rows are picked for sampling, for P slots."""

    num_tokens: int
    num_sequences: int
    num_rows: int
    num_places: int
    has_following: bool = False

    @classmethod
    def exact(
        cls, num_decodes: int, chunks: Sequence[Chunk], width: int = 1, *, has_following: bool = False
    ) -> MixedShape:
        """Of a step with so many decoding sequences, `width` tokens each, and these chunks."""
        num_places = num_decodes + sum(chunk.sample for chunk in chunks)
        num_tokens = num_decodes * width + sum(chunk.length for chunk in chunks)
        return cls(num_tokens, num_decodes + len(chunks), num_places * width, num_places, has_following)

    @classmethod
    def padded(
        cls, num_tokens: int, num_slots: int, num_drafts: int = 0, *, has_following: bool = False
    ) -> MixedShape:
        """For any step of up to `num_tokens` tokens: as many sequences as it can have, and one of padding.

        Args:
            num_drafts: most that slots have.
        """
        num_sequences = min(num_tokens, num_slots)
        num_rows = min(num_sequences * (1 + num_drafts), most_rows(num_slots, num_drafts))
        return cls(num_tokens, num_sequences + 1, num_rows, num_slots, has_following)

    @property
    def sections(self) -> list[int]:
        """The length of each field of `MixedInputs`; they are packed one behind the other."""
        tokens, sequences = self.num_tokens, self.num_sequences
        of_sequences = [sequences, sequences, sequences, sequences + 1]
        return [self.num_places, self.num_rows, tokens, tokens, tokens * self.has_following, *of_sequences]


@dataclass(frozen=True, slots=True)
class MixedInputs:
    """Views of a packed array on the device, int64."""

    sampled_slots: Tensor  # [P], in the order of the plan: decoding slots, then chunks that end their prompts
    sample_rows: Tensor  # [R], their last tokens
    tokens: Tensor  # [T]; -1: the slot's last token; -2: its first draft, and so on
    sequence_of: Tensor  # [T]
    following: Tensor  # [T], the tokens behind; -1: what the first of the R rows gets, and so on; or [0]
    slots: Tensor  # [S]
    counts: Tensor  # [S], tokens of each sequence; padding counts for nothing
    moves: Tensor  # [S], so far its slot is moved on: to the last token that is known, or the next chunk
    starts: Tensor  # [S + 1], its first token, and T

    @classmethod
    def of(cls, packed: Tensor, shape: MixedShape) -> MixedInputs:
        """What `pack` has put there."""
        sections = shape.sections
        return cls(*packed[: sum(sections)].split_with_sizes(sections))

    def begin(self, table: SlotTable, num_decodes: int, max_query: int, width: int = 1) -> Batch:
        """The step's batch, from what the slot table says; its slots then stand behind these tokens.

        Args:
            num_decodes: so many sequences, the first, are known on the host to have `width` tokens each.
            max_query: no sequence has more tokens.
        """
        token_ids, positions, lengths, query_starts, block_tables = table.operations.begin_mixed(
            self.slots, self.counts, self.moves, self.starts, self.tokens, table.state
        )
        return Batch(
            token_ids=token_ids,
            positions=positions,
            sequence_of=self.sequence_of,
            block_tables=block_tables,
            lengths=lengths,
            query_starts=query_starts,
            num_decodes=num_decodes,
            width=width,
            max_query=max_query,
            sample_rows=self.sample_rows,
        )

    def computed(self, batch: Batch, hidden: Tensor, tokens: Tensor, counts: Tensor, width: int) -> Computed:
        """What such a step has computed.

        Args:
            batch, hidden: of all its tokens.
            tokens: int64 [R or more], as `sample` gives them.
            counts: int64 [P], tokens that the slots got.
        """
        tokens = tokens ^ (tokens >> 63)
        following = self.following
        if len(tokens):
            following = torch.where(following < 0, tokens[(-1 - following).clamp_(min=0)], following)
        rows = self.sample_rows.view(-1, width)
        last = (counts - 1).clamp_(min=0, max=width - 1)
        return Computed(batch, hidden, following, rows.gather(1, last[:, None])[:, 0])


@dataclass(frozen=True, slots=True)
class Left:
    """What a captured forward and sampling leave to the graph that makes drafts of it."""

    hidden: Tensor  # [T, D]
    positions: Tensor  # int64 [T]
    lengths: Tensor  # int32 [S]
    query_starts: Tensor  # int32 [S + 1]
    block_tables: Tensor  # int32 [S, max_blocks]
    tokens: Tensor  # int64 [R]
    counts: Tensor  # int64 [P]

    @classmethod
    def of(cls, shape: MixedShape, table: SlotTable, hidden: Tensor) -> Left:
        """Zeros, for steps of up to this shape, with as many rows to be sampled as `hidden` has."""
        new, blocks = table.state.position.new_zeros, table.state.block_table
        return cls(
            hidden=hidden.new_zeros(shape.num_tokens, hidden.shape[1]),
            positions=new(shape.num_tokens),
            lengths=new(shape.num_sequences, dtype=torch.int32),
            query_starts=new(shape.num_sequences + 1, dtype=torch.int32),
            block_tables=blocks.new_zeros(shape.num_sequences, blocks.shape[1]),
            tokens=new(len(hidden)),
            counts=new(shape.num_places),
        )

    def keep(self, batch: Batch, hidden: Tensor) -> None:
        """Of a forward."""
        self.hidden[: len(hidden)].copy_(hidden)
        for name in ("positions", "lengths", "query_starts", "block_tables"):
            values: Tensor = getattr(batch, name)
            getattr(self, name)[: len(values)].copy_(values)

    def batch(self, inputs: MixedInputs, size: int) -> tuple[Batch, Tensor]:
        """What was kept of a step of `size` tokens: its batch, and hidden [T, D]."""
        count = len(inputs.slots)
        batch = Batch(
            token_ids=inputs.tokens,
            positions=self.positions[:size],
            sequence_of=inputs.sequence_of,
            block_tables=self.block_tables[:count],
            lengths=self.lengths[:count],
            query_starts=self.query_starts[: count + 1],
            num_decodes=0,
            max_query=size,
        )
        return batch, self.hidden[:size]


_A = TypeVar("_A")


@dataclass(frozen=True, slots=True)
class PromptRows(Generic[_A]):
    """The prompt tokens of a step whose logprobs are asked for: those behind a token of a chunk."""

    before: _A  # int64 [n], the rows of the tokens before them, among those of the step
    tokens: _A  # int64 [n]
    count: int

    @classmethod
    def of(
        cls,
        first: int,
        chunks: Sequence[Chunk],
        prompts: Mapping[int, NDArray[np.int32]],
        told: Mapping[int, int],
    ) -> PromptRows[NDArray[np.int64]]:
        """Those of a step.

        Args:
            first: tokens of decoding slots, which come first.
            chunks: as `pack`.
            prompts: by slot, all tokens of those that have chunks.
            told: the length of the prompt, of slots of which it is asked.
        """
        before, tokens = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for chunk in chunks:
            if chunk.slot in told:
                following = prompts[chunk.slot][chunk.start + 1 : told[chunk.slot]][: chunk.length]
                before.append(np.arange(first, first + len(following)))
                tokens.append(following.astype(np.int64))
            first += chunk.length
        rows = np.concatenate(before)
        return PromptRows(rows, np.concatenate(tokens), len(rows))


def pack(
    decode: Sequence[int],
    chunks: Sequence[Chunk],
    prompts: Mapping[int, NDArray[np.int32]],
    shape: MixedShape,
    null_slot: int,
    width: int = 1,
) -> NDArray[np.int64]:
    """A step's `MixedInputs`, one behind the other.

    Args:
        decode: slots with `width` tokens each.
        chunks: behind them, in this order.
        prompts: by slot, all tokens of those that have chunks.
        shape: with room for all that.
    """
    num_decodes, num_sequences = len(decode), len(decode) + len(chunks)
    sections = shape.sections
    ends = list(accumulate(sections))
    packed = np.empty(ends[-1], np.int64)
    fields = (packed[end - length : end] for length, end in zip(sections, ends, strict=True))
    sampled_slots, sample_rows, tokens, sequence_of, following, slots, counts, moves, starts = fields

    slots[:num_sequences] = [*decode, *(chunk.slot for chunk in chunks)]
    slots[num_sequences:] = null_slot
    counts[:num_decodes] = width
    counts[num_decodes:num_sequences] = [chunk.length for chunk in chunks]
    counts[num_sequences:] = 0
    moves[:] = 0
    moves[num_decodes:num_sequences] = [chunk.length - chunk.sample for chunk in chunks]
    starts[0] = 0
    counts.cumsum(out=starts[1:])
    num_tokens = int(starts[-1])
    starts[-1] = shape.num_tokens

    sequence_of[:num_tokens] = np.arange(num_sequences).repeat(counts[:num_sequences])
    sequence_of[num_tokens:] = shape.num_sequences - 1
    tokens[: num_decodes * width] = np.tile(np.arange(-1, -1 - width, -1), num_decodes)
    for chunk, start in zip(chunks, starts[num_decodes:].tolist(), strict=False):
        tokens[start : start + chunk.length] = prompts[chunk.slot][chunk.start : chunk.start + chunk.length]
    tokens[num_tokens:] = 0
    if shape.has_following:
        following[:] = 0
        _put_following(following, num_decodes, chunks, prompts, width)

    sampled = [*range(num_decodes), *(i for i, chunk in enumerate(chunks, num_decodes) if chunk.sample)]
    sampled_slots[: len(sampled)] = slots[sampled]
    sampled_slots[len(sampled) :] = null_slot
    rows = starts[:-1][sampled, None] + np.minimum(np.arange(width), counts[sampled, None] - 1)
    rows[num_decodes:] = (starts[:-1] + counts - 1)[sampled[num_decodes:], None]
    sample_rows[: rows.size] = rows.flat
    sample_rows[rows.size :] = shape.num_tokens - 1
    return packed


def _put_following(
    following: NDArray[np.int64],
    num_decodes: int,
    chunks: Sequence[Chunk],
    prompts: Mapping[int, NDArray[np.int32]],
    width: int,
) -> None:
    """The token behind each, where the host knows it, or which of the sampled rows will tell it."""
    first = num_decodes * width
    following[:first] = -1 - np.arange(first)
    row = first
    for chunk in chunks:
        end = first + chunk.length
        known = prompts[chunk.slot][chunk.start + 1 : chunk.start + chunk.length + 1]
        following[first : first + len(known)] = known
        if chunk.sample:
            following[end - 1] = -1 - row
            row += width
        first = end
