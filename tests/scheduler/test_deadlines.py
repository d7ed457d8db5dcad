"""Deadlines chosen from what steps have taken."""

from __future__ import annotations

import pytest

from tpworker.ipc.deadlines import LONGEST_SECONDS, SHORTEST_SECONDS
from tpworker.scheduler.deadlines import FIRST_STEPS, MULTIPLE, SURE_MULTIPLE, Deadlines

SHORTEST = 5.0


def after(*steps: tuple[int, float]) -> Deadlines:
    deadlines = Deadlines(0.0, SHORTEST)
    for num_tokens, seconds in steps:
        deadlines.answered(num_tokens, seconds)
    return deadlines


def test_what_is_given_holds_whatever_steps_take() -> None:
    deadlines = Deadlines(0.25, SHORTEST)
    assert deadlines.is_given
    for _ in range(5):
        assert deadlines.of(100) == 0.25
        deadlines.answered(100, 400.0)


def test_nothing_is_chosen_before_the_first_steps_were_seen() -> None:
    deadlines = Deadlines(0.0, SHORTEST)
    for _ in range(FIRST_STEPS):
        assert deadlines.of(1) == LONGEST_SECONDS
        deadlines.answered(1, 0.001)
    assert deadlines.of(1) == SHORTEST


def test_quick_steps_have_the_shortest_deadline_and_slow_ones_a_multiple_of_what_they_took() -> None:
    deadlines = after((4, 0.01), (4, 0.02), (7, 1.2), (5, 0.01))
    assert deadlines.of(4) == deadlines.of(7) == pytest.approx(1.2 * MULTIPLE)
    assert after((1, 0.01), (1, 0.02)).of(1) == SHORTEST


def test_the_slowest_step_so_far_counts_for_all_that_are_as_large() -> None:
    deadlines = after((1, 2.0), (100, 0.5))
    for num_tokens in (1, 3, 64, 100):
        assert deadlines.of(num_tokens) == pytest.approx(2.0 * MULTIPLE)


def test_a_large_step_does_not_make_small_ones_wait() -> None:
    deadlines = after((1, 0.01), (512, 4.0), (1, 0.01))
    assert deadlines.of(1) == SHORTEST
    assert deadlines.of(600) == pytest.approx(4.0 * MULTIPLE)


def test_of_sizes_in_between_the_larger_counts() -> None:
    """However slow the smaller ones are not: a step of 100 tokens may take nearly as long as one of 512."""
    assert after((1, 0.1), (512, 4.0)).of(100) == pytest.approx(4.0 * MULTIPLE)
    assert after((512, 4.0), (512, 4.0)).of(1) == pytest.approx(4.0 * MULTIPLE)


def test_larger_steps_than_were_seen_are_taken_to_be_slower_by_as_much() -> None:
    deadlines = after((16, 0.2), (16, 0.2))
    assert deadlines.of(16) == SHORTEST
    assert deadlines.of(64) == pytest.approx(4 * 0.2 * MULTIPLE)
    assert deadlines.of(1 << 20) == LONGEST_SECONDS
    assert deadlines.of(1 << 31) == LONGEST_SECONDS


def test_no_deadline_is_longer_than_the_longest_unless_a_step_took_that_long() -> None:
    assert after((8, 20.0), (8, 1.0)).of(8) == LONGEST_SECONDS
    assert after((8, 50.0), (8, 1.0)).of(8) == pytest.approx(50.0 * SURE_MULTIPLE)
    assert after((8, 50.0), (8, 1.0)).of(1 << 10) == pytest.approx(50.0 * SURE_MULTIPLE)


def test_a_step_in_no_time_has_been_seen_too() -> None:
    assert after((8, 0.0), (8, 0.0)).of(8) == SHORTEST


def test_the_shortest_are_shorter_than_the_longest() -> None:
    assert all(0 < seconds < LONGEST_SECONDS for seconds in SHORTEST_SECONDS.values())
