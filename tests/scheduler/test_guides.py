"""Masks are right, and come in time: not too early, and not later than they could. Without ranks."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.guided import EOS, KINDS, TOKENIZER
from tests.scheduler.guided_world import GuidedWorld, expected, restarted
from tests.scheduler.helpers import submit
from tests.scheduler.test_process import Ready
from tpworker.grammar import grammar_of
from tpworker.grammar.bits import Masks
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.masks import TURNS
from tpworker.ipc.messages import Submit
from tpworker.scheduler.guide import Guide
from tpworker.scheduler.process import MasksUnwritten, StepTimeout
from tpworker.structured_outputs import StructuredOutputs

ALPHABET = "abcdefghijklmnop"
FORCED = grammar_of(StructuredOutputs(choice=(ALPHABET,)))
ENDLESS = grammar_of(StructuredOutputs(regex="[a-z]*"))
HALF_FORCED = grammar_of(StructuredOutputs(regex="abc(d|e)fgh(ij|kl)(mnop)*"))
GRAMMARS = (None, FORCED, HALF_FORCED, *(kind.grammar for kind in KINDS))


def guided(request: int, grammar: str | None, prompt: tuple[int, ...] = (1, 2, 3), **changes: Any) -> Submit:
    """A request whose output is held to a grammar."""
    fields = {"max_tokens": 24, "seed": request, "stop_ids": pack_int32([EOS]), **changes}
    return replace(submit(request, list(prompt), **fields), grammar=grammar)


def check(world: GuidedWorld, messages: list[Submit]) -> None:
    """Each has got what it gets alone; of those that were aborted, as far as it came."""
    for message in messages:
        (tokens, reason), got = expected(message), world.tokens[message.request]
        if message.request in world.dead:
            assert got == tokens[: len(got)]
        else:
            assert (got, world.finished[message.request]) == (tokens, reason), message
    world.close()


request_strategy = st.fixed_dictionaries(
    {
        "grammar": st.sampled_from(GRAMMARS),
        "prompt": st.lists(st.integers(0, 2), min_size=1, max_size=20),
        "max_tokens": st.integers(1, 30),
        "seed": st.integers(0, 2**16),
        "min_tokens": st.integers(0, 12),
        "stops": st.lists(st.integers(0, EOS), max_size=2),
        "delivered": st.integers(0, 8),
        "abort_after": st.none() | st.integers(0, 40),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(request_strategy, min_size=1, max_size=8),
    lookahead=st.integers(0, 4),
    slots=st.integers(1, 4),
    num_blocks=st.integers(17, 40),
    seed=st.integers(0, 2**16),
)
def test_any_mix_is_held_to_its_grammars(
    requests: list[dict[str, Any]], lookahead: int, slots: int, num_blocks: int, seed: int
) -> None:
    """In any order of moves, with preemptions, aborts, restarts: see `GuidedWorld` for what is checked."""
    world = GuidedWorld(lookahead, num_blocks, seed=seed, max_num_seqs=slots)
    messages = []
    for number, asked in enumerate(requests):
        message = guided(
            number,
            asked["grammar"],
            tuple(asked["prompt"]),
            max_tokens=asked["max_tokens"],
            seed=asked["seed"],
            min_tokens=min(asked["min_tokens"], asked["max_tokens"]),
            stop_ids=pack_int32([EOS, *asked["stops"]]),
        )
        messages.append(message)
        world.submit(restarted(message, asked["delivered"]))
    for turn in range(41):
        for number, asked in enumerate(requests):
            if asked["abort_after"] == turn and number not in world.finished:
                world.abort(number)
        world.move()
    world.run()
    check(world, messages)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 4])
def test_a_preemption_leaves_a_guide_where_it_is(lookahead: int) -> None:
    world = GuidedWorld(lookahead, num_blocks=13, prefix_caching=False)
    messages = [
        guided(i, grammar, (i,) * 6) for i, grammar in enumerate((ENDLESS, HALF_FORCED, FORCED, ENDLESS))
    ]
    for message in messages:
        world.submit(message)
    world.ripen()
    world.run()
    assert world.scheduler.composer.num_preemptions > 0
    check(world, messages)


# --------------------------------------------------------------------------------- when they are written


def start(messages: list[Submit], lookahead: int) -> GuidedWorld:
    """All in slots; their prompts' plans, and as many after them as the lookahead allows, are launched."""
    world = GuidedWorld(lookahead, max_num_batched_tokens=64)
    for message in messages:
        world.submit(message)
    world.ripen()
    world.compose()
    assert [plan.step for plan in world.launched] == list(range(lookahead + 1))
    return world


def check_lead(messages: list[Submit], lead: int, count: int) -> None:
    """For `count` answers, masks are so many steps ahead of them, and so is the rank."""
    world = start(messages, lookahead=4)
    for answers in range(count):
        assert world.written == list(range(answers + lead))
        while world.work():
            pass
        assert world.rank.next_step == answers + lead, "it goes as far as there are masks"
        assert world.answer()
        world.compose()
    world.run()
    check(world, messages)


def test_tokens_that_are_forced_are_not_waited_for() -> None:
    """Two steps have their masks before anybody has answered anything: there is memory for as many."""
    check_lead([guided(0, FORCED), guided(1, FORCED), guided(2, None)], TURNS, len(ALPHABET))


def test_one_token_that_is_not_forced_is_waited_for() -> None:
    check_lead([guided(0, FORCED), guided(1, ENDLESS, min_tokens=20)], 1, 20)


def test_an_output_that_has_ended_is_not_waited_for() -> None:
    """Its last token was forced: what comes behind is nobody's, and the other row's tokens are forced too."""
    short = grammar_of(StructuredOutputs(choice=("ab",)))
    check_lead([guided(0, FORCED), guided(1, short)], TURNS, len(ALPHABET))


def test_steps_without_guided_tokens_are_owed_nothing() -> None:
    world = start([guided(0, None), guided(1, None)], lookahead=2)
    while world.work():
        pass
    assert len(world.answers) == 3
    assert world.written == []
    world.run()
    check(world, [guided(0, None), guided(1, None)])


def test_min_tokens_holds_as_long_as_there_is_something_to_say() -> None:
    asked: dict[str, Any] = {"min_tokens": 9, "max_tokens": 20}
    messages = [
        guided(0, ENDLESS, **asked),
        guided(1, grammar_of(StructuredOutputs(choice=("yes",))), **asked),
        guided(2, grammar_of(StructuredOutputs(regex="[ab]{0,4}")), **asked),
    ]
    world = start(messages, lookahead=2)
    world.run()
    texts = [TOKENIZER.decode(world.tokens[i], skip_special_tokens=True) for i in range(3)]
    assert len(texts[0]) >= 9
    assert texts[1] == "yes"
    assert len(texts[2]) == 4
    check(world, messages)


@pytest.mark.parametrize("is_written", [False, True])
def test_who_keeps_a_step_waiting_is_told(is_written: bool) -> None:
    world = start([guided(0, ENDLESS)], lookahead=1)
    world.scheduler.in_flight.patience.seconds = 0.01
    world.work()
    world.answer()
    world.work()
    world.answer()
    if not is_written:
        world.scheduler.guides._all_known = lambda plan: False  # type: ignore[method-assign]
    world.scheduler.compose_ahead()
    world.scheduler.in_flight.patience.restart()
    time.sleep(0.02)
    error = StepTimeout if is_written else MasksUnwritten
    told = (
        r"^a step was not answered"
        if is_written
        else r"^step 2 was not answered .* masks have not been written"
    )
    with pytest.raises(error, match=told):
        world.scheduler.receive(Ready())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ a guide by itself


class FakeMatcher:
    """Takes `tokens` in their order; then it has ended."""

    def __init__(self, tokens: list[int], error: str = "") -> None:
        self.tokens = tokens
        self.error = error

    def consume_token(self, token: int) -> bool:
        is_right = bool(self.tokens) and token == self.tokens.pop(0)
        if not is_right:
            self.error = f"no {token} here\nbacktrace"
        return is_right

    def is_stopped(self) -> bool:
        return not self.tokens

    def is_error(self) -> bool:
        return bool(self.error)

    def get_error(self) -> str:
        return self.error


def guide_of(matcher: FakeMatcher, late_ids: tuple[int, ...] = (), min_tokens: int = 0) -> Guide:
    return Guide(matcher, late_ids, min_tokens)  # type: ignore[arg-type]


def settled(guide: Guide, *allowed: int) -> set[int]:
    """What is left of a mask in which these tokens were allowed."""
    memory = np.zeros((2, 4), np.int32)
    for token in allowed:
        memory.view(np.uint32)[1, token // 32] |= np.uint32(1 << token % 32)
    guide.settle(Masks(memory.data, 4, 1), 1)
    assert not memory[0].any()
    return set(np.flatnonzero(np.unpackbits(memory[1].view(np.uint8), bitorder="little")).tolist())


ALL = set(range(128))


def test_a_guide_takes_what_is_forced_before_it_is_committed() -> None:
    guide = guide_of(FakeMatcher([31, 32, 7]))
    assert guide.knows(0)
    assert not guide.knows(1)
    assert settled(guide, 31) == {31}
    assert guide.knows(1)
    assert settled(guide, 32) == {32}
    assert list(guide.forced) == [31, 32]
    assert settled(guide, 7, 9) == {7, 9}
    assert not guide.knows(3)
    assert guide.commit(31)
    assert guide.commit(32)
    assert not guide.commit(7), "it ends with it"
    assert guide.has_ended
    assert not guide.error


def test_an_end_that_is_forced_comes_with_its_commit() -> None:
    guide = guide_of(FakeMatcher([5, 6]))
    settled(guide, 5)
    settled(guide, 6)
    assert guide.has_ended
    assert guide.commit(5), "one more comes"
    assert not guide.commit(6)


def test_a_rank_that_chose_another_than_what_was_forced_is_told() -> None:
    guide = guide_of(FakeMatcher([5, 6]))
    settled(guide, 5)
    assert not guide.commit(6)
    assert guide.error == "token 6 was chosen, where its grammar leaves 5 alone"
    assert not guide.commit(5)


def test_a_token_that_the_grammar_does_not_take_is_told_in_a_line() -> None:
    guide = guide_of(FakeMatcher([5, 6]))
    assert not guide.commit(6)
    assert guide.error == "its grammar does not take token 6: no 6 here"


def test_nothing_that_could_come_next_is_an_error_and_leaves_a_token_to_choose() -> None:
    guide = guide_of(FakeMatcher([5]))
    assert settled(guide) == ALL
    assert guide.error == "its grammar leaves no token that could come next"
    assert not guide.commit(5)


def test_a_mask_that_could_not_be_made_is_an_error() -> None:
    guide = guide_of(FakeMatcher([5], "out of fuel\nbacktrace"))
    assert settled(guide, 3, 4) == ALL
    assert guide.error == "its grammar is too complex: out of fuel"


@pytest.mark.parametrize(
    ("min_tokens", "allowed", "left"),
    [
        (0, {3, 40, 96}, {3, 40, 96}),
        (1, {3, 40, 96}, {3}),
        (1, {40, 96}, {40, 96}),
        (1, {3}, {3}),
    ],
)
def test_an_end_is_late_unless_nothing_else_is_left(
    min_tokens: int, allowed: set[int], left: set[int]
) -> None:
    guide = guide_of(FakeMatcher([3, 40]), (40, 96), min_tokens)
    assert settled(guide, *allowed) == left
    assert list(guide.forced) == (list(left) if len(left) == 1 else [])
    if not guide.forced:
        guide.commit(3)
    assert settled(guide, 40, 96) == {40, 96}, "min_tokens are there"
