"""One forward: a plan becomes work on the compute stream. Nothing here waits for the device.

    launch thread                     compute stream, in plan order
    ─────────────                     ──────────────────────────────────────────────────────────────
    stage deltas, chunk tokens  ───►  apply deltas to the slot table, once they are uploaded
    record the step's events          inputs from the slot table (decode) and staging (chunks)
                                      forward, sample
                                      slot table and a row of the token ring are written

A plan without chunks is a decode step: it reads device state alone, and is a graph replay where there are
graphs (graphs.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpworker.ipc.messages import Admission, BatchPlan, Chunk, Sampling, pack_int32
from tpworker.model.attention import PagedAttention
from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder
from tpworker.model.kv_cache import KVCache
from tpworker.model.sampling import SamplingMode, sample
from tpworker.model.tp import Collectives
from tpworker.rank.device import Device, Event
from tpworker.rank.graphs import DecodeGraphs
from tpworker.rank.slots import SlotDeltas, SlotTable
from tpworker.rank.staging import StagedArray, StagingBuffer, StagingPool

_WARM_UP = (
    Sampling(1.0, 0.9, 5, 0, 1, 1, pack_int32([0])),  # truncated, and stop ids suppressed
    Sampling(1.0, 1.0, 0, 0, 1, 0, b""),
    Sampling(0.0, 1.0, 0, 0, 1, 0, b""),  # greedy comes last: the null slot stays so
)


class RanksDisagree(RuntimeError):
    """Debug mode: the ranks computed something differently that they must compute alike."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way."""

    step: int
    num_sampled: int
    ring_row: Tensor  # int64 [1 + num_sampled]: the step's number, its tokens
    started: Event
    done: Event
    launched_ns: int
    staging: StagingBuffer


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The prefill part of a step: C chunks with P tokens in all, K of which end their prompt; staged."""

    tokens: StagedArray  # int64 [P]
    positions: StagedArray  # int64 [P]
    sequence_of: StagedArray  # int64 [P], rows of the batch's block tables
    slots: StagedArray  # int64 [C]
    lengths: StagedArray  # int64 [C]: context, this chunk included
    query_starts: StagedArray  # int32 [S + 1], of the whole batch
    sample_rows: StagedArray  # int64 [D + K], of the whole batch
    sampled_slots: StagedArray  # int64 [K]
    sampled_positions: StagedArray  # int64 [K]
    longest: int


@dataclass(frozen=True, slots=True)
class _Step:
    """Everything that the compute stream needs to know of one step."""

    number: int
    staging: StagingBuffer
    deltas: SlotDeltas
    decode_slots: StagedArray | None  # int64 [num_slots], filled up with the null slot, where it has changed
    num_decodes: int
    num_sampled: int
    chunks: _Chunks | None
    mode: SamplingMode


class Runner:
    """Launches steps.

    Args:
        decoder: this rank's shard of the model.
        cache: its KV blocks.
        slots: the slot table.
        device: where both live.
        collectives: for sampling, and for the debug mode.
        ring_rows: rows of the token ring, at least lookahead + 2.
        check_agreement: debug mode: after every step, compare hidden states and tokens of all ranks.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        slots: SlotTable,
        device: Device,
        collectives: Collectives,
        ring_rows: int,
        check_agreement: bool = False,
    ) -> None:
        self.staging = StagingPool(device, ring_rows)
        self._decoder = decoder
        self._cache = cache
        self._slots = slots
        self._device = device
        self._collectives = collectives
        self._check_agreement = check_agreement
        self._ring = torch.full((ring_rows, 1 + slots.num_slots), -1, device=device.torch_device)
        self._ring_rows = self._ring.unbind(0)  # a step takes one: 4 µs less than by indexing
        self._counter = torch.full((1,), -1, device=device.torch_device)  # number of the step that runs
        self._batch_slots = torch.full((slots.num_slots,), slots.num_slots, device=device.torch_device)
        self._rows = torch.arange(slots.num_slots + 1, device=device.torch_device)
        self._starts = self._rows.int()
        self._graphs = DecodeGraphs(slots.num_slots)
        self._prompts: dict[int, NDArray[np.int32]] = {}
        self._decode: list[int] = []
        self._decode_mode = SamplingMode(False, False, False)

    # ------------------------------------------------------------------------------- beforehand

    def prepare(self, max_tokens: int) -> None:
        """Runs every kind of step once, and captures the decode steps. Before the first plan; waits.

        A kernel's first use takes milliseconds, some hundreds of them, and a capture needs kernels that are
        loaded. All of it happens in the null slot.

        Args:
            max_tokens: of a step, and of one sequence.
        """
        null = self._slots.num_slots
        length = max_tokens
        while length:
            for sampling in _WARM_UP:
                admission = Admission(null, pack_int32([0] * length), length, 0, pack_int32([0]), sampling)
                chunk = Chunk(null, 0, length, True)
                launched = self.launch(BatchPlan(0, 0, admitted=(admission,), chunks=(chunk,), decode=b""))
                launched.done.synchronize()
                self.staging.give_back(launched.staging)
            length //= 2
        # The debug mode looks at values, and so does the reference attention at lengths.
        looks = self._check_agreement or (
            self._device.captures and isinstance(self._decoder.attention, PagedAttention)
        )
        if not looks:
            self._graphs.capture(self._device, self._decode_step)
        self._device.compute.run(self._begin)
        self._device.synchronize()

    def _begin(self) -> None:
        """As if there had been no step."""
        self._counter.fill_(-1)
        self._ring.fill_(-1)
        self._slots.last_token.zero_()
        self._slots.position.zero_()

    # --------------------------------------------------------------------------- launch thread

    def launch(self, plan: BatchPlan) -> Launched:
        """Queues a step on the compute stream and returns at once."""
        step = self._stage(plan)
        ring_row = self._ring_rows[plan.step % len(self._ring_rows)][: 1 + step.num_sampled]
        compute, uploads = self._device.compute, self._device.uploads
        launched_ns = time.monotonic_ns()
        if not step.staging.is_empty:
            uploads.run(step.staging.send)
            compute.wait(uploads.record())
        started = compute.record_start()
        compute.run(lambda: self._run(step))
        return Launched(
            plan.step, step.num_sampled, ring_row, started, compute.record(), launched_ns, step.staging
        )

    def _stage(self, plan: BatchPlan) -> _Step:
        staging = self.staging.take()
        deltas = self._slots.stage(plan.admitted, plan.grants, staging)
        for slot in plan.released:
            self._prompts.pop(slot, None)
        for admission in plan.admitted:
            self._prompts[admission.slot] = np.frombuffer(admission.tokens, np.dtype("<i4"))
        decode_slots = None
        if plan.decode is not None:
            decode = np.frombuffer(plan.decode, np.dtype("<i4")).astype(np.int64)
            self._decode = decode.tolist()
            padded = np.full(self._slots.num_slots, self._slots.num_slots, np.int64)
            padded[: len(decode)] = decode
            decode_slots = staging.put(padded)
        if plan.decode is not None or plan.admitted:
            self._decode_mode = self._slots.sampling_mode(self._decode)
        sampled = [chunk.slot for chunk in plan.chunks if chunk.sample]
        return _Step(
            plan.step,
            staging,
            deltas,
            decode_slots,
            len(self._decode),
            len(self._decode) + len(sampled),
            self._stage_chunks(plan, staging) if plan.chunks else None,
            self._slots.sampling_mode(self._decode + sampled) if sampled else self._decode_mode,
        )

    def _stage_chunks(self, plan: BatchPlan, staging: StagingBuffer) -> _Chunks:
        chunks = plan.chunks
        num_decodes = len(self._decode)
        lengths = np.array([chunk.length for chunk in chunks], np.int64)
        ends = np.array([chunk.start + chunk.length for chunk in chunks], np.int64)
        slots = np.array([chunk.slot for chunk in chunks], np.int64)
        samples = np.array([chunk.sample for chunk in chunks], np.bool_)
        tokens = [self._prompts[chunk.slot][chunk.start : chunk.start + chunk.length] for chunk in chunks]
        positions = [np.arange(chunk.start, chunk.start + chunk.length) for chunk in chunks]
        row_ends = num_decodes + np.cumsum(lengths)
        for chunk in chunks:
            if chunk.sample:  # the prompt is on the device now
                del self._prompts[chunk.slot]
        return _Chunks(
            staging.put(np.concatenate(tokens).astype(np.int64)),
            staging.put(np.concatenate(positions).astype(np.int64)),
            staging.put(np.repeat(np.arange(len(chunks), dtype=np.int64) + num_decodes, lengths)),
            staging.put(slots),
            staging.put(ends),
            staging.put(np.concatenate([np.arange(num_decodes + 1), row_ends]).astype(np.int32)),
            staging.put(np.concatenate([np.arange(num_decodes), row_ends[samples] - 1])),
            staging.put(slots[samples]),
            staging.put(ends[samples]),
            int(lengths.max()),
        )

    # -------------------------------------------------------------------------- compute stream

    def _run(self, step: _Step) -> None:
        self._slots.apply(step.deltas)
        if step.decode_slots is not None:
            self._batch_slots.copy_(step.decode_slots.get())
        if step.chunks is not None:
            self._mixed_step(step, step.chunks)
        elif (replay := self._graphs.find(step.num_decodes, step.mode)) is not None:
            replay()
        else:
            self._decode_step(step.num_decodes, step.mode)

    def _decode_step(self, count: int, mode: SamplingMode) -> None:
        """Decodes the first `count` slots of the batch, of which the last ones may be the null slot."""
        self._counter += 1
        table = self._slots
        slots = self._batch_slots[:count]
        positions = table.position[slots]
        batch = Batch(
            token_ids=table.last_token[slots],
            positions=positions,
            sequence_of=self._rows[:count],
            block_tables=table.block_table[slots],
            lengths=(positions + 1).int(),
            query_starts=self._starts[: count + 1],
            num_decodes=count,
            max_query=1,
            sample_rows=None,
        )
        tokens = self._sample(self._decoder.forward(batch, self._cache), slots, positions + 1, mode)
        table.last_token[slots] = tokens
        table.position[slots] = positions + 1
        table.position[-1:].zero_()  # padding rows stay where they are
        self._write_ring(tokens)

    def _mixed_step(self, step: _Step, chunks: _Chunks) -> None:
        self._counter += 1
        table = self._slots
        decode_slots = self._batch_slots[: step.num_decodes]
        decode_positions = table.position[decode_slots]
        chunk_slots, chunk_lengths = chunks.slots.get(), chunks.lengths.get()
        batch = Batch(
            token_ids=torch.cat([table.last_token[decode_slots], chunks.tokens.get()]),
            positions=torch.cat([decode_positions, chunks.positions.get()]),
            sequence_of=torch.cat([self._rows[: step.num_decodes], chunks.sequence_of.get()]),
            block_tables=table.block_table[torch.cat([decode_slots, chunk_slots])],
            lengths=torch.cat([decode_positions + 1, chunk_lengths]).int(),
            query_starts=chunks.query_starts.get(),
            num_decodes=step.num_decodes,
            max_query=chunks.longest,
            sample_rows=chunks.sample_rows.get(),
        )
        hidden = self._decoder.forward(batch, self._cache)
        table.position[chunk_slots] = chunk_lengths
        table.position[decode_slots] = decode_positions + 1
        if not step.num_sampled:  # chunks in the middle of their prompts
            self._write_ring(hidden.new_empty(0, dtype=torch.int64))
            return
        slots = torch.cat([decode_slots, chunks.sampled_slots.get()])
        positions = torch.cat([decode_positions + 1, chunks.sampled_positions.get()])
        tokens = self._sample(hidden, slots, positions, step.mode)
        table.last_token[slots] = tokens
        self._write_ring(tokens)

    def _write_ring(self, tokens: Tensor) -> None:
        """The step's number and tokens (int64 [R]) into its row, which device state alone decides."""
        row = torch.cat([self._counter, tokens]).unsqueeze(0)
        self._ring[:, : row.shape[1]].index_copy_(0, self._counter % len(self._ring), row)

    def _sample(self, hidden: Tensor, slots: Tensor, positions: Tensor, mode: SamplingMode) -> Tensor:
        """The next token of each row: hidden [R, hidden_size], slots and positions int64 [R] -> int64 [R]."""
        logits = self._decoder.logits(hidden)
        rows = self._slots.sampling_rows(slots, positions, mode)
        tokens = sample(logits, rows, mode, self._decoder.vocab_start, self._collectives)
        if self._check_agreement:
            self._compare_ranks("hidden states", hidden)
            self._compare_ranks("sampled tokens", tokens)
        return tokens

    def _compare_ranks(self, what: str, values: Tensor) -> None:
        """Raises RanksDisagree unless every rank has the same bits (which it looks at: no CUDA graph)."""
        everybody = self._collectives.all_gather(values.contiguous().view(torch.uint8).view(-1))
        different = [rank for rank, bits in enumerate(everybody) if not torch.equal(bits, everybody[0])]
        if different:
            raise RanksDisagree(
                f"step {int(self._counter)}: {what} of ranks {different} are not, bit by bit, rank 0's"
            )
