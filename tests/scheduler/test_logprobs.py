"""Logprobs on their way through the scheduler: whose they are, whatever is chunked, preempted or dropped."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.helpers import VOCAB, World, choices, submit
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.messages import LOGPROB_ROW_BYTES, NO_LOGPROBS, Abort, Submit
from tpworker.scheduler import draft as draft_module
from tpworker.scheduler.inflight import ProtocolError
from tpworker.scheduler.requests import Request
from tpworker.testing.fake_rank import expected_output, logprob_row

PROMPT = list(range(1, 20))


def check(world: World, messages: list[Submit]) -> None:
    """Tokens, a row for each, and one for each of the prompt's but the first, where they were asked for."""
    for message in messages:
        known = unpack_int32(message.tokens).tolist()
        prompt = known[: len(known) - message.num_delivered]
        output = expected_output(prompt, message.sampling, VOCAB, 64)
        assert message.request in world.finished
        assert world.tokens[message.request] == output
        whole = prompt + output
        rows = [logprob_row(whole[:place], token) for place, token in enumerate(whole)]
        asked, asked_of_prompt = (
            count != NO_LOGPROBS
            for count in (message.sampling.num_logprobs, message.sampling.num_prompt_logprobs)
        )
        assert world.logprobs[message.request] == (rows[len(prompt) :] if asked else [])
        assert world.prompt_logprobs[message.request] == (rows[1 : len(prompt)] if asked_of_prompt else [])


def run(messages: list[Submit], **settings: Any) -> World:
    world = World(**settings)
    for message in messages:
        world.submit(message)
    world.run()
    check(world, messages)
    return world


@pytest.mark.parametrize("budget", range(4, 24))
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 18, 19])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_prompt_is_told_of_wherever_its_chunks_end(budget: int, length: int, lookahead: int) -> None:
    """One token, with nothing to tell of, up to chunks that end before, at and behind the last one."""
    asked = submit(1, PROMPT[:length], num_prompt_logprobs=5, num_logprobs=2, max_tokens=3)
    run([asked, submit(2, PROMPT)], lookahead=lookahead, max_num_batched_tokens=budget)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_prompt_that_is_told_of_is_computed_whatever_the_cache_holds(is_cached: bool) -> None:
    world = World(prefix_caching=is_cached)
    first, asked, third = submit(1, PROMPT), submit(2, PROMPT, num_prompt_logprobs=0), submit(3, PROMPT)
    for message in (first, asked, third):
        world.submit(message)
        while message.request not in world.finished:
            world.compose()
            world.answer()
    check(world, [first, asked, third])
    assert (world.cached[1], world.cached[2], world.cached[3]) == (0, 0, 16 if is_cached else 0)
    world.run()


def test_the_first_choice_is_told_of_the_prompt_and_the_others_share_it() -> None:
    first, *others = choices(1, 4, PROMPT, num_logprobs=1, num_prompt_logprobs=NO_LOGPROBS)
    told = submit(1, PROMPT, group=1, seed=1, num_logprobs=1, num_prompt_logprobs=3)
    assert first.group == told.group
    world = run([told, *others], max_num_batched_tokens=64)
    assert sum(chunk.length for plan in world.executed for chunk in plan.chunks) == 19 + 3 * 3


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("after", range(1, 12))
def test_a_request_that_is_preempted_begins_again_and_repeats_nothing(lookahead: int, after: int) -> None:
    """In the middle of its prompt too, with results on their way."""
    world = World(lookahead, max_num_batched_tokens=5)
    messages = [
        submit(1, PROMPT, num_prompt_logprobs=2, num_logprobs=1), submit(2, PROMPT[::-1]),
        submit(3, PROMPT[:9], num_prompt_logprobs=0),
    ]  # fmt: skip
    for message in messages:
        world.submit(message)
    steps = 0
    while world.answer() or world.compose():
        world.compose()
        steps += 1
        composer = world.scheduler.composer
        if steps == after and composer.running:
            composer._preempt(composer.running[0])
            composer.check_integrity()
    check(world, messages)
    world.run()


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize(
    ("num_steps", "num_told", "num_found"),
    [(1, 6, 4), (2, 12, 12), (4, 18, 16)],
    ids=["in the middle of a block", "at the end of one", "all"],
)
def test_what_has_been_told_is_not_computed_again(
    num_steps: int, num_told: int, num_found: int, is_cached: bool
) -> None:
    """Nor is what comes behind it found there, though another request has computed all of it."""
    world = World(3, max_num_batched_tokens=6, prefix_caching=is_cached)
    other, asked = submit(1, PROMPT, max_tokens=1), submit(2, PROMPT, num_prompt_logprobs=2)
    world.submit(other)
    while 1 not in world.finished:
        world.compose()
        world.answer()
    world.submit(asked)
    composer = world.scheduler.composer
    for _ in range(num_steps):
        composed = composer.compose(0, world.scheduler.next_step)
        assert composed is not None
        world.scheduler.stream(*composed)
        world.execute()
    (request,) = composer.running
    assert request.num_told == num_told
    while world.answer():
        pass
    composer._preempt(request)
    before = len(world.executed)
    world.run()
    check(world, [other, asked])
    (admission,) = [a for plan in world.executed[before:] for a in plan.admitted]
    assert admission.num_cached == num_found, "its own, if caching is off"
    assert (admission.sampling.num_prompt_logprobs == NO_LOGPROBS) == (num_told == len(PROMPT) - 1)


def test_chunks_that_are_told_of_are_bounded_in_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is one message. Those that ask for nothing have the rest of the budget."""
    monkeypatch.setattr(draft_module.Draft, "__init__", _with_room(7))
    messages = [submit(i, PROMPT, num_prompt_logprobs=1) for i in (1, 2)] + [submit(3, PROMPT)]
    world = run(messages, max_num_batched_tokens=40)
    asking = {1, 2}
    slots: dict[int, int] = {}
    lengths = []
    for plan in world.executed:
        slots |= {a.slot: i for i, a in enumerate(plan.admitted, len(slots) + 1)}
        lengths.append(sum(chunk.length for chunk in plan.chunks if slots[chunk.slot] in asking))
    assert max(lengths) == 7
    assert sum(lengths) == 2 * 19
    assert max(chunk.length for plan in world.executed for chunk in plan.chunks) == 19


def _with_room(room: int) -> Any:
    init = draft_module.Draft.__init__
    return lambda self, budget, num_drafts: init(self, budget, num_drafts, room)


def test_rows_of_who_has_ended_are_nobodys() -> None:
    """Aborted with rows on their way, ended by a stop token of late: each row goes to its own token."""
    output = expected_output(PROMPT, submit(2, PROMPT, num_logprobs=1).sampling, VOCAB, 64)
    stopped = submit(2, PROMPT, num_logprobs=1, stop_ids=pack_int32([output[2]]))
    messages = [submit(1, PROMPT, num_prompt_logprobs=1, num_logprobs=0), stopped, submit(3, PROMPT)]
    for moment in range(10):
        world = World(2, max_num_batched_tokens=8)
        for message in messages:
            world.submit(message)
        for _ in range(moment):
            world.compose()
            world.answer()
        world.compose()
        world.scheduler.take(Abort(0, 1))
        told = len(world.prompt_logprobs[1]), len(world.logprobs[1])
        world.run()
        check(world, messages[1:])
        assert (len(world.prompt_logprobs[1]), len(world.logprobs[1])) == told, "told of after the abort"


@pytest.mark.parametrize(("num_rows", "num_of_prompt"), [(0, 3), (2, 3), (1, 0), (1, 2), (1, 4)])
def test_a_result_with_the_wrong_number_of_rows_is_an_error(num_rows: int, num_of_prompt: int) -> None:
    world = World(0)
    world.submit(submit(1, PROMPT[:4], num_logprobs=1, num_prompt_logprobs=1))
    world.compose()
    right = world.answers.popleft()
    row = bytes(LOGPROB_ROW_BYTES)
    assert (len(right.logprobs), len(right.prompt_logprobs)) == (len(row), 3 * len(row))
    wrong = replace(right, logprobs=row * num_rows, prompt_logprobs=row * num_of_prompt)
    with pytest.raises(ProtocolError, match="bytes of logprobs for"):
        world.scheduler.take(wrong)
    world.board.close()


def test_nothing_is_looked_at_per_token_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def wants_logprobs(self: Request) -> bool:
        looked.append(self.id)
        return False

    monkeypatch.setattr(Request, "wants_logprobs", property(wants_logprobs))
    world = World(2)
    for number in range(3):
        world.submit(submit(number, PROMPT[:5], max_tokens=30))
    monkeypatch.setattr(world.scheduler.composer, "check_integrity", lambda: None)
    world.run()
    assert sum(len(tokens) for tokens in world.tokens.values()) == 90
    assert len(looked) == 2 * 3, "when it gets its slot and when it loses it"


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_whatever_happens_everybody_gets_their_own(data: st.DataObject) -> None:
    """Few blocks, small budgets, choices, prefix hits, aborts, restarts."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    world = World(
        draw.choice([0, 1, 2, 4]), num_blocks=draw.choice([18, 22, 64]), seed=draw.randrange(99),
        max_num_batched_tokens=draw.choice([4, 5, 9, 40]), prefix_caching=draw.random() < 0.7,
        num_drafts=draw.choice([0, 0, 1, 3]),
    )  # fmt: skip
    messages: list[Submit] = []
    for number in range(draw.randint(1, 9)):
        length = draw.choice([1, 2, 3, 4, 5, 12, 19])
        prompt = PROMPT[:length] if draw.random() < 0.6 else [draw.randrange(VOCAB) for _ in range(length)]
        asked = {
            "num_logprobs": draw.choice([NO_LOGPROBS, NO_LOGPROBS, 0, 20]),
            "num_prompt_logprobs": draw.choice([NO_LOGPROBS, 0, 3]), "max_tokens": draw.randint(1, 12),
        }  # fmt: skip
        first = 10 * number
        if draw.random() < 0.3:
            told = submit(first, prompt, group=first, seed=first, **asked)
            asked["num_prompt_logprobs"] = NO_LOGPROBS
            messages += [told, *choices(first, 3, prompt, **asked)[1:]]
        else:
            messages.append(submit(first, prompt, seed=draw.randrange(5), **asked))
    aborted = {message.request for message in messages if draw.random() < 0.15}
    for message in messages:
        world.submit(message)
        if draw.random() < 0.5:
            world.compose()
            world.answer()
        if message.request in aborted:
            world.scheduler.take(Abort(0, message.request))
    world.run()
    check(world, [message for message in messages if message.request not in aborted])
