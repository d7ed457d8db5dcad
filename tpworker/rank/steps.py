"""What steps compute, on the compute stream: as it is, or captured for a few sizes and replayed (graphs.py).

    decode step    slot table ─► forward ─► tokens ─► drafts                   one graph
    mixed step     input, slot table ─► forward │ ─► tokens ─► drafts           two graphs;
                                                │ ─► tokens │ ─► drafts         three, if of hidden states

A graph's results may be written over by the next one's, whose memory is the same: what one leaves to another
is copied to where it stays.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from tpworker.ipc.drafting import draft_choices
from tpworker.ipc.messages import Chunk
from tpworker.model.attention import PagedAttention
from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder
from tpworker.model.kv_cache import KVCache
from tpworker.model.sampling import SamplingMode
from tpworker.rank.device import Device
from tpworker.rank.drafter import Computed, Drafter
from tpworker.rank.graphs import (
    GREEDY,
    MOST_TOKENS,
    Backlog,
    SlotGraphs,
    SlotKind,
    TokenGraphs,
    token_ladder,
)
from tpworker.rank.mixed import Left, MixedInputs, MixedShape, PromptRows, pack
from tpworker.rank.sampler import Sampler
from tpworker.rank.slots import SlotTable
from tpworker.rank.staging import StagedArray


@dataclass(frozen=True, slots=True)
class MixedStep:
    """The input of a step with chunks, staged."""

    packed: StagedArray  # int64, see mixed.py
    shape: MixedShape
    longest: int  # tokens of one chunk
    size: int | None  # of the graph that it is padded for
    prompt_rows: PromptRows[StagedArray] | None  # whose logprobs are asked for


class Steps:
    """See the module.

    Args:
        decoder: this rank's shard of the model.
        cache: its KV blocks.
        slots: the slot table.
        device: where both live.
        sampler: chooses tokens.
        drafter: makes drafts; None: there are none.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        slots: SlotTable,
        device: Device,
        sampler: Sampler,
        drafter: Drafter | None,
    ) -> None:
        self.decoder = decoder
        self._cache = cache
        self._slots = slots
        self._device = device
        self._sampler = sampler
        self._drafter = drafter
        self._num_drafts = slots.state.drafts.shape[1]  # of a slot, at most
        self._drafts_of_hidden = drafter is not None and drafter.reads_hidden
        choices, here = draft_choices(self._num_drafts), device.torch_device
        self.batch_slots = torch.full((slots.num_slots,), slots.num_slots, device=here)
        """int64 [num_slots], those that decode come first; filled up with the null slot."""
        rows = torch.arange(slots.num_slots + 1, device=here)
        # By the tokens that each sequence has: which sequence a row is of, and where each begins.
        self._sequence_of = {1 + drafts: rows.repeat_interleave(1 + drafts) for drafts in choices}
        self._starts = {1 + drafts: (rows * (1 + drafts)).int() for drafts in choices}
        most = self.padded(MOST_TOKENS)
        self._mixed_inputs = torch.full((sum(most.sections),), slots.num_slots, device=here)
        self._hidden = decoder.weights.embed.new_zeros(sampler.most_rows, decoder.spec.hidden_size)
        self._left = Left.of(most, slots, self._hidden) if self._drafts_of_hidden else None
        self.decodes = SlotGraphs(slots.num_slots, choices)
        self.forwards = TokenGraphs()
        self.samplings = SlotGraphs(slots.num_slots, choices)
        self.heads = {drafts: TokenGraphs() for drafts in choices}
        self._backlog: Backlog = []

    def padded(self, num_tokens: int) -> MixedShape:
        """Of mixed steps that are captured for up to so many tokens."""
        return MixedShape.padded(
            num_tokens, self._slots.num_slots, self._num_drafts, has_following=self._drafts_of_hidden
        )

    def exact(self, num_decodes: int, chunks: Sequence[Chunk], width: int) -> MixedShape:
        """Of a mixed step as it is."""
        return MixedShape.exact(num_decodes, chunks, width, has_following=self._drafts_of_hidden)

    def begin(self) -> None:
        """As if there had been no step."""
        self._sampler.begin()
        self._slots.begin()

    # ------------------------------------------------------------------------------------ beforehand

    def rehearse(self, max_tokens: int) -> None:
        """Launches every kernel that captured steps will. Those that take longest to compile come first."""
        self._rehearse(self.decodes.kinds(), token_ladder(max_tokens))

    def rehearse_few(self, max_tokens: int) -> None:
        """Launches most of them, in a small part of the time."""
        sizes = token_ladder(max_tokens)
        self._rehearse(self.decodes.samples(), dict.fromkeys((sizes[0], sizes[-1])))

    def _rehearse(self, kinds: Iterable[SlotKind], sizes: Iterable[int]) -> None:
        mixed, decode = self._can_capture()
        brief = copy.copy(self)
        brief.decoder = self.decoder.excerpt()
        for kind in kinds:
            if decode and kind[-1] == GREEDY:
                brief.decode_step(*kind)
            brief.sample_padded(*kind)
        for size in sizes if mixed else ():
            brief.forward_padded(size)
            for drafts in self.heads if self._drafts_of_hidden else ():
                brief.draft_padded(drafts, size)

    def _can_capture(self) -> tuple[bool, bool]:
        """Whether steps with chunks can be captured, and whether decode steps can."""
        attention, captures = self.decoder.attention, self._device.captures
        mixed = not (captures and attention.reads_lengths)
        return mixed, not (captures and isinstance(attention, PagedAttention))

    def capture(self, max_tokens: int) -> tuple[float, float]:
        """Captures what can be; returns how many seconds it took, for mixed steps and for decode steps."""
        mixed, decode = self._can_capture()
        started = time.monotonic()
        self._device.compute.run(self.begin)
        if mixed:
            self.forwards.capture(self._device, max_tokens, self._put_padding, self.forward_padded)
            self.samplings.capture(self._device, self.sample_padded)
            for drafts, graphs in self.heads.items() if self._drafts_of_hidden else ():
                draft = partial(self.draft_padded, drafts)
                graphs.capture(self._device, max_tokens, self._leave_padding, draft)
        after_mixed = time.monotonic()
        if decode:
            self.decodes.capture(self._device, self.decode_step)
        return after_mixed - started, time.monotonic() - after_mixed

    def capture_late(self, max_tokens: int) -> None:
        """From now on each kind of step is captured when it has run for the first time, by `catch_up`."""
        mixed, decode = self._can_capture()
        self._device.compute.run(self.begin)
        if mixed:
            self.forwards.capture_late(self._device, max_tokens, self.forward_padded, self._backlog)
            self.samplings.capture_late(self._device, self.sample_padded, self._backlog)
            for drafts, graphs in self.heads.items() if self._drafts_of_hidden else ():
                draft = partial(self.draft_padded, drafts)
                graphs.capture_late(self._device, max_tokens, draft, self._backlog)
        if decode:
            self.decodes.capture_late(self._device, self.decode_step, self._backlog)

    def catch_up(self) -> None:
        """Captures what has run for the first time; steps may be on their way meanwhile."""
        while self._backlog:
            self._backlog.pop(0)()

    def _put_padding(self, size: int) -> None:
        """The input of a mixed step that has nothing but padding."""
        packed = torch.from_numpy(pack((), (), {}, self.padded(size), self._slots.num_slots))

        def put() -> None:
            self._mixed_inputs[: len(packed)].copy_(packed)

        self._device.compute.run(put)

    def _leave_padding(self, size: int) -> None:
        """What a forward of that leaves to who makes drafts: of another size it would not fit together."""
        self._put_padding(size)
        self._device.compute.run(partial(self.forwards.replay, size))

    # ---------------------------------------------------------------------------------- decode steps

    def decode(self, count: int, num_drafts: int, mode: SamplingMode) -> None:
        """Decodes the first `count` slots of the batch."""
        replay = self.decodes.find(count, num_drafts, mode)
        if replay is not None:
            replay()
        else:
            self.decode_step(count, num_drafts, mode)

    def decode_step(self, count: int, num_drafts: int, mode: SamplingMode) -> None:
        """The same, not replayed; the last ones may be the null slot."""
        table, width = self._slots, 1 + num_drafts
        slots = self.batch_slots[:count]
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
        hidden = self.decoder.forward(batch, self._cache)
        tokens, counts = self._sampler.finish_step(slots, hidden, mode, width)
        if self._drafter is None:
            return
        computed = None
        if self._drafts_of_hidden:
            rows = self._starts[width][:count] + (counts - 1).clamp_(min=0)
            computed = Computed(batch, hidden, tokens ^ (tokens >> 63), rows)
        self._drafter.draft(slots, num_drafts, computed, mode.random)

    # ----------------------------------------------------------------------------------- mixed steps

    def mixed(
        self,
        number: int,
        step: MixedStep,
        num_decodes: int,
        num_sampled: int,
        num_drafts: int,
        mode: SamplingMode,
    ) -> None:
        """A step with chunks: `num_decodes` slots decode, `num_sampled` are sampled, these included."""
        packed = step.packed.get()
        if step.size is None:
            self._mixed_step(number, step, num_decodes, num_drafts, mode)
            return
        self._mixed_inputs[: len(packed)].copy_(packed)
        self.forwards.replay(step.size)
        if not num_sampled:  # chunks in the middle of their prompts
            num_drafts = 0
            self.sample_padded(0, 0, mode)
        elif (replay := self.samplings.find(num_sampled, num_drafts, mode)) is not None:
            replay()
        if self._drafts_of_hidden:
            self.heads[num_drafts].replay(step.size)

    def _mixed_step(
        self, number: int, step: MixedStep, num_decodes: int, num_drafts: int, mode: SamplingMode
    ) -> None:
        """As it is, of any size."""
        width = 1 + num_drafts
        inputs = MixedInputs.of(step.packed.get(), step.shape)
        batch = inputs.begin(self._slots, num_decodes, max(step.longest, width), width)
        if self._drafts_of_hidden or step.prompt_rows is not None:
            batch.sample_rows = None  # all of them
        hidden = self.decoder.forward(batch, self._cache)
        sampled = hidden if batch.sample_rows is not None else hidden[inputs.sample_rows]
        if step.prompt_rows is not None:
            before, tokens = step.prompt_rows.before.get(), step.prompt_rows.tokens.get()
            self._sampler.tell_of_prompt(number, hidden[before], tokens)
        slots = inputs.sampled_slots
        tokens, counts = self._sampler.finish_step(slots, sampled, mode, width)
        if self._drafter is None:
            return
        computed = None
        if self._drafts_of_hidden:
            computed = inputs.computed(batch, hidden, tokens, counts, width)
        self._drafter.draft(slots, num_drafts, computed, mode.random)

    def forward_padded(self, size: int) -> None:
        """The forward of what is in `_mixed_inputs`; leaves hidden states of the rows to sample."""
        inputs = MixedInputs.of(self._mixed_inputs, self.padded(size))
        batch = inputs.begin(self._slots, 0, size)
        if self._left is not None:
            batch.sample_rows = None
        hidden = self.decoder.forward(batch, self._cache)
        if self._left is not None:
            self._left.keep(batch, hidden)
            hidden = hidden[inputs.sample_rows]
        self._hidden[: len(hidden)].copy_(hidden)

    def sample_padded(self, count: int, num_drafts: int, mode: SamplingMode) -> None:
        """Samples from what `forward_padded` has left, for the first `count` slots of its input."""
        slots, width = self._mixed_inputs[:count], 1 + num_drafts
        tokens, counts = self._sampler.finish_step(slots, self._hidden[: count * width], mode, width)
        if self._left is not None:
            self._left.tokens[: len(tokens)].copy_(tokens)
            self._left.counts[: len(counts)].copy_(counts)
        elif self._drafter is not None:
            self._drafter.draft(slots, num_drafts, None, mode.random)

    def draft_padded(self, num_drafts: int, size: int) -> None:
        """Drafts of what `forward_padded` and `sample_padded` have left."""
        assert self._left is not None
        assert self._drafter is not None
        shape, width = self.padded(size), 1 + num_drafts
        inputs = MixedInputs.of(self._mixed_inputs, shape)
        count = min(shape.num_places, shape.num_rows // width)
        slots, rows = inputs.sampled_slots[:count], inputs.sample_rows[: count * width]
        inputs = replace(inputs, sampled_slots=slots, sample_rows=rows)
        batch, hidden = self._left.batch(inputs, size)
        computed = inputs.computed(batch, hidden, self._left.tokens, self._left.counts[:count], width)
        self._drafter.draft(slots, num_drafts, computed, is_random=True)
