"""How steps are filled: what is learnt of their times, what is chosen, what simulated clients see of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.common.report import quantile
from benchmarks.steps.fill import Load, simulate
from tests.scheduler.helpers import VOCAB, World, expected, submit
from tpworker.ipc.messages import StepResult, StepTiming
from tpworker.ipc.step_sizes import step_ladder
from tpworker.scheduler.deadlines import Deadlines
from tpworker.scheduler.filling import (
    FEWEST,
    FIRST_GUESS,
    MOST_SAVED,
    MUCH_PADDING,
    SAVED_AT_FIRST,
    Filling,
)
from tpworker.scheduler.inflight import InFlight, InFlightPlans

MOST = 8192
TOKEN, PLAIN = 20e-6, 5e-3  # seconds


def filling(**changes: object) -> Filling:
    """That knows what steps take."""
    made = Filling(MOST, **{"target_itl": 0.035, "target_ttft": 0.4, **changes})  # type: ignore[arg-type]
    for decodes in (1, 16, 200):
        made.answered(decodes, 0, PLAIN)
    for count in (64, 512, 2000, 8000):
        made.answered(0, count, count * TOKEN)
    made.saved = 0.0
    return made


def test_where_nothing_decodes_a_step_is_as_large_as_it_may_be() -> None:
    assert filling().choose(0, 0, 100_000) == MOST
    assert Filling(MOST, 0.035, 0.4).choose(0, 0, 100_000) == MOST


def test_what_decodes_gets_its_tokens_in_time() -> None:
    made = filling()
    assert made.choose(16, 16, 9000) == pytest.approx((0.035 - PLAIN) / TOKEN, abs=1)
    assert made.choose(16, 16, 300) == pytest.approx(
        (0.035 - PLAIN) / TOKEN, abs=1
    )  # no more than wait, anyway
    assert filling(target_itl=0.105).choose(16, 16, 9000) == pytest.approx(5000, abs=1)


def test_a_slow_device_has_longer_steps_than_the_target() -> None:
    made = Filling(512, 0.035, 100.0)
    made.answered(4, 0, 0.1)
    made.answered(4, 512, 1.3)
    made.saved = 0.0
    assert made.choose(4, 4, 2000) == int(0.2 / (1.2 / 512))
    made.answered(4, 0, 30.0)
    assert made.choose(4, 4, 2000) >= FEWEST


def test_before_anything_is_known_it_is_a_guess() -> None:
    made = Filling(MOST, 0.035, 0.4)
    made.saved = 0.0
    assert made.choose(5, 5, 3000) == FIRST_GUESS


def test_a_backlog_beyond_the_target_makes_steps_large() -> None:
    made = filling(target_ttft=0.2)
    assert made.choose(100, 100, 9_900) < MOST - 100
    assert made.choose(100, 100, 10_100) == MOST - 100
    assert made.saved == 0


def test_slow_tokens_are_bought_with_those_that_came_in_time() -> None:
    made = filling(target_ttft=100.0)
    assert made.choose(10, 10, 9000) < 2000
    for _ in range(101):
        made.answered(20, 0, PLAIN)
    assert made.saved == pytest.approx(10.1)
    assert made.choose(10, 10, 9000) == MOST - 10
    assert made.saved == pytest.approx(0.1)
    made.answered(1000, 8000, 0.2)  # a slow step earns nothing
    assert made.saved == pytest.approx(0.1)
    for _ in range(100):
        made.answered(2000, 0, PLAIN)
    assert made.saved == MOST_SAVED
    assert Filling(MOST, 0.035, 0.4).saved == SAVED_AT_FIRST


def test_a_step_that_leaves_some_has_a_captured_size() -> None:
    ladder = step_ladder(MOST)
    made = filling(ladder=ladder)
    count = made.choose(16, 16, 9000)
    assert count + 16 in ladder
    assert 1300 < count <= 1500
    assert made.choose(0, 0, 2048 + 80) == 2048  # else 176 of 2304 would be padding
    assert made.choose(0, 0, 2304 - MUCH_PADDING) >= 2304 - MUCH_PADDING
    assert made.choose(0, 0, 100) >= 100


@given(
    most=st.integers(16, 10_000),
    decodes=st.integers(0, 256),
    width=st.integers(1, 5),
    waiting=st.integers(1, 100_000),
    times=st.lists(st.tuples(st.integers(0, 256), st.integers(0, 9000), st.floats(1e-5, 100.0)), max_size=20),
    has_ladder=st.booleans(),
)
def test_some_of_what_waits_is_always_taken_and_never_more_than_there_is_room_for(
    most: int, decodes: int, width: int, waiting: int, times: list[tuple[int, int, float]], has_ladder: bool
) -> None:
    rows = min(decodes * width, most - 1)
    made = Filling(most, 0.035, 0.4, step_ladder(most) if has_ladder else ())
    for one in times:
        made.answered(*one)
    count = made.choose(min(decodes, rows), rows, waiting)
    assert min(FEWEST, most - rows, waiting) <= count <= most - rows


def test_what_is_learnt_settles_on_what_steps_take() -> None:
    made = Filling(MOST, 0.035, 0.4)
    made.answered(8, 1000, 9.0)  # the first of its kind: kernels were compiled
    made.answered(8, 0, 3.0)
    for _ in range(60):
        made.answered(8, 1000, 0.025)
        made.answered(8, 0, PLAIN)
    assert made.few(8) == pytest.approx((0.035 - PLAIN) / 20e-6, rel=0.01)


@pytest.mark.parametrize(
    ("load", "ttft_p50", "ttft_p99", "itl_p99"),
    [
        (Load(1024, 256, 16), 0.281, 0.416, 0.00713),
        (Load(1024, 256, 64), 0.585, 1.637, 0.191),
        (Load(8000, 16, 8), 0.649, 1.680, 0.225),
        (Load(2100, 128, 32, shared=2000), 0.173, 0.223, 0.0108),
        (Load(1024, 256, 300, rate=16.9, rounds=1), 0.062, 0.142, 0.0414),
    ],
    ids=str,
)
def test_simulated_clients_wait_no_longer_than_beside_the_peer(
    load: Load, ttft_p50: float, ttft_p99: float, itl_p99: float
) -> None:
    """Figures of vLLM 0.26 on one H200, of which a simulated one has the step times."""
    seen = simulate(load, "chosen")
    assert quantile(seen.ttft, 0.5) <= ttft_p50
    assert quantile(seen.ttft, 0.99) <= ttft_p99
    assert quantile(seen.itl, 0.99) <= itl_p99


def test_fixed_steps_do_lose_some_of_it() -> None:
    """Or the test above could not fail."""
    few = simulate(Load(1024, 256, 16), "2048")
    assert quantile(few.itl, 0.99) > 0.04
    many = simulate(Load(1024, 256, 64), "8192")
    assert quantile(many.ttft, 0.5) > 0.6


def test_it_is_known_beforehand_what_a_step_should_take() -> None:
    made = filling()
    assert made.expected(16, 0) == pytest.approx(PLAIN)
    assert made.expected(0, 2000) == pytest.approx(2000 * TOKEN)
    assert made.expected(16, 2000) == pytest.approx(PLAIN + 2000 * TOKEN)
    made = Filling(MOST, 0.035, 0.4)
    assert (made.expected(16, 0), made.expected(16, 2000)) == (0.0, 0.0)
    made.answered(16, 0, PLAIN)
    assert made.expected(16, 2000) == 0.0, "only half of it is known"


@pytest.mark.parametrize(("prompts", "ahead"), [(0, 4), (100, 3), (200, 2), (8000, 2)])
def test_no_more_is_planned_ahead_than_gives_the_host_time(prompts: int, ahead: int) -> None:
    """Decode steps of 2 ms, and prompts of 20 µs a token: as many as a lookahead of 3 allows, or 5 ms."""
    made = filling()
    for _ in range(60):
        made.answered(1, 0, 0.002)
    plans = InFlightPlans(3, Deadlines(1.0, 1.0), made)
    while plans.has_room():
        step = len(plans)
        plans.add(InFlight(step, [], [], False, (), [], prompts, 1, 0, [], []))
    assert len(plans) == ahead, "the one that runs, and what waits behind it"
    plans.answered(StepResult(0, 0, b"", StepTiming(0, 0, 0)))
    assert plans.has_room()
    unknown = InFlightPlans(3, Deadlines(1.0, 1.0))
    while unknown.has_room():
        unknown.add(InFlight(len(unknown), [], [], False, (), [], prompts, 1, 0, [], []))
    assert len(unknown) == 4


class TimedWorld(World):
    """Steps take as long as a device's, whose speed is a multiple of that in `filling`."""

    def __init__(self, scale: float, **changes: Any) -> None:
        options = {"max_num_batched_tokens": 512, "max_model_len": 1024, "max_num_seqs": 6, **changes}
        super().__init__(num_blocks=1500, target_itl=0.035, target_ttft=0.4, **options)
        self._scale, self._now = scale, 0.0
        self.chunks: list[int] = []
        """Tokens of prompts in each step that had any beside others that decode."""

    def execute(self) -> None:
        first = len(self.executed)
        super().execute()
        plans = self.executed[first:]
        for place, plan in enumerate(plans, len(self.answers) - len(plans)):
            count = sum(chunk.length for chunk in plan.chunks)
            if count and self.rank.num_decoding:
                self.chunks.append(count)
            seconds = self._scale * (PLAIN + count * TOKEN)
            timing = StepTiming(0, int(1e9 * self._now), int(1e9 * (self._now + seconds)))
            self._now += seconds
            self.answers[place] = replace(self.answers[place], timing=timing)


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=16),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    lookahead=st.integers(0, 3),
    num_drafts=st.sampled_from([0, 2]),
    has_graphs=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_every_prompt_is_computed_within_the_bound_and_outputs_are_the_same_at_any_speed(
    lengths: list[int], scale: float, lookahead: int, num_drafts: int, has_graphs: bool
) -> None:
    world = TimedWorld(scale, lookahead=lookahead, num_drafts=num_drafts, has_graphs=has_graphs)
    messages = [submit(i, [(i * 13 + j * j) % VOCAB for j in range(n)]) for i, n in enumerate(lengths)]
    for message in messages:
        world.submit(message)
        world.compose()
    world.run()  # no step is beyond the bound: World._check_budget
    for message in messages:
        assert world.tokens[message.request] == expected(message, 1024)


def test_chunks_beside_what_decodes_are_short_on_a_slow_device() -> None:
    longest = {}
    for scale in (0.1, 5.0):
        world = TimedWorld(scale, lookahead=0, max_num_batched_tokens=1024)
        world.submit(submit(0, [1], max_tokens=600))
        world.submit(submit(1, [1, 2, 3] * 230))
        while 1 not in world.finished:
            world.compose()
            world.answer()
        made = world.scheduler.filling
        assert made is not None
        made.saved, made._target_ttft = 0.0, 1e6
        world.chunks.clear()
        world.submit(submit(2, [4, 5, 6] * 230))
        while 2 not in world.finished:
            world.compose()
            world.answer()
        longest[scale] = max(world.chunks)
        world.run()
    assert longest[0.1] == 690
    assert longest[5.0] < 690 / 1.2
