"""The slot table: the state of every running request, on the device, one row a slot.

A steady decode step reads its inputs here and writes its results back, so it needs nothing from the host.
What the host has to say (a slot admitted, blocks granted) is staged as deltas and applied on the compute
stream, in plan order: after every earlier step has read the row and before any later one does.

The last row is the null slot: padding rows of a batch point to it, and its blocks are the null block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.messages import NO_LOGPROBS, Admission, Grant, Sampling
from tpworker.kernels.operands import HostMasks, SamplingRows, SlotState
from tpworker.model.operations import operations_of
from tpworker.model.sampling import SamplingMode
from tpworker.rank.logit_state import LogitState, RuleDeltas
from tpworker.rank.staging import StagedArray, StagingBuffer

MAX_STOP_IDS = 16
_POSITION, _TOP_K, _SEED, _MIN_LENGTH, _END, _MOST_DRAFTS, _STOP_IDS = range(7)
# Columns of the integers of an admission; more stop ids follow.


@dataclass(frozen=True, slots=True)
class SlotDeltas:
    """What a plan changes in the slot table, staged. None: nothing of that kind."""

    slots: StagedArray | None = None  # int64 [A]
    integers: StagedArray | None = None  # int64 [A, 6 + MAX_STOP_IDS]
    floats: StagedArray | None = None  # float32 [A, 3]: temperature, top_p, log of min_p
    block_places: StagedArray | None = None  # int64 [B]: slot * width + entry
    blocks: StagedArray | None = None  # int32 [B]
    rules: RuleDeltas | None = None
    histories: tuple[tuple[int, StagedArray], ...] = ()  # of slots: int32 [n], their first tokens


class SlotTable:
    """Rows of device state.

    Args:
        num_slots: rows, without the null slot.
        max_blocks: width of the block table.
        device: where the tensors live.
        vocab: this rank's part of the vocabulary: its first token, and how many.
        masks: of guided slots; None: there are none.
        num_drafts: most that a slot has.
        history: tokens that are remembered of each sequence; 0: nobody looks them up.
    """

    def __init__(
        self,
        num_slots: int,
        max_blocks: int,
        device: torch.device,
        vocab: tuple[int, int] = (0, 0),
        masks: HostMasks | None = None,
        num_drafts: int = 0,
        history: int = 0,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_slots + 1, *shape, dtype=dtype, device=device)

        self.num_slots = num_slots
        self.operations = operations_of(device)
        self._integers = zeros(_STOP_IDS + MAX_STOP_IDS)
        self._floats = zeros(3, dtype=torch.float32)
        # What an admission sets are columns of two tables: two writes, not eight.
        self.state = SlotState(
            last_token=zeros(),
            position=zeros(),
            end=self._integers[:, _END],
            most_drafts=self._integers[:, _MOST_DRAFTS],
            drafts=zeros(num_drafts).fill_(-1),
            history=zeros(history, dtype=torch.int32),
            block_table=zeros(max_blocks, dtype=torch.int32),
        )
        self.temperature, self.top_p, self.log_min_p = self._floats.unbind(1)
        self.top_k = self._integers[:, _TOP_K]
        self.seed = self._integers[:, _SEED]
        self.min_length = self._integers[:, _MIN_LENGTH]
        """int64: stop ids are suppressed for tokens at positions below it."""
        self.stop_ids = self._integers[:, _STOP_IDS:].fill_(-1)
        """int64 [num_slots + 1, MAX_STOP_IDS], filled up with -1."""
        self._needs = np.zeros(
            (num_slots + 1, len(fields(SamplingMode))), np.bool_
        )  # on the host: fields of `SamplingMode`
        self.rules = LogitState(num_slots, *vocab, device)
        self.masks = masks
        self._places = torch.arange(2 + num_drafts, device=device)

    def stage(
        self, admitted: Sequence[Admission], grants: Sequence[Grant], staging: StagingBuffer
    ) -> SlotDeltas:
        """Puts a plan's deltas into its staging buffer (launch thread)."""
        if not admitted and not grants:
            return SlotDeltas()
        blocks = [(admission.slot, 0, admission.blocks) for admission in admitted]
        blocks += [(grant.slot, grant.first, grant.blocks) for grant in grants]
        width = self.state.block_table.shape[1]
        values = [np.frombuffer(packed, np.dtype("<i4")) for _, _, packed in blocks]
        places = [
            np.arange(slot * width + first, slot * width + first + len(entries), dtype=np.int64)
            for (slot, first, _), entries in zip(blocks, values, strict=True)
        ]
        block_places = staging.put(np.concatenate(places))
        block_values = staging.put(np.concatenate(values).astype(np.int32))
        if not admitted:
            return SlotDeltas(block_places=block_places, blocks=block_values)
        samplings = [admission.sampling for admission in admitted]
        rules = self.rules.stage(admitted, staging)
        for admission in admitted:
            self._needs[admission.slot] = _needs(admission)
        return SlotDeltas(
            staging.put(np.array([admission.slot for admission in admitted], np.int64)),
            staging.put(np.stack([self._integers_of(admission) for admission in admitted])),
            staging.put(np.array([_floats(sampling) for sampling in samplings], np.float32)),
            block_places,
            block_values,
            rules,
            self._stage_histories(admitted, staging),
        )

    def _stage_histories(
        self, admitted: Sequence[Admission], staging: StagingBuffer
    ) -> tuple[tuple[int, StagedArray], ...]:
        if not self.state.history.shape[1]:
            return ()
        return tuple(
            (admission.slot, staging.put(np.frombuffer(admission.tokens, np.dtype("<i4")).astype(np.int32)))
            for admission in admitted
            if admission.slot < self.num_slots  # steps beforehand may be longer than any sequence
        )

    def _integers_of(self, admission: Admission) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        sampling, is_real = admission.sampling, admission.slot < self.num_slots
        row = np.full(_STOP_IDS + MAX_STOP_IDS, -1, np.int64)
        row[_POSITION] = admission.num_cached
        row[_TOP_K] = sampling.top_k
        row[_SEED] = sampling.seed
        row[_MIN_LENGTH] = admission.num_prompt + sampling.min_tokens
        row[_END] = admission.max_length
        # A mask is made for one token: what would stand behind a draft, nobody on the host knows.
        row[_MOST_DRAFTS] = self.state.drafts.shape[1] if is_real and not admission.is_guided else 0
        stop_ids = unpack_int32(sampling.stop_ids)
        row[_STOP_IDS : _STOP_IDS + len(stop_ids)] = stop_ids
        return row

    def apply(self, deltas: SlotDeltas) -> None:
        """Writes staged deltas into the table (compute stream)."""
        state = self.state
        if deltas.slots is not None and deltas.integers is not None and deltas.floats is not None:
            slots = deltas.slots.get()
            integers = deltas.integers.get()
            state.position[slots] = integers[:, _POSITION]
            self._integers[slots] = integers
            self._floats[slots] = deltas.floats.get()
            if state.drafts.shape[1]:  # which may be fed beyond what is granted: into the null block
                state.block_table.index_fill_(0, slots, 0)
        if deltas.block_places is not None and deltas.blocks is not None:
            state.block_table.view(-1)[deltas.block_places.get()] = deltas.blocks.get()
        for slot, tokens in deltas.histories:
            known = tokens.get()
            state.history[slot, : len(known)].copy_(known)
        if deltas.rules is not None:
            self.rules.apply(deltas.rules)

    def begin(self) -> None:
        """As if there had been no step."""
        self.state.last_token.zero_()
        self.state.position.zero_()
        self.state.drafts.fill_(-1)

    def sampling_rows(self, slots: Tensor, width: int, mode: SamplingMode) -> SamplingRows:
        """The sampling parameters of W tokens behind each of the slots (int64 [S]): R = S W rows.

        What the mode does not look at is left empty: each is a kernel of its own on a GPU.
        """
        rows_of = slots if width == 1 else slots.repeat_interleave(width)

        def rows(column: Tensor, needed: bool) -> Tensor:
            return column[rows_of] if needed else column[:0]

        def positions() -> Tensor:
            if not (mode.random or mode.suppress or mode.adjust):
                return self.state.position[:0]
            if width == 1:
                return self.state.position[slots] + 1
            return (self.state.position[slots][:, None] + self._places[1 : 1 + width]).flatten()

        return SamplingRows(
            rows(self.temperature, mode.random),
            rows(self.top_p, mode.truncate),
            rows(self.top_k, mode.truncate),
            rows(self.seed, mode.random),
            positions(),
            rows(self.min_length, mode.suppress),
            rows(self.stop_ids, mode.suppress),
            rows(self.log_min_p, mode.truncate),
        )

    def sampling_mode(self, slots: Sequence[int]) -> SamplingMode:
        """What sampling these slots needs, from the host's own record (launch thread)."""
        rows = list(slots)
        return SamplingMode(
            *(bool(self._needs[rows, column].any()) for column in range(self._needs.shape[1]))
        )


def _needs(admission: Admission) -> tuple[bool, ...]:
    """In the order of the fields of `SamplingMode`."""
    sampling, guided = admission.sampling, admission.is_guided
    random = sampling.temperature > 0
    truncate = random and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0)
    suppress = sampling.min_tokens > 0 and bool(sampling.stop_ids)
    adjust = guided or sampling.rules is not None
    return random, truncate, suppress, adjust, sampling.num_logprobs != NO_LOGPROBS, guided


def _floats(sampling: Sampling) -> tuple[float, float, float]:
    return sampling.temperature, sampling.top_p, math.log(sampling.min_p) if sampling.min_p else -math.inf
