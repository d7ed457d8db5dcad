"""A rank without a model, for tests of whatever composes plans.

It executes plans as a rank does, on blocks that hold tokens in the place of keys and values, and its next
token is a function of everything that it can see through a slot's block table. So a block that was given
away too early, shared wrongly or not filled changes the output, as it would with a model, and
`expected_output` tells what the output must be. So it is with logprobs, and `logprob_row`. Of its drafts most
are right, and sometimes there are none.
"""

from __future__ import annotations

import math
import struct
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.messages import (
    MAX_TOLD,
    NO_LOGPROBS,
    Admission,
    BatchPlan,
    Chunk,
    Sampling,
    StepResult,
    StepTiming,
)


def next_token(context: Sequence[int], seed: int, vocab_size: int) -> int:
    """The token that follows `context`, in the world of `FakeRank`."""
    return zlib.crc32(array("q", [seed, *context]).tobytes()) % vocab_size


def expected_output(
    prompt: Sequence[int], sampling: Sampling, vocab_size: int, max_model_len: int
) -> list[int]:
    """The output tokens of a request that runs alone, one step after the other."""
    tokens = list(prompt)
    stop_ids = set(unpack_int32(sampling.stop_ids))
    while len(tokens) < max(len(prompt) + 1, min(len(prompt) + sampling.max_tokens, max_model_len)):
        token = next_token(tokens, sampling.seed, vocab_size)
        while token in stop_ids and len(tokens) < len(prompt) + sampling.min_tokens:
            token = (token + 1) % vocab_size
        tokens.append(token)
        if token in stop_ids:
            break
    return tokens[len(prompt) :]


def logprob_row(context: Sequence[int], token: int) -> bytes:
    """The logprob row of a token that follows `context`, in the same world: it tells of two likely ones."""
    own = -(zlib.crc32(array("q", [token, *context]).tobytes()) % 4096) / 64
    top, ids = [own, own - 1] + [-math.inf] * 18, [token, len(context)] + [-1] * 18
    return struct.pack("<21f20i", own, *top, *ids)


@dataclass(slots=True)
class _Slot:
    tokens: array[int]
    num_prompt: int
    sampling: Sampling
    stop_ids: frozenset[int]
    blocks: dict[int, int] = field(default_factory=dict)
    position: int = 0
    last_token: int = 0
    max_length: int = 0
    is_guided: bool = False
    drafts: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Sampled:
    state: _Slot
    proposed: int
    tokens: list[int]


class FakeRank:
    """Executes plans in order; asserts that they make sense.

    Args:
        num_blocks, block_size: of the KV cache it pretends to have.
        vocab_size: tokens are below it.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 50) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.next_step = 0
        self.slots: dict[int, _Slot] = {}
        self._blocks = [[-1] * block_size for _ in range(num_blocks)]
        self._decode: list[int] = []

    @property
    def num_decoding(self) -> int:
        """Slots that decoded in the last step."""
        return len(self._decode)

    def execute(self, plan: BatchPlan) -> StepResult:
        """One step: the sampled tokens, in the plan's order."""
        assert plan.step == self.next_step, f"step {plan.step} after {self.next_step - 1}"
        self.next_step += 1
        for slot in plan.released:
            del self.slots[slot]
        for admission in plan.admitted:
            self._admit(admission)
        for grant in plan.grants:
            for entry, block in enumerate(unpack_int32(grant.blocks), grant.first):
                assert entry not in self.slots[grant.slot].blocks, "an entry was granted twice"
                self.slots[grant.slot].blocks[entry] = block
        if plan.decode is not None:
            self._decode = unpack_int32(plan.decode).tolist()
        results = [self._decode_slot(self.slots[slot], plan.num_drafts) for slot in self._decode]
        told: list[bytes] = []
        for chunk in plan.chunks:
            state = self.slots[chunk.slot]
            assert chunk.start == state.position, "a chunk does not begin where the one before ended"
            for position in range(chunk.start, chunk.start + chunk.length):
                self._write(state, position, state.tokens[position])
            state.position = chunk.start + chunk.length
            assert chunk.sample == (state.position == len(state.tokens))
            if chunk.sample:
                results.append(_Sampled(state, 0, [self._sample(state)]))
            told += self._tell_of_prompt(state, chunk)
        assert len(told) <= MAX_TOLD
        rows = [row for result in results for row in self._logprobs(result)]
        asks = any(result.state.sampling.num_logprobs != NO_LOGPROBS for result in results)
        for result in results:
            result.state.drafts = self._draft(result.state, plan.num_drafts)
        counts = [len(result.tokens) for result in results]
        proposed = [result.proposed for result in results]
        return StepResult(
            plan.generation,
            plan.step,
            pack_int32([token for result in results for token in result.tokens]),
            StepTiming(0, 0, 0),
            b"".join(rows) if asks else b"",
            b"".join(told),
            pack_int32(counts) if plan.num_drafts or any(count != 1 for count in counts) else b"",
            pack_int32(proposed) if any(proposed) else b"",
        )

    def _logprobs(self, result: _Sampled) -> list[bytes]:
        """A row for each token."""
        state, first = result.state, result.state.position - len(result.tokens) + 1
        if not result.tokens:
            return []
        known = [*self._context(state, first), *result.tokens]
        return [logprob_row(known[:place], known[place]) for place in range(first, len(known))]

    def _tell_of_prompt(self, state: _Slot, chunk: Chunk) -> list[bytes]:
        """A row for each prompt token behind one of the chunk, if it is asked for."""
        if state.sampling.num_prompt_logprobs == NO_LOGPROBS:
            return []
        told = range(chunk.start + 1, min(chunk.start + chunk.length, state.num_prompt - 1) + 1)
        return [logprob_row(self._context(state, place), state.tokens[place]) for place in told]

    def _context(self, state: _Slot, length: int) -> list[int]:
        return [self._read(state, position) for position in range(length)]

    def _admit(self, admission: Admission) -> None:
        assert admission.slot not in self.slots, f"slot {admission.slot} is taken"
        state = _Slot(
            unpack_int32(admission.tokens),
            admission.num_prompt,
            admission.sampling,
            frozenset(unpack_int32(admission.sampling.stop_ids)),
            dict(enumerate(unpack_int32(admission.blocks))),
            admission.num_cached,
            max_length=admission.max_length,
            is_guided=admission.is_guided,
        )
        self.slots[admission.slot] = state
        cached = self._context(state, admission.num_cached)
        assert cached == state.tokens[: admission.num_cached].tolist(), "the prefix cache gave wrong content"

    def _decode_slot(self, state: _Slot, num_drafts: int) -> _Sampled:
        """Writes the last token and its drafts, then takes what is right of these, and one token more.

        The places of drafts that do not exist are written too; beyond the blocks, so is the null block.
        """
        drafts, stands = state.drafts[:num_drafts], state.position
        if stands < state.max_length - 1:
            self._write(state, stands, state.last_token)
        for place, token in enumerate([*drafts, *[0] * (num_drafts - len(drafts))], stands + 1):
            if place // self.block_size in state.blocks:
                self._write(state, place, token)
        tokens: list[int] = []
        while len(tokens) <= len(drafts) and stands + 1 + len(tokens) < state.max_length:
            state.position = stands + 1 + len(tokens)
            tokens.append(self._sample(state))
            if tokens != drafts[: len(tokens)]:
                break
        return _Sampled(state, len(drafts), tokens)

    def _draft(self, state: _Slot, num_drafts: int) -> list[int]:
        if state.is_guided:
            return []
        drafts: list[int] = []
        for _ in range(num_drafts):
            context = [*self._context(state, state.position), state.last_token, *drafts]
            token = next_token(context, state.sampling.seed, self.vocab_size)
            chance = zlib.crc32(array("q", context).tobytes()) // 7 % 16
            if chance == 0:
                break
            drafts.append(token if chance < 13 else (token + 1) % self.vocab_size)
        return drafts

    def _sample(self, state: _Slot) -> int:
        token = next_token(self._context(state, state.position), state.sampling.seed, self.vocab_size)
        while token in state.stop_ids and state.position < state.num_prompt + state.sampling.min_tokens:
            token = (token + 1) % self.vocab_size
        state.last_token = token
        return token

    def _write(self, state: _Slot, position: int, token: int) -> None:
        block = state.blocks[position // self.block_size]
        assert block != 0, "the null block is written to"
        self._blocks[block][position % self.block_size] = token

    def _read(self, state: _Slot, position: int) -> int:
        return self._blocks[state.blocks[position // self.block_size]][position % self.block_size]
