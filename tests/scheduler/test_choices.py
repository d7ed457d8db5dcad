"""Choices of one request: one prefill for all, and nothing else differs from requests of their own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.helpers import VOCAB, World, choices, expected, run_with_aborts, submit
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Abort, Submit
from tpworker.scheduler import composer as composer_module
from tpworker.scheduler.requests import Request, State

SIZE = 4
PROMPT = list(range(1, 19))
"""18 tokens: 4 whole blocks that can be shared, and 2 tokens left."""


def finish(world: World, messages: list[Submit]) -> None:
    world.run()
    for message in messages:
        assert world.tokens[message.request] == expected(message), message
        assert message.request in world.finished


def submit_all(world: World, messages: list[Submit]) -> None:
    for message in messages:
        world.submit(message)


def prefilled(world: World) -> int:
    """Tokens of prompts that were computed."""
    return sum(chunk.length for plan in world.executed for chunk in plan.chunks)


def running(world: World) -> dict[int, Request]:
    return {request.id: request for request in world.scheduler.composer.running}


def num_used(world: World) -> int:
    pool = world.scheduler.composer.pool
    return pool.num_usable - pool.num_free


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_the_prompt_is_computed_once_and_its_blocks_are_shared(caching: bool, lookahead: int) -> None:
    world = World(lookahead, max_num_batched_tokens=64, prefix_caching=caching)
    messages = choices(1, 4, PROMPT)
    submit_all(world, messages)
    while len(running(world)) < 4:
        world.compose()
        world.answer()
    prompts = [request.blocks[:4] for request in running(world).values()]
    assert prompts == [prompts[0]] * 4
    own = [len(request.blocks) - 4 for request in running(world).values()]
    assert num_used(world) == 4 + sum(own)
    finish(world, messages)
    assert prefilled(world) == 18 + 3 * 2
    assert [len(plan.admitted) for plan in world.executed[:2]] == [1, 3], "from the very next plan on"
    load = world.scheduler.load()
    assert (load.prompt_tokens, load.cached_tokens) == (18, 0), "the prompt counts once"


def test_a_prompt_that_ends_with_a_block_leaves_that_block_to_each() -> None:
    world = World(max_num_batched_tokens=64)
    messages = choices(1, 3, PROMPT[:16])
    submit_all(world, messages)
    finish(world, messages)
    assert prefilled(world) == 16 + 2 * SIZE


def test_a_prompt_shorter_than_a_block_makes_nobody_wait() -> None:
    world = World(max_num_batched_tokens=64)
    messages = choices(1, 4, PROMPT[:SIZE])  # its last token's logits are needed: there is nothing to share
    submit_all(world, messages)
    finish(world, messages)
    assert len(world.executed[0].admitted) == 4


@pytest.mark.parametrize("caching", [True, False])
def test_others_overtake_choices_that_wait_for_their_prompt(caching: bool) -> None:
    world = World(lookahead=0, max_num_batched_tokens=16, max_num_seqs=6, prefix_caching=caching)
    messages = [*choices(1, 3, list(range(40))), submit(9, [45, 46, 47])]
    submit_all(world, messages)
    for _ in range(3):  # 16, 16, and the rest of the prompt, which leaves room for the other
        assert set(running(world)) == ({1} if world.executed else set())
        world.compose()
        world.answer()
    assert set(running(world)) == {1, 9}
    world.compose()
    assert set(running(world)) == {1, 2, 3, 9}
    finish(world, messages)


def test_a_prompt_that_was_cached_before_makes_nobody_wait() -> None:
    world = World(lookahead=0, max_num_batched_tokens=64)
    submit_all(world, [submit(0, PROMPT, max_tokens=1)])
    while 0 not in world.finished:
        world.compose()
        world.answer()
    before = len(world.executed)
    messages = choices(1, 3, PROMPT)
    submit_all(world, messages)
    finish(world, messages)
    assert len(world.executed[before].admitted) == 3
    assert world.cached == {0: 0, 1: 16, 2: 16, 3: 16}
    load = world.scheduler.load()
    assert (load.prompt_tokens, load.cached_tokens) == (36, 16)


@pytest.mark.parametrize("caching", [True, False])
def test_a_first_choice_that_ends_at_once_leaves_its_blocks_to_the_others(caching: bool) -> None:
    for slots in (1, 4):
        world = World(lookahead=2, max_num_seqs=slots, max_num_batched_tokens=64, prefix_caching=caching)
        messages = choices(1, 3, PROMPT, max_tokens=1)
        submit_all(world, messages)
        finish(world, messages)
        assert prefilled(world) == 18 + 2 * 2


@pytest.mark.parametrize("caching", [True, False])
def test_without_caching_too_only_choices_share(caching: bool) -> None:
    world = World(max_num_batched_tokens=64, max_num_seqs=8, num_blocks=128, prefix_caching=caching)
    messages = [*choices(1, 2, PROMPT), *choices(11, 2, PROMPT), submit(21, PROMPT)]
    for message in messages:
        world.submit(message)
        world.compose()
        world.answer()
    finish(world, messages)
    alone = 3 if not caching else 1
    assert prefilled(world) == alone * 18 + (5 - alone) * 2


@pytest.mark.parametrize("when", ["waiting", "computing", "decoding", "sibling"])
@pytest.mark.parametrize("caching", [True, False])
def test_abort_of_a_choice(when: str, caching: bool) -> None:
    world = World(lookahead=0, max_num_batched_tokens=8, prefix_caching=caching)
    messages = choices(1, 3, PROMPT)
    submit_all(world, messages)
    state = {"waiting": State.WAITING, "decoding": State.DECODING}.get(when, State.PREFILLING)
    requests = {request.id: request for request in world.scheduler.composer.waiting}
    while requests[1].state is not state:
        world.compose()
        world.answer()
    doomed = 2 if when == "sibling" else 1
    world.scheduler.take(Abort(0, doomed))
    world.scheduler.composer.check_integrity()
    finish(world, [message for message in messages if message.request != doomed])
    if when in ("computing", "decoding"):  # what it had computed is not computed again
        assert prefilled(world) < 2 * 18


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("lookahead", [0, 2, 4])
def test_preemption_of_choices(caching: bool, lookahead: int) -> None:
    world = World(lookahead, num_blocks=15, prefix_caching=caching)
    messages = [*choices(1, 3, PROMPT[:9], max_tokens=30), *choices(11, 2, PROMPT[5:], max_tokens=20)]
    submit_all(world, messages)
    finish(world, messages)
    assert world.scheduler.composer.num_preemptions > 0


def test_preemption_of_the_choice_that_computes_lets_another_compute() -> None:
    world = World(lookahead=0, max_num_batched_tokens=8, num_blocks=32)
    messages = [submit(9, [40], max_tokens=30, priority=-1), *choices(1, 3, list(range(20)))]
    submit_all(world, messages)
    world.compose()
    world.answer()
    world.compose()
    world.answer()
    composer = world.scheduler.composer
    assert running(world)[1].state is State.PREFILLING
    composer._preempt(running(world)[1])
    composer.check_integrity()
    finish(world, messages)


def test_choices_come_back_after_a_restart_without_the_first() -> None:
    """Each Submit is whole: what its client has already is behind the prompt."""
    messages = choices(1, 4, PROMPT, max_tokens=12)
    world = World(max_num_batched_tokens=64)
    for message, delivered in zip(messages[1:], (0, 3, 9), strict=True):
        whole = expected(message)
        world.tokens[message.request] = whole[:delivered]
        world.scheduler.take(
            submit(
                message.request, PROMPT + whole[:delivered], delivered, group=1, seed=message.request,
                max_tokens=12,
            )
        )  # fmt: skip
    finish(world, messages[1:])
    assert prefilled(world) == 18 + (2 + 3) + (2 + 9)


def test_a_choice_that_comes_back_to_a_cached_prompt_makes_nobody_wait() -> None:
    """What it computes again are its own tokens."""
    world = World(lookahead=0, max_num_batched_tokens=64)
    submit_all(world, [submit(0, PROMPT, max_tokens=1)])
    world.compose()
    world.answer()
    messages = choices(1, 3, PROMPT, max_tokens=14)
    whole = expected(messages[0])
    world.tokens[1] = whole[:12]
    world.scheduler.take(submit(1, PROMPT + whole[:12], 12, group=1, seed=1, max_tokens=14))
    submit_all(world, messages[1:])
    finish(world, messages)
    assert [len(plan.admitted) for plan in world.executed[:2]] == [1, 3]


def test_one_plan_admits_no_more_known_tokens_than_a_message_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composer_module, "MAX_ADMITTED_TOKENS", 40)
    world = World(max_num_batched_tokens=64, max_num_seqs=8, num_blocks=200)
    messages = [*choices(1, 6, PROMPT), submit(9, list(range(41)))]
    submit_all(world, messages)
    finish(world, messages)
    admitted = [[len(a.tokens) // 4 for a in plan.admitted] for plan in world.executed]
    assert [lengths for lengths in admitted if lengths] == [[18], [18, 18], [18, 18], [18], [41]]


group_strategy = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 2), min_size=1, max_size=30),
        "choices": st.integers(1, 5),
        "max_tokens": st.integers(1, 20),
        "stops": st.lists(st.integers(0, VOCAB - 1), max_size=3),
        "priority": st.integers(-1, 1),
        "salt": st.sampled_from(["", "a"]),
        "aborts": st.dictionaries(st.integers(0, 4), st.integers(0, 12), max_size=2),
    }
)


def messages_of(number: int, group: dict[str, Any], prompt: list[int]) -> list[Submit]:
    options: dict[str, Any] = {name: group[name] for name in ("max_tokens", "priority", "salt")}
    options["stop_ids"] = pack_int32(group["stops"])
    if group["choices"] == 1:
        return [submit(10 * number, prompt, seed=10 * number, **options)]
    return choices(10 * number, group["choices"], prompt, **options)


@settings(max_examples=150, deadline=None)
@given(
    groups=st.lists(group_strategy, min_size=1, max_size=5),
    lookahead=st.integers(0, 4),
    slots=st.integers(1, 5),
    budget=st.integers(4, 20),
    num_blocks=st.integers(15, 40),
    caching=st.booleans(),
    num_drafts=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 2**16),
)
def test_any_choice_gives_what_it_gives_alone(
    groups: list[dict[str, Any]],
    lookahead: int,
    slots: int,
    budget: int,
    num_blocks: int,
    caching: bool,
    num_drafts: int,
    seed: int,
) -> None:
    """The oracle of test_process.py: with few blocks and slots, priorities, salts, aborts of any choice."""
    world = World(
        lookahead,
        num_blocks,
        SIZE,
        seed,
        max_num_seqs=slots,
        max_num_batched_tokens=max(budget, slots) * (1 + num_drafts),
        prefix_caching=caching,
        num_drafts=num_drafts,
    )
    messages: dict[int, Submit] = {}
    aborts: dict[int, int] = {}
    for number, group in enumerate(groups):
        for message in messages_of(number, group, group["prompt"]):
            messages[message.request] = message
            world.submit(message)
        aborts |= {10 * number + choice: turn for choice, turn in group["aborts"].items()}
        world.compose()
        if number % 2:
            world.answer()
    run_with_aborts(world, messages, aborts)
    assert not world.scheduler.composer._computing


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(group_strategy, min_size=1, max_size=4),
    lookahead=st.integers(0, 4),
    slots=st.integers(1, 8),
    budget=st.integers(4, 40),
    caching=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_with_blocks_enough_every_prompt_is_computed_once(
    groups: list[dict[str, Any]], lookahead: int, slots: int, budget: int, caching: bool, seed: int
) -> None:
    """Whatever the slots, the chunks and how soon a choice ends."""
    world = World(
        lookahead,
        600,
        SIZE,
        seed,
        max_num_seqs=slots,
        max_num_batched_tokens=max(budget, slots),
        prefix_caching=caching,
    )
    due = 0
    for number, group in enumerate(groups):
        prompt = [40 + number, *group["prompt"]]  # so that no two groups share
        submit_all(world, messages_of(number, group, prompt))
        rest = len(prompt) - (len(prompt) - 1) // SIZE * SIZE
        due += len(prompt) + (group["choices"] - 1) * rest
    world.run()
    assert prefilled(world) == due
