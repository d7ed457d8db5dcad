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
from tpworker.kernels.operands import HostMasks, SamplingRows
from tpworker.model.operations import operations_of
from tpworker.model.sampling import SamplingMode
from tpworker.rank.logit_state import LogitState, RuleDeltas
from tpworker.rank.staging import StagedArray, StagingBuffer

MAX_STOP_IDS = 16
_POSITION, _TOP_K, _SEED, _MIN_LENGTH, _STOP_IDS = range(5)  # columns of the integers of an admission


@dataclass(frozen=True, slots=True)
class SlotDeltas:
    """What a plan changes in the slot table, staged. None: nothing of that kind."""

    slots: StagedArray | None = None  # int64 [A]
    integers: StagedArray | None = None  # int64 [A, 4 + MAX_STOP_IDS]
    floats: StagedArray | None = None  # float32 [A, 3]: temperature, top_p, log of min_p
    block_places: StagedArray | None = None  # int64 [B]: slot * width + entry
    blocks: StagedArray | None = None  # int32 [B]
    rules: RuleDeltas | None = None


class SlotTable:
    """Rows of device state.

    Args:
        num_slots: rows, without the null slot.
        max_blocks: width of the block table.
        device: where the tensors live.
        vocab: this rank's part of the vocabulary: its first token, and how many.
        masks: of guided slots; None: there are none.
    """

    def __init__(
        self,
        num_slots: int,
        max_blocks: int,
        device: torch.device,
        vocab: tuple[int, int] = (0, 0),
        masks: HostMasks | None = None,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_slots + 1, *shape, dtype=dtype, device=device)

        self.num_slots = num_slots
        self.operations = operations_of(device)
        self._integers = zeros(_STOP_IDS + MAX_STOP_IDS)
        self._floats = zeros(3, dtype=torch.float32)
        self.last_token = zeros()
        """int64 [num_slots + 1]: the token that the next decode step is fed."""
        self.block_table = zeros(max_blocks, dtype=torch.int32)
        """int32 [num_slots + 1, max_blocks]: entries beyond a slot's length are stale or 0."""
        self.position = zeros()
        """int64: where the last token stands, which is the number of tokens whose KV is computed."""
        # What else an admission sets are columns of two tables: two writes, not six.
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

    def stage(
        self, admitted: Sequence[Admission], grants: Sequence[Grant], staging: StagingBuffer
    ) -> SlotDeltas:
        """Puts a plan's deltas into its staging buffer (launch thread)."""
        if not admitted and not grants:
            return SlotDeltas()
        blocks = [(admission.slot, 0, admission.blocks) for admission in admitted]
        blocks += [(grant.slot, grant.first, grant.blocks) for grant in grants]
        width = self.block_table.shape[1]
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
            staging.put(np.stack([_integers(admission) for admission in admitted])),
            staging.put(np.array([_floats(sampling) for sampling in samplings], np.float32)),
            block_places,
            block_values,
            rules,
        )

    def apply(self, deltas: SlotDeltas) -> None:
        """Writes staged deltas into the table (compute stream)."""
        if deltas.block_places is not None and deltas.blocks is not None:
            self.block_table.view(-1)[deltas.block_places.get()] = deltas.blocks.get()
        if deltas.slots is not None and deltas.integers is not None and deltas.floats is not None:
            slots = deltas.slots.get()
            integers = deltas.integers.get()
            self.position[slots] = integers[:, _POSITION]
            self._integers[slots] = integers
            self._floats[slots] = deltas.floats.get()
        if deltas.rules is not None:
            self.rules.apply(deltas.rules)

    def begin_decode(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Operations.begin_decode`."""
        return self.operations.begin_decode(slots, self.last_token, self.position, self.block_table)

    def finish_step(self, slots: Tensor, tokens: Tensor, counter: Tensor, ring: Tensor) -> None:
        """See `Operations.finish_step`."""
        self.operations.finish_step(slots, tokens, self.last_token, counter, ring)

    def sampling_rows(self, slots: Tensor, mode: SamplingMode) -> SamplingRows:
        """The sampling parameters of slots (int64 [R]), whose tokens will stand where they stand now.

        What the mode does not look at is left empty: each is a kernel of its own on a GPU.
        """

        def rows(column: Tensor, needed: bool) -> Tensor:
            return column[slots] if needed else column[:0]

        return SamplingRows(
            rows(self.temperature, mode.random),
            rows(self.top_p, mode.truncate),
            rows(self.top_k, mode.truncate),
            rows(self.seed, mode.random),
            rows(self.position, mode.random or mode.suppress or mode.adjust),
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


def _integers(admission: Admission) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    sampling = admission.sampling
    row = np.full(_STOP_IDS + MAX_STOP_IDS, -1, np.int64)
    row[_POSITION] = admission.num_cached
    row[_TOP_K] = sampling.top_k
    row[_SEED] = sampling.seed
    row[_MIN_LENGTH] = admission.num_prompt + sampling.min_tokens
    stop_ids = unpack_int32(sampling.stop_ids)
    row[_STOP_IDS : _STOP_IDS + len(stop_ids)] = stop_ids
    return row
