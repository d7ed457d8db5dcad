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

import logging
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import NO_LOGPROBS, Admission, BatchPlan, Chunk, LogitRules, Sampling
from tpworker.model.decoder import Decoder
from tpworker.model.kv_cache import KVCache
from tpworker.model.sampling import SamplingMode
from tpworker.model.tp import Collectives
from tpworker.rank.device import Device, Event
from tpworker.rank.drafter import Drafter
from tpworker.rank.graphs import MOST_TOKENS
from tpworker.rank.mixed import PromptRows, pack
from tpworker.rank.sampler import Sampler
from tpworker.rank.slots import SlotDeltas, SlotTable
from tpworker.rank.staging import StagedArray, StagingBuffer, StagingPool
from tpworker.rank.steps import MixedStep, Steps

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
class _Step:
    """Everything that the compute stream needs to know of one step."""

    number: int
    staging: StagingBuffer
    deltas: SlotDeltas
    decode_slots: StagedArray | None  # int64 [num_slots], filled up with the null slot, where it has changed
    num_decodes: int
    num_sampled: int
    num_drafts: int
    mixed: MixedStep | None
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
        self.steps = Steps(decoder, cache, slots, device, self.sampler, drafter)
        self._cache = cache
        self._slots = slots
        self._device = device
        self._prompts: dict[int, NDArray[np.int32]] = {}
        self._told_prompts: dict[int, int] = {}  # of slots whose prompts' logprobs are asked for: the length
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
        num_blocks = self._slots.state.block_table.shape[1]
        length = min(max_tokens, max(1, (num_blocks - 1) * self._cache.block_size))  # of one sequence
        if not self.sampler.check_agreement:  # which looks at values
            self._device.compile_ahead(partial(self.steps.rehearse, max_tokens))
        self._run_once(length)
        capturing()
        if not self.sampler.check_agreement:  # which looks at values
            seconds = self.steps.capture(max_tokens)
            logger.info("captured mixed steps in %.1f s, decode steps in %.1f s", *seconds)
        while (length := length // 2) and self.steps.forwards.size_for(length) is None:
            self._run_once(length)
        self._device.compute.run(self.steps.begin)
        self._device.synchronize()

    def prepare_late(self, max_tokens: int) -> None:
        """In place of `prepare`, where requests wait for the first plan: after a restart. Runs and captures
        nothing yet: each kind of step is captured once it has run, see `catch_up`.

        Kernels are loaded before, as far as that is quick: loading one may wait for the device, and the
        device for the masks of the step that needs it.

        Args:
            max_tokens: of a step.
        """
        if not self.sampler.check_agreement:  # which looks at values
            self._device.compile_ahead(partial(self.steps.rehearse_few, max_tokens))
            self.steps.capture_late(max_tokens)
        self._device.compute.run(self.steps.begin)
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

    def catch_up(self) -> None:
        """Captures the kinds of steps that have run for the first time, after `prepare_late`. Some ten
        milliseconds each: call it when the step has been launched and published. Waits for nothing."""
        self.steps.catch_up()

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

    def _stage_mixed(self, plan: BatchPlan, staging: StagingBuffer) -> MixedStep:
        width = 1 + plan.num_drafts
        shape = self.steps.exact(len(self._decode), plan.chunks, width)
        size = self.steps.forwards.size_for(shape.num_tokens)
        prompt_rows = None
        if self._told_prompts:
            rows = PromptRows.of(len(self._decode) * width, plan.chunks, self._prompts, self._told_prompts)
            if rows.count:
                prompt_rows = PromptRows(staging.put(rows.before), staging.put(rows.tokens), rows.count)
                size = None  # captured ones keep no hidden states but those to sample from
        if size is not None:
            shape = self.steps.padded(size)
        packed = pack(self._decode, plan.chunks, self._prompts, shape, self._slots.num_slots, width)
        for chunk in plan.chunks:
            if chunk.sample:  # the prompt is on the device now
                del self._prompts[chunk.slot]
                self._told_prompts.pop(chunk.slot, None)
        longest = max(chunk.length for chunk in plan.chunks)
        return MixedStep(staging.put(packed), shape, longest, size, prompt_rows)

    # -------------------------------------------------------------------------- compute stream

    def _run(self, step: _Step) -> None:
        self._slots.apply(step.deltas)
        if step.decode_slots is not None:
            self.steps.batch_slots.copy_(step.decode_slots.get())
        if step.mixed is None:
            self.steps.decode(step.num_decodes, step.num_drafts, step.mode)
        else:
            counts = step.num_decodes, step.num_sampled, step.num_drafts
            self.steps.mixed(step.number, step.mixed, *counts, step.mode)
