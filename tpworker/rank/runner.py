"""One forward: a plan becomes work on the compute stream. Nothing here waits for the device.

    launch thread                     compute stream, in plan order
    ─────────────                     ──────────────────────────────────────────────────────────────
    stage deltas, chunk tokens  ───►  apply deltas to the slot table, once they are uploaded
    record the step's events          inputs from the slot table and staging (mixed.py)
                                      forward, sample
                                      slot table and a row of the token ring are written

A plan without chunks is a decode step: it reads device state alone, and is a graph replay where there are
graphs (graphs.py). So are steps with chunks, up to a size: their staged input is copied to where the graph
reads it.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Admission, BatchPlan, Chunk, Sampling
from tpworker.model.attention import PagedAttention
from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder
from tpworker.model.kv_cache import KVCache
from tpworker.model.sampling import SamplingMode, sample
from tpworker.model.tp import Collectives
from tpworker.rank.device import Device, Event
from tpworker.rank.graphs import GREEDY, MODES, MOST_TOKENS, RowGraphs, TokenGraphs, ladder, token_ladder
from tpworker.rank.mixed import MixedInputs, MixedShape, pack
from tpworker.rank.slots import SlotDeltas, SlotTable
from tpworker.rank.staging import StagedArray, StagingBuffer, StagingPool

logger = logging.getLogger(__name__)

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
    ring_row: Tensor  # int64 [1 + num_sampled]: the step's number, its tokens as `sample` gives them
    started: Event
    done: Event
    launched_ns: int
    staging: StagingBuffer


@dataclass(frozen=True, slots=True)
class _Mixed:
    """The input of a step with chunks, staged."""

    packed: StagedArray  # int64, see mixed.py
    shape: MixedShape
    longest: int  # tokens of one chunk
    size: int | None  # of the graph that it is padded for


@dataclass(frozen=True, slots=True)
class _Step:
    """Everything that the compute stream needs to know of one step."""

    number: int
    staging: StagingBuffer
    deltas: SlotDeltas
    decode_slots: StagedArray | None  # int64 [num_slots], filled up with the null slot, where it has changed
    num_decodes: int
    num_sampled: int
    mixed: _Mixed | None
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
        most = MixedShape.padded(MOST_TOKENS, slots.num_slots)
        self._mixed_inputs = torch.full((sum(most.sections),), slots.num_slots, device=device.torch_device)
        self._hidden = decoder.weights.embed.new_zeros(slots.num_slots, decoder.spec.hidden_size)
        self._graphs = RowGraphs(slots.num_slots)
        self._forwards = TokenGraphs()
        self._samplings = RowGraphs(slots.num_slots)
        self._prompts: dict[int, NDArray[np.int32]] = {}
        self._decode: list[int] = []
        self._decode_mode = SamplingMode(False, False, False)

    # ------------------------------------------------------------------------------- beforehand

    def prepare(self, max_tokens: int, capturing: Callable[[], None] = lambda: None) -> None:
        """Runs every kind of step once, and captures what can be. Before the first plan; waits.

        A kernel's first use takes milliseconds, some hundreds of them, and a capture needs kernels that are
        loaded. All of it happens in the null slot.

        Args:
            max_tokens: of a step.
            capturing: called when most kernels are loaded.
        """
        width = self._slots.block_table.shape[1]
        length = min(max_tokens, max(1, (width - 1) * self._cache.block_size))  # of one sequence
        if not self._check_agreement:  # which looks at values
            self._device.compile_ahead(partial(self._rehearse, max_tokens))
        self._run_once(length)
        capturing()
        if not self._check_agreement:  # which looks at values
            self._capture(max_tokens)
        while (length := length // 2) and self._forwards.size_for(length) is None:
            self._run_once(length)
        self._device.compute.run(self._begin)
        self._device.synchronize()

    def _run_once(self, length: int) -> None:
        """A step with a chunk of this length, for each kind of sampling."""
        null = self._slots.num_slots
        for sampling in _WARM_UP:
            admission = Admission(null, pack_int32([0] * length), length, 0, pack_int32([0]), sampling)
            chunk = Chunk(null, 0, length, True)
            launched = self.launch(BatchPlan(0, 0, admitted=(admission,), chunks=(chunk,), decode=b""))
            launched.done.synchronize()
            self.staging.give_back(launched.staging)

    def _rehearse(self, max_tokens: int) -> None:
        """Launches every kernel that captured steps will. Those that take longest to compile come first."""
        mixed, decode = self._can_capture()
        brief = copy.copy(self)
        brief._decoder = self._decoder.excerpt()
        for size in ladder(self._slots.num_slots):
            if decode:
                brief._decode_step(size, GREEDY)
            for mode in MODES:
                brief._sample_padded(size, mode)
        for size in token_ladder(max_tokens) if mixed else ():
            brief._forward_padded(size)

    def _can_capture(self) -> tuple[bool, bool]:
        """Whether steps with chunks can be captured, and whether decode steps can."""
        attention, captures = self._decoder.attention, self._device.captures
        mixed = not (captures and attention.reads_lengths)
        return mixed, not (captures and isinstance(attention, PagedAttention))

    def _capture(self, max_tokens: int) -> None:
        mixed, decode = self._can_capture()
        started = time.monotonic()
        self._device.compute.run(self._begin)
        if mixed:
            self._forwards.capture(self._device, max_tokens, self._put_padding, self._forward_padded)
            self._samplings.capture(self._device, self._sample_padded)
        after_mixed = time.monotonic()
        if decode:
            self._graphs.capture(self._device, self._decode_step)
        seconds = (after_mixed - started, time.monotonic() - after_mixed)
        logger.info("captured mixed steps in %.1f s, decode steps in %.1f s", *seconds)

    def _put_padding(self, size: int) -> None:
        """The input of a mixed step that has nothing but padding."""
        shape = MixedShape.padded(size, self._slots.num_slots)
        packed = torch.from_numpy(pack((), (), {}, shape, self._slots.num_slots))

        def copy() -> None:
            self._mixed_inputs[: len(packed)].copy_(packed)

        self._device.compute.run(copy)

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
            self._stage_mixed(plan, staging) if plan.chunks else None,
            self._slots.sampling_mode(self._decode + sampled) if sampled else self._decode_mode,
        )

    def _stage_mixed(self, plan: BatchPlan, staging: StagingBuffer) -> _Mixed:
        shape = MixedShape.exact(len(self._decode), plan.chunks)
        size = self._forwards.size_for(shape.num_tokens)
        if size is not None:
            shape = MixedShape.padded(size, self._slots.num_slots)
        packed = pack(self._decode, plan.chunks, self._prompts, shape, self._slots.num_slots)
        for chunk in plan.chunks:
            if chunk.sample:  # the prompt is on the device now
                del self._prompts[chunk.slot]
        return _Mixed(staging.put(packed), shape, max(chunk.length for chunk in plan.chunks), size)

    # -------------------------------------------------------------------------- compute stream

    def _run(self, step: _Step) -> None:
        self._slots.apply(step.deltas)
        if step.decode_slots is not None:
            self._batch_slots.copy_(step.decode_slots.get())
        if step.mixed is not None:
            self._mixed_step(step, step.mixed)
        elif (replay := self._graphs.find(step.num_decodes, step.mode)) is not None:
            replay()
        else:
            self._decode_step(step.num_decodes, step.mode)

    def _decode_step(self, count: int, mode: SamplingMode) -> None:
        """Decodes the first `count` slots of the batch, of which the last ones may be the null slot."""
        table = self._slots
        slots = self._batch_slots[:count]
        token_ids, positions, lengths, block_tables = table.begin_decode(slots)
        batch = Batch(
            token_ids=token_ids,
            positions=positions,
            sequence_of=self._rows[:count],
            block_tables=block_tables,
            lengths=lengths,
            query_starts=self._starts[: count + 1],
            num_decodes=count,
            max_query=1,
            sample_rows=None,
        )
        self._sample_step(slots, self._decoder.forward(batch, self._cache), mode)

    def _mixed_step(self, step: _Step, mixed: _Mixed) -> None:
        packed = mixed.packed.get()
        if mixed.size is None:
            inputs = MixedInputs.of(packed, mixed.shape)
            batch = inputs.begin(self._slots, step.num_decodes, mixed.longest)
            self._sample_step(inputs.sampled_slots, self._decoder.forward(batch, self._cache), step.mode)
            return
        self._mixed_inputs[: len(packed)].copy_(packed)
        self._forwards.replay(mixed.size)
        if not step.num_sampled:  # chunks in the middle of their prompts
            self._sample_padded(0, step.mode)
        elif (replay := self._samplings.find(step.num_sampled, step.mode)) is not None:
            replay()

    def _forward_padded(self, size: int) -> None:
        """The forward of what is in `_mixed_inputs`; leaves hidden states of the rows to sample."""
        inputs = MixedInputs.of(self._mixed_inputs, MixedShape.padded(size, self._slots.num_slots))
        hidden = self._decoder.forward(inputs.begin(self._slots, 0, size), self._cache)
        self._hidden[: len(hidden)].copy_(hidden)

    def _sample_padded(self, count: int, mode: SamplingMode) -> None:
        """Samples from what `_forward_padded` has left, for the first `count` slots of its input."""
        self._sample_step(self._mixed_inputs[:count], self._hidden[:count], mode)

    def _sample_step(self, slots: Tensor, hidden: Tensor, mode: SamplingMode) -> None:
        """The end of a step: tokens for where the slots stand now, and the ring's row."""
        tokens = slots.new_empty(0)
        if len(slots):  # if not: chunks in the middle of their prompts
            tokens = self._sample(hidden, slots, mode)
        self._slots.finish_step(slots, tokens, self._counter, self._ring)

    def _sample(self, hidden: Tensor, slots: Tensor, mode: SamplingMode) -> Tensor:
        """The next token of each row: hidden [R, hidden_size] and slots int64 [R] -> int64 [R]."""
        logits = self._decoder.logits(hidden)
        rows = self._slots.sampling_rows(slots, mode)
        decoder = self._decoder
        tokens = sample(decoder.operations, logits, rows, mode, decoder.vocab_start, self._collectives)
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
                f"step {int(self._counter) + 1}: {what} of ranks {different} are not, bit by bit, rank 0's"
            )
