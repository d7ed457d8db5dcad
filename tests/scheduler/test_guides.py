"""Masks are right, and come in time: not too early, and not later than they could. Without ranks."""

from __future__ import annotations

import os
import select
import time
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from tests.integration.guided import EOS, KINDS, TOKENIZER
from tests.scheduler.guided_world import GuidedWorld, expected, restarted
from tests.scheduler.helpers import submit
from tests.scheduler.test_process import Ready
from tpworker.grammar import Compiler, grammar_of
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.masks import TURNS
from tpworker.ipc.messages import Failed, StepOutput, Submit
from tpworker.scheduler.late import MasksUnwritten, StepTimeout
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
    num_drafts=st.sampled_from([0, 0, 1, 4]),
    seed=st.integers(0, 2**16),
)
def test_any_mix_is_held_to_its_grammars(
    requests: list[dict[str, Any]], lookahead: int, slots: int, num_blocks: int, num_drafts: int, seed: int
) -> None:
    """In any order of moves, with preemptions, aborts, restarts, and drafts of those that are not guided.

    See `GuidedWorld` for what is checked.
    """
    world = GuidedWorld(
        lookahead,
        num_blocks,
        seed=seed,
        max_num_seqs=slots,
        max_num_batched_tokens=16 * (1 + num_drafts),
        num_drafts=num_drafts,
    )
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


@pytest.mark.parametrize("lookahead", [0, 2])
def test_drafts_are_of_those_beside_that_are_not_guided(lookahead: int) -> None:
    world = GuidedWorld(lookahead, num_drafts=4, max_num_batched_tokens=80)
    grammars = (ENDLESS, None, HALF_FORCED, None)
    messages = [guided(i, grammar, (i,) * 6, max_tokens=40) for i, grammar in enumerate(grammars)]
    for message in messages:
        world.submit(message)
    world.ripen()
    world.run()
    for plan in world.executed:
        assert not plan.num_drafts or set(world.slots[plan.step].values()) & {1, 3}, "drafts for nobody"
    assert any(plan.num_drafts and len(world.slots[plan.step]) == 4 for plan in world.executed)
    check(world, messages)


# --------------------------------------------------------------------------------- when they are written


def start(messages: list[Submit], lookahead: int, **settings: Any) -> GuidedWorld:
    """All in slots; their prompts' plans, and as many after them as the lookahead allows, are launched."""
    world = GuidedWorld(lookahead, max_num_batched_tokens=64, **settings)
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
    world = start([guided(0, ENDLESS)], lookahead=1, step_timeout=0.01)
    world.work()
    world.answer()
    world.work()
    world.answer()
    if not is_written:
        world.scheduler.guides._all_known = lambda plan: False  # type: ignore[method-assign]
    world.scheduler.compose_ahead()
    time.sleep(0.03)
    error = StepTimeout if is_written else MasksUnwritten
    told = (
        r"^a step was not answered"
        if is_written
        else r"^step 2 was not answered .* masks have not been written"
    )
    with pytest.raises(error, match=told):
        world.scheduler.receive(Ready())  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- what is being compiled


def test_the_bell_is_silent_when_all_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the second was there before it rang for it: else a scheduler that is idle would not sleep."""
    world = GuidedWorld()
    guides, write, is_there, goes_on = world.scheduler.guides, os.eventfd_write, Event(), Event()

    def late(fd: int, count: int) -> None:
        if guides._compiled.qsize() == 2:
            is_there.set()
            assert goes_on.wait(60)
        write(fd, count)

    monkeypatch.setattr("tpworker.scheduler.guides.os.eventfd_write", late)
    for request in range(2):
        world.submit(guided(request, FORCED))
    assert is_there.wait(60)
    world.scheduler.take_compiled()
    goes_on.set()
    world.ripen()
    assert len(world.scheduler.composer.waiting) == 2
    assert not select.select([guides.bell], [], [], 0.05)[0]
    world.run()
    check(world, [guided(0, FORCED), guided(1, FORCED)])


def test_who_is_aborted_when_compiled_and_not_in_the_queue_yet_is_forgotten() -> None:
    world = GuidedWorld()
    messages = [guided(number, None) for number in range(4)]
    for message in (*messages, guided(4, FORCED)):
        world.submit(message)
    assert select.select([world.scheduler.guides.bell], [], [], 60)[0]
    world.abort(4)
    assert len(world.scheduler.composer.waiting) == 4
    world.ripen()
    assert len(world.scheduler.composer.waiting) == 4
    world.run()
    check(world, messages)


def test_what_is_aborted_before_its_turn_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, begins, goes_on, matcher = [], Event(), Event(), Compiler.matcher

    def slow(self: Compiler, grammar: str) -> LLMatcher:
        compiled.append(grammar)
        begins.set()
        assert goes_on.wait(60)
        return matcher(self, grammar)

    monkeypatch.setattr(Compiler, "matcher", slow)
    world = GuidedWorld()
    first = guided(0, FORCED)
    for message in (first, guided(1, ENDLESS)):
        world.submit(message)
    assert begins.wait(60)
    world.abort(1)
    goes_on.set()
    world.ripen()
    assert compiled == [FORCED]
    monkeypatch.undo()
    world.run()
    check(world, [first])


@pytest.mark.parametrize("error", [BaseException("a panic"), ValueError("no " * 1000)])
def test_what_goes_wrong_in_compiling_fails_a_request(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """And the next one is compiled all the same."""

    def raises(self: Compiler, grammar: str) -> LLMatcher:
        raise error

    world = GuidedWorld()
    monkeypatch.setattr(Compiler, "matcher", raises)
    world.submit(guided(0, FORCED))
    world.ripen()
    monkeypatch.undo()
    (failed,) = world.scheduler._committed
    assert isinstance(failed, Failed)
    assert failed.reason.startswith(f"{type(error).__name__}: {str(error)[:7]}")
    assert len(failed.reason) < 600
    world.scheduler._committed.clear()
    world.submit(guided(1, FORCED))
    world.ripen()
    world.run()
    check(world, [guided(1, FORCED)])


def test_an_output_whose_grammar_is_at_fault_does_not_end_well() -> None:
    """Every token may be chosen then, one that ends the output too."""
    world = start([guided(0, ENDLESS)], lookahead=0)
    world.work()
    guide = world.scheduler.composer.running[0].guide
    assert guide is not None
    guide.error = "it is too complex"
    world.scheduler.take(replace(world.answers[0], tokens=pack_int32([EOS])))
    failed, output = world.scheduler._committed
    assert isinstance(failed, Failed)
    assert failed.reason == guide.error
    assert isinstance(output, StepOutput)
    assert output.finished == ()
    world.close()
