"""A scheduler, and a rank that chooses under the masks it writes, in one thread: every move is the test's.

    compose ──► launched ──(masks are there)──► executed ──► answers ──► commit

The rank knows a step's true tokens before the scheduler does, and compares each mask with what the grammar
allows behind them. What the scheduler may write when is checked at every move.
"""

from __future__ import annotations

import select
from collections import deque
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from tests.integration.guided import EOS, VOCAB, VOCABULARY
from tests.scheduler.helpers import World
from tpworker.grammar import Compiler
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.masks import TURNS
from tpworker.ipc.messages import MAX_STEP, Abort, BatchPlan, Submit
from tpworker.scheduler.inflight import InFlight
from tpworker.scheduler.requests import Request, State
from tpworker.testing.fake_rank import FakeRank, _Slot, expected_output, next_token


@cache
def compiler() -> Compiler:
    """Of the tests alone: no matcher has anything to do with the scheduler's."""
    return Compiler(VOCABULARY.tokenizer, VOCAB, [EOS])


class Reference:
    """What may follow an output's tokens, asked of a matcher anew.

    Args:
        message: of the request, which is held to a grammar.
    """

    def __init__(self, message: Submit) -> None:
        assert message.grammar is not None
        self._grammar = message.grammar
        self._min_tokens = message.sampling.min_tokens
        self.stop_ids = set(unpack_int32(message.sampling.stop_ids))

    def is_over(self, output: list[int]) -> bool:
        """Whether nothing of it is wanted behind these tokens."""
        return bool(self.stop_ids & set(output)) or self._behind(output).is_stopped()

    def allowed(self, output: list[int]) -> set[int]:
        """The tokens that may come next; it must not be over."""
        mask = allocate_token_bitmask(1, VOCAB)
        mask.fill(0)
        fill_next_token_bitmask(self._behind(output), mask)
        allowed = set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())
        if len(output) < self._min_tokens:
            allowed = allowed - self.stop_ids or allowed
        return allowed

    def is_known(self, output: list[int], index: int) -> bool:
        """Whether these tokens, and those that there is no other for, are all that come before the one at
        `index`; or the grammar ends before."""
        known = list(output)
        while len(known) < index and not self._behind(known).is_stopped():
            allowed = self.allowed(known)
            if len(allowed) > 1:
                return False
            known += allowed
        return True

    def _behind(self, output: list[int]) -> LLMatcher:
        matcher = compiler().matcher(self._grammar)
        for token in output:
            if not matcher.is_stopped():
                assert matcher.consume_token(token), f"{output} is not of the grammar"
        return matcher


def choose(context: list[int], seed: int, allowed: set[int]) -> int:
    """The token that follows `context` in this world, of those that may."""
    wanted = next_token(context, seed, VOCAB)
    return min(allowed, key=lambda token: (token - wanted) % VOCAB)


def expected(message: Submit, max_model_len: int = 64) -> tuple[list[int], str]:
    """What a request gets alone, and why it ends."""
    prompt, stop_ids = unpack_int32(message.tokens).tolist(), set(unpack_int32(message.sampling.stop_ids))
    if message.grammar is None:
        output = expected_output(prompt, message.sampling, VOCAB, max_model_len)
        return output, "stop" if output[-1] in stop_ids else "length"
    reference, output = Reference(message), []
    limit = min(message.sampling.max_tokens, max_model_len - len(prompt))
    while len(output) < limit:
        output.append(choose(prompt + output, message.sampling.seed, reference.allowed(output)))
        if reference.is_over(output):
            return output, "stop"
    return output, "length"


class GuidedRank(FakeRank):
    """Chooses the tokens of guided slots under their masks, which must be right.

    Args:
        world: whose masks it reads.
    """

    def __init__(self, world: GuidedWorld, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size, VOCAB)
        self._world = world
        self.guided: dict[int, int] = {}  # by slot, the request
        self.masks: dict[int, dict[int, np.ndarray]] = {}  # by step and slot, as they were read

    def execute(self, plan: BatchPlan) -> Any:
        for slot in plan.released:
            self.guided.pop(slot, None)
        for admission in plan.admitted:
            request = self._world.slots[plan.step][admission.slot]
            assert admission.is_guided == (request in self._world.references)
            if admission.is_guided:
                self.guided[admission.slot] = request
        self.masks[plan.step] = {}
        return super().execute(plan)

    def _sample(self, state: _Slot) -> int:
        (slot,) = (slot for slot, other in self.slots.items() if other is state)
        if slot not in self.guided:
            return super()._sample(state)
        step, request = self.next_step - 1, self.guided[slot]
        context = self._context(state, state.position)
        mask = self._world.rows[step % TURNS, slot].copy()
        self.masks[step][slot] = mask
        found = set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())
        assert found, "no token may be chosen"
        reference, output = self._world.references[request], context[state.num_prompt :]
        if request not in self._world.dead and not reference.is_over(output):
            assert found == reference.allowed(output), f"step {step}, request {request}, after {output}"
        state.last_token = choose(context, state.sampling.seed, found & set(range(VOCAB)))
        return state.last_token


class GuidedWorld(World):
    """See above. Make moves with `compose`, `work`, `answer`, `ripen`, or `run`."""

    rank: GuidedRank

    def __init__(self, lookahead: int = 2, num_blocks: int = 64, block_size: int = 4, **options: Any) -> None:
        super().__init__(lookahead, num_blocks, block_size, vocab_size=VOCAB, **options)
        self.rank = GuidedRank(self, num_blocks, block_size)
        shape = (TURNS, self.masks.num_slots, self.masks.num_words)
        self.rows = np.frombuffer(self.masks.memory, np.int32).reshape(shape)
        self.references: dict[int, Reference] = {}
        self.dead: set[int] = set()
        """Requests that were aborted or have failed."""
        self.launched: deque[BatchPlan] = deque()
        self.num_answered = 0
        """Steps whose answers the scheduler has been given."""
        self.written: list[int] = []
        """Steps whose masks were written."""
        self.slots: dict[int, dict[int, int]] = {}
        """By step and slot, whose it is."""
        self._is_guided: dict[int, bool] = {}  # by step
        self._owed: deque[InFlight] = deque()  # plans whose masks are not written
        self._spy()
        self.scheduler.take(VOCABULARY)

    def _spy(self) -> None:
        publish, expect, stream = self.masks.publish, self.scheduler.guides.expect, self.scheduler.stream

        def published(step: int) -> None:
            if step != MAX_STEP:
                assert self._owed, f"masks of step {step}, which nobody waits for"
                assert self._owed.popleft().step == step, "masks out of order"
                assert step < self.num_answered + TURNS, f"masks of step {step - TURNS} are in use"
                self.written.append(step)
            publish(step)

        def expected(plan: InFlight) -> None:
            self._owed.append(plan)
            expect(plan)

        def streamed(plan: BatchPlan, in_flight: InFlight) -> None:
            self.slots[plan.step] = {request.slot: request.id for request in self.scheduler.composer.running}
            self._is_guided[plan.step] = bool(in_flight.guided)
            stream(plan, in_flight)

        self.masks.publish = published  # type: ignore[method-assign]
        self.scheduler.guides.expect = expected  # type: ignore[method-assign]
        self.scheduler.stream = streamed  # type: ignore[method-assign]

    # ------------------------------------------------------------------------------------- moves

    def submit(self, message: Submit) -> None:
        if message.grammar is not None:
            self.references[message.request] = Reference(message)
        super().submit(message)
        if message.num_delivered:
            tokens = unpack_int32(message.tokens)[-message.num_delivered :].tolist()
            self.tokens[message.request] = tokens

    def abort(self, request: int) -> None:
        self.dead.add(request)
        self.scheduler.take(Abort(0, request))

    def ripen(self) -> None:
        """All grammars that are being compiled are compiled; the requests are in the queue."""
        guides = self.scheduler.guides
        while guides.num_compiling:
            assert select.select([guides.bell], [], [], 60)[0], "a grammar is not compiled"
            self.scheduler.take_compiled()
        self.check_punctual()

    def execute(self) -> None:
        """What has been streamed is launched; nothing is executed yet."""
        while self.plans.sent:
            plan = self.plans.sent.popleft()
            assert isinstance(plan, BatchPlan)
            self.launched.append(plan)
        self.scheduler.composer.check_integrity()
        self.check_punctual()

    def work(self) -> bool:
        """The rank executes the next step, if that needs no masks, or has them."""
        if not self.launched or not self.may_end(self.launched[0].step):
            return False
        plan = self.launched.popleft()
        self.executed.append(plan)
        self.answers.append(self.rank.execute(plan))
        return True

    def may_end(self, step: int) -> bool:
        """Whether it needs no masks, or has them."""
        return not self._is_guided[step] or self.masks.num_written > step

    def answer(self) -> bool:
        if not self.answers:
            return False
        step = self.answers[0].step
        for slot, mask in self.rank.masks.pop(step).items():
            changed = (self.rows[step % TURNS, slot] != mask).any()
            assert not changed, f"masks of step {step} were written over before it was answered"
        self.num_answered = step + 1
        answered = super().answer()
        self.check_punctual()
        return answered

    def run(self) -> None:
        """Until nothing is left to do, in a random order of moves."""
        moves_left = 20_000
        while not self.is_done():
            self.move()
            moves_left -= 1
            assert moves_left, f"no end: masks of {[plan.step for plan in self._owed]} do not come"
        self.scheduler.composer.check_integrity()

    def move(self) -> None:
        """One move at random."""
        self._random.choice((self.compose, self.work, self.work, self.answer, self.answer, self.ripen))()

    def is_done(self) -> bool:
        busy = self.launched or self.answers or self.plans.sent or len(self.scheduler.in_flight)
        return not busy and self.scheduler.composer.is_idle() and not self.scheduler.guides.num_compiling

    def close(self) -> None:
        """Ends the thread that compiles."""
        self.scheduler.guides.let_go()
        del self.rows
        self.board.close()

    # ------------------------------------------------------------------------------------ checks

    def check_punctual(self) -> None:
        """Asserts that the masks which are owed first could not have been written yet."""
        if not self._owed or self._owed[0].step >= self.num_answered + TURNS:
            return
        guided = self._owed[0].guided
        if any(request.id in self.dead for _, request, _ in guided):
            return  # nobody asks for theirs: it is with the next answer that they are written, at the latest
        known = [self._is_known(request, index) for _, request, index in guided]
        assert not all(known), f"masks of step {self._owed[0].step} could be written, and are not"

    def _is_known(self, request: Request, index: int) -> bool:
        if request.state is State.FINISHED:
            return True
        output = request.tokens[request.num_prompt :].tolist()
        return self.references[request.id].is_known(output, index)


def restarted(message: Submit, count: int) -> Submit:
    """The same request after a restart, when so many of its tokens had been delivered, if not all."""
    output, _ = expected(message)
    count = min(count, len(output) - 1)
    tokens = message.tokens + pack_int32(output[:count])
    return replace(message, tokens=tokens, num_delivered=count)
