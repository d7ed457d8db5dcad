"""What happens in a second, from two snapshots."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.top.snapshots import snapshot
from tpworker.top.rates import History, RankRates, Rates, rates_of


def test_what_happens_in_a_second() -> None:
    rates = rates_of(snapshot(3), snapshot(5))
    assert rates.seconds == 2
    assert (rates.steps, rates.output_tokens, rates.prompt_tokens) == (100, 800, 50)
    assert rates.gap_seconds == pytest.approx(4e-6)
    assert rates.busy_share == pytest.approx(0.96)
    assert rates.publish_seconds == pytest.approx(30e-6)
    assert rates.skew_seconds == pytest.approx(1e-4)
    assert (rates.acceptance, rates.cached_share) == (0.75, 0.4)
    assert (rates.runtime_cpu, rates.scheduler_cpu) == (25, 50)
    first, second = rates.ranks
    assert (first.cpu, first.barrier_share, first.last_share) == (100, pytest.approx(0.01), 0)
    assert (second.cpu, second.barrier_share, second.last_share) == (100, 0, 1)


def test_where_nothing_happens_there_is_nothing_to_tell() -> None:
    before = snapshot(3)
    rates = rates_of(before, replace(before, clock=before.clock + 1))
    assert (rates.steps, rates.output_tokens, rates.busy_share) == (0, 0, 0)
    assert {rates.gap_seconds, rates.skew_seconds, rates.acceptance, rates.publish_seconds} == {None}
    assert [rank.last_share for rank in rates.ranks] == [None, None]
    assert rates_of(before, before) == Rates(ranks=(RankRates(), RankRates()))
    gone = replace(before.scheduler, cpu_seconds=None)
    assert rates_of(before, replace(snapshot(4), scheduler=gone)).scheduler_cpu is None


def test_one_rank_waits_for_nobody() -> None:
    before, after = (replace(one, ranks=one.ranks[:1]) for one in (snapshot(3), snapshot(5)))
    assert rates_of(before, after).skew_seconds is None


def test_rates_are_those_of_some_seconds() -> None:
    history = History()
    seconds = [history.add(snapshot(second)).seconds for second in (0, 1, 2, 3, 4, 10, 11, 13)]
    assert seconds == [0, 1, 2, 3, 3, 6, 7, 3]


def test_what_counts_anew_is_compared_with_nothing() -> None:
    history = History()
    history.add(snapshot(5))
    after = replace(snapshot(0), clock=60.0)
    assert history.add(replace(snapshot(10), generation=3)).seconds == 0, "though it has counted more by now"
    assert history.add(replace(snapshot(11), ranks=())).seconds == 0
    assert history.add(snapshot(12)).seconds == 0
    assert history.add(replace(snapshot(13), runtime=replace(after.runtime, pid=1))).seconds == 0
