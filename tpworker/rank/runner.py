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
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.drafting import draft_choices
from tpworker.ipc.messages import NO_LOGPROBS, Admission, BatchPlan, Chunk, LogitRules, Sampling
from tpworker.model.attention import PagedAttention
from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder
from tpworker.model.kv_cache import KVCache
from tpworker.model.sampling import SamplingMode
from tpworker.model.tp import Collectives
from tpworker.rank.device import Device, Event
from tpworker.rank.drafter import Drafter
from tpworker.rank.graphs import GREEDY, MOST_TOKENS, SlotGraphs, TokenGraphs, token_ladder
from tpworker.rank.mixed import MixedInputs, MixedShape, PromptRows, pack
from tpworker.rank.sampler import Sampler
from tpworker.rank.slots import SlotDeltas, SlotTable
from tpworker.rank.staging import StagedArray, StagingBuffer, StagingPool

logger = logging.getLogger(__name__)

_ALL_RULES = LogitRules(1.1, 0.1, 0.1, pack_int32([1]), struct.pack("<f", 1.0), None, (pack_int32([0, 1]),))
_WARM_UP = (
    Sampling(1.0, 0.9, 5, 0, 1, 1, pack_int32([0]), 0.1, _ALL_RULES, 5),
    Sampling(1.0, 0.9, 5, 0, 1, 1, pack_int32([0])),  # truncated, and stop ids suppressed
    Sampling(1.0, 1.0, 0, 0, 1, 0, b""),
    Sampling(0.0, 1.0, 0, 0, 1, 0, b""),  # greedy comes last: the null slot stays so
)


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way."""

    step: int
    num_sampled: int  # slots
    ring_row: Tensor  # int64 [n], see `Operations.finish_step`
    started: Event
    done: Event
    launched_ns: int
    staging: StagingBuffer
    width: int = 1  # rows of each slot
    logprobs: Tensor | None = None  # float32 [num_sampled * width, LOGPROB_ROW]; None: nobody asks for them
    prompt_logprobs: Tensor | None = None  # float32 [n, LOGPROB_ROW]


@dataclass(frozen=True, slots=True)
class _Mixed:
    """The input of a step with chunks, staged."""

    packed: StagedArray  # int64, see mixed.py
    shape: MixedShape
    longest: int  # tokens of one chunk
    size: int | None  # of the graph that it is padded for
    prompt_rows: PromptRows[StagedArray] | None  # whose logprobs are asked for


@dataclass(frozen=True, slots=True)
class _Step:
    """Everything that the compute stream needs to know of one step."""

    number: int
    staging: StagingBuffer
    deltas: SlotDeltas
    decode_slots: StagedArray | None  # int64 [num_slots], filled up with the null slot, where it has changed
    num_decodes: int
    num_sampled: int
    num_drafts: int
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
        max_tokens: of a step.
        drafter: makes drafts; None: there are none.
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
        max_tokens: int = MOST_TOKENS,
        drafter: Drafter | None = None,
    ) -> None:
        self.sampler = Sampler(decoder, slots, collectives, ring_rows, max_tokens, check_agreement)
        self.staging = StagingPool(device, ring_rows)
        self._decoder = decoder
        self._cache = cache
        self._slots = slots
        self._device = device
        self._drafter = drafter
        self._num_drafts = slots.state.drafts.shape[1]  # of a slot, at most
        choices = draft_choices(self._num_drafts)
        self._batch_slots = torch.full((slots.num_slots,), slots.num_slots, device=device.torch_device)
        rows = torch.arange(slots.num_slots + 1, device=device.torch_device)
        # By the tokens that each sequence has: which sequence a row is of, and where each begins.
        self._sequence_of = {1 + drafts: rows.repeat_interleave(1 + drafts) for drafts in choices}
        self._starts = {1 + drafts: (rows * (1 + drafts)).int() for drafts in choices}
        most = self._padded(MOST_TOKENS)
        self._mixed_inputs = torch.full((sum(most.sections),), slots.num_slots, device=device.torch_device)
        self._hidden = decoder.weights.embed.new_zeros(self.sampler.most_rows, decoder.spec.hidden_size)
        self._graphs = SlotGraphs(slots.num_slots, choices)
        self._forwards = TokenGraphs()
        self._samplings = SlotGraphs(slots.num_slots, choices)
        self._prompts: dict[int, NDArray[np.int32]] = {}
        self._told_prompts: dict[int, int] = {}  # of slots whose prompts' logprobs are asked for: the length
        self._decode: list[int] = []
        self._decode_mode = SamplingMode(False, False, False)

    def _padded(self, num_tokens: int) -> MixedShape:
        return MixedShape.padded(num_tokens, self._slots.num_slots, self._num_drafts)

    # ------------------------------------------------------------------------------- beforehand

    def prepare(self, max_tokens: int, capturing: Callable[[], None] = lambda: None) -> None:
        """Runs every kind of step once, and captures what can be. Before the first plan; waits.

        A kernel's first use takes milliseconds, some hundreds of them, and a capture needs kernels that are
        loaded. All of it happens in the null slot.

        Args:
            max_tokens: of a step.
            capturing: called when most kernels are loaded.
        """
        num_blocks = self._slots.state.block_table.shape[1]
        length = min(max_tokens, max(1, (num_blocks - 1) * self._cache.block_size))  # of one sequence
        if not self.sampler.check_agreement:  # which looks at values
            self._device.compile_ahead(partial(self._rehearse, max_tokens))
        self._run_once(length)
        capturing()
        if not self.sampler.check_agreement:  # which looks at values
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
        for kind in self._graphs.kinds():
            if decode and kind[-1] == GREEDY:
                brief._decode_step(*kind)
            brief._sample_padded(*kind)
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
        packed = torch.from_numpy(pack((), (), {}, self._padded(size), self._slots.num_slots))

        def copy() -> None:
            self._mixed_inputs[: len(packed)].copy_(packed)

        self._device.compute.run(copy)

    def _begin(self) -> None:
        """As if there had been no step."""
        self.sampler.begin()
        self._slots.begin()

    # --------------------------------------------------------------------------- launch thread

    def launch(self, plan: BatchPlan) -> Launched:
        """Queues a step on the compute stream and returns at once."""
        step = self._stage(plan)
        compute, uploads = self._device.compute, self._device.uploads
        launched_ns = time.monotonic_ns()
        if not step.staging.is_empty:
            uploads.run(step.staging.send)
            compute.wait(uploads.record())
        started = compute.record_start()
        compute.run(lambda: self._run(step))
        prompt_rows = step.mixed and step.mixed.prompt_rows
        sampler, count, width = self.sampler, step.num_sampled, 1 + step.num_drafts
        return Launched(
            plan.step,
            count,
            sampler.ring_row(plan.step, count, width),
            started,
            compute.record(),
            launched_ns,
            step.staging,
            width,
            sampler.logprob_row(plan.step, count * width) if step.mode.logprobs else None,
            sampler.prompt_logprob_row(plan.step, prompt_rows.count) if prompt_rows else None,
        )

    def _stage(self, plan: BatchPlan) -> _Step:
        staging = self.staging.take()
        deltas = self._slots.stage(plan.admitted, plan.grants, staging)
        for slot in plan.released:
            self._prompts.pop(slot, None)
            self._told_prompts.pop(slot, None)
        for admission in plan.admitted:
            self._prompts[admission.slot] = np.frombuffer(admission.tokens, np.dtype("<i4"))
            if admission.sampling.num_prompt_logprobs != NO_LOGPROBS:
                self._told_prompts[admission.slot] = admission.num_prompt
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
            plan.num_drafts,
            self._stage_mixed(plan, staging) if plan.chunks else None,
            self._slots.sampling_mode(self._decode + sampled) if sampled else self._decode_mode,
        )

    def _stage_mixed(self, plan: BatchPlan, staging: StagingBuffer) -> _Mixed:
        width = 1 + plan.num_drafts
        shape = MixedShape.exact(len(self._decode), plan.chunks, width)
        size = self._forwards.size_for(shape.num_tokens)
        prompt_rows = None
        if self._told_prompts:
            rows = PromptRows.of(len(self._decode) * width, plan.chunks, self._prompts, self._told_prompts)
            if rows.count:
                prompt_rows = PromptRows(staging.put(rows.before), staging.put(rows.tokens), rows.count)
                size = None  # captured ones keep no hidden states but those to sample from
        if size is not None:
            shape = self._padded(size)
        packed = pack(self._decode, plan.chunks, self._prompts, shape, self._slots.num_slots, width)
        for chunk in plan.chunks:
            if chunk.sample:  # the prompt is on the device now
                del self._prompts[chunk.slot]
                self._told_prompts.pop(chunk.slot, None)
        longest = max(chunk.length for chunk in plan.chunks)
        return _Mixed(staging.put(packed), shape, longest, size, prompt_rows)

    # -------------------------------------------------------------------------- compute stream

    def _run(self, step: _Step) -> None:
        self._slots.apply(step.deltas)
        if step.decode_slots is not None:
            self._batch_slots.copy_(step.decode_slots.get())
        if step.mixed is not None:
            self._mixed_step(step, step.mixed)
        elif (replay := self._graphs.find(step.num_decodes, step.num_drafts, step.mode)) is not None:
            replay()
        else:
            self._decode_step(step.num_decodes, step.num_drafts, step.mode)

    def _decode_step(self, count: int, num_drafts: int, mode: SamplingMode) -> None:
        """Decodes the first `count` slots of the batch, of which the last ones may be the null slot."""
        table, width = self._slots, 1 + num_drafts
        slots = self._batch_slots[:count]
        token_ids, positions, lengths, block_tables = table.operations.begin_decode(slots, width, table.state)
        batch = Batch(
            token_ids=token_ids,
            positions=positions,
            sequence_of=self._sequence_of[width][: count * width],
            block_tables=block_tables,
            lengths=lengths,
            query_starts=self._starts[width][: count + 1],
            num_decodes=count,
            max_query=width,
            sample_rows=None,
            width=width,
        )
        hidden = self._decoder.forward(batch, self._cache)
        self.sampler.finish_step(slots, hidden, mode, width)
        self._draft(slots, num_drafts)

    def _draft(self, slots: Tensor, num_drafts: int) -> None:
        if self._drafter is not None and num_drafts and len(slots):
            self._drafter.draft(slots, num_drafts)

    def _mixed_step(self, step: _Step, mixed: _Mixed) -> None:
        packed = mixed.packed.get()
        if mixed.size is None:
            inputs = MixedInputs.of(packed, mixed.shape)
            width = 1 + step.num_drafts
            batch = inputs.begin(self._slots, step.num_decodes, max(mixed.longest, width), width)
            if mixed.prompt_rows is not None:
                batch.sample_rows = None  # all of them
            hidden = self._decoder.forward(batch, self._cache)
            if mixed.prompt_rows is not None:
                before, tokens = mixed.prompt_rows.before.get(), mixed.prompt_rows.tokens.get()
                self.sampler.tell_of_prompt(step.number, hidden[before], tokens)
                hidden = hidden[inputs.sample_rows]
            self.sampler.finish_step(inputs.sampled_slots, hidden, step.mode, width)
            self._draft(inputs.sampled_slots, step.num_drafts)
            return
        self._mixed_inputs[: len(packed)].copy_(packed)
        self._forwards.replay(mixed.size)
        if not step.num_sampled:  # chunks in the middle of their prompts
            self._sample_padded(0, 0, step.mode)
        elif (replay := self._samplings.find(step.num_sampled, step.num_drafts, step.mode)) is not None:
            replay()

    def _forward_padded(self, size: int) -> None:
        """The forward of what is in `_mixed_inputs`; leaves hidden states of the rows to sample."""
        inputs = MixedInputs.of(self._mixed_inputs, self._padded(size))
        hidden = self._decoder.forward(inputs.begin(self._slots, 0, size), self._cache)
        self._hidden[: len(hidden)].copy_(hidden)

    def _sample_padded(self, count: int, num_drafts: int, mode: SamplingMode) -> None:
        """Samples from what `_forward_padded` has left, for the first `count` slots of its input."""
        slots, width = self._mixed_inputs[:count], 1 + num_drafts
        self.sampler.finish_step(slots, self._hidden[: count * width], mode, width)
        self._draft(slots, num_drafts)
