"""The queue, and the order in which requests are served and preempted."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.scheduler.helpers import World, expected, submit
from tpworker.scheduler.queue import Queue
from tpworker.scheduler.requests import Key, Request


def request(priority: int, arrival: int) -> Request:
    return Request(submit(arrival, [1] * (1 + arrival % 5), priority=priority), 64, arrival)


class Model(RuleBasedStateMachine):
    """Against a sorted list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()
        self.model: list[Request] = []
        self.arrived = 0
        self.came_with: dict[Key, int] = {}  # how many tokens each had then

    @rule(priority=st.integers(-2, 2))
    def push(self, priority: int) -> None:
        self.model.append(request(priority, self.arrived))
        self.came_with[self.model[-1].key] = len(self.model[-1].tokens)
        self.queue.push(self.model[-1])
        self.arrived += 1

    @precondition(lambda self: self.model)
    @rule(again=st.booleans())
    def pop(self, again: bool) -> None:
        first = self.queue.pop()
        self.model.remove(first)
        assert all(first.key < other.key for other in self.model)
        if again:  # it was preempted, or parked
            self.queue.push(first)
            self.model.append(first)
            self.came_with[first.key] = len(first.tokens)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def get_a_token(self, data: st.DataObject) -> None:
        """That was in flight when it was preempted."""
        data.draw(st.sampled_from(self.model)).tokens.append(1)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.queue.remove(self.model.pop(data.draw(st.integers(0, len(self.model) - 1))))

    @invariant()
    def same(self) -> None:
        assert len(self.queue) == len(self.model)
        assert set(self.queue) == set(self.model)
        assert self.queue.num_tokens == sum(self.came_with[one.key] for one in self.model)
        if self.model:
            assert self.queue.first() is min(self.model, key=lambda one: one.key)
        assert len(self.queue._heap) <= 2 * len(self.model) + 1, "what was removed is kept for ever"


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


class CountingKey(tuple[int, int]):
    """A key that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other: Any) -> bool:
        CountingKey.comparisons += 1
        return tuple(self) < tuple(other)


def test_ten_thousand_that_wait_cost_a_logarithm() -> None:
    queue, requests = Queue(), [request(i * 7919 % 5, i) for i in range(10_000)]
    for one in requests:
        one.key = CountingKey(one.key)
        queue.push(one)
    for one in requests[::2]:
        queue.remove(one)
    for _ in range(1000):
        queue.push(queue.pop())
    while queue:
        queue.pop()
    assert CountingKey.comparisons < 10_000 * 4 * math.log2(10_000)


# ------------------------------------------------------------------------------ in the scheduler


def order_of_starts(world: World) -> list[int]:
    world.run()
    return list(world.cached)


def test_the_lowest_priority_starts_first_and_of_equals_who_came_first() -> None:
    world = World(max_num_seqs=1, lookahead=0)
    for number, priority in enumerate([0, 5, -3, 0, 5, -3]):
        world.submit(submit(number, [number], max_tokens=2, priority=priority))
    assert order_of_starts(world) == [2, 5, 0, 3, 1, 4]


def test_a_late_request_of_a_low_priority_overtakes_those_that_wait_but_not_those_that_run() -> None:
    world = World(max_num_seqs=2, lookahead=0)
    for number in range(4):
        world.submit(submit(number, [number], max_tokens=6))
    world.compose()
    world.submit(submit(9, [9], max_tokens=2, priority=-1))
    assert order_of_starts(world) == [0, 1, 9, 2, 3]


@pytest.mark.parametrize("lookahead", [0, 2])
def test_preemption_takes_the_highest_priority_and_of_equals_the_newest(lookahead: int) -> None:
    world = World(lookahead, num_blocks=13, prefix_caching=False)
    messages = [
        submit(number, [number] * 6, max_tokens=24, seed=number, priority=priority)
        for number, priority in enumerate([7, 0, 7, -7])
    ]
    for message in messages:
        world.submit(message)
    composer = world.scheduler.composer
    preempted: list[int] = []
    preempt = composer._preempt
    composer._preempt = lambda one: (preempted.append(one.id), preempt(one))  # type: ignore[method-assign,assignment,func-returns-value]
    world.run()
    for message in messages:
        assert world.tokens[message.request] == expected(message)
    assert preempted[:2] == [2, 0]
    assert 3 not in preempted
    assert list(world.finished)[:2] == [3, 1]


def test_equal_prompts_share_blocks_only_under_the_same_salt() -> None:
    world = World(num_blocks=128, max_num_seqs=8)
    prompt = list(range(20))
    for number, salt in enumerate(["", "a", "b", "a", ""]):
        world.submit(submit(number, prompt, salt=salt, seed=number))
        world.compose()
        world.answer()
        world.compose()
    world.run()
    assert world.cached == {0: 0, 1: 0, 2: 0, 3: 16, 4: 16}
