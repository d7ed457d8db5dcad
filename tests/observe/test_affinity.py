"""Ranks keep to the CPUs near their GPUs, where that leaves them enough."""

from __future__ import annotations

import logging

import pytest

from tests.observe.fake_nvml import FakeGpu, FakeNvml
from tpworker.observe.affinity import near_cpus, ranges
from tpworker.observe.nvml import Gpu, Nvml, find_gpus


def gpus(*cpus: set[int] | None) -> tuple[Gpu, ...]:
    """GPUs that are near these CPUs."""
    fakes = [
        FakeGpu(f"GPU-{at}", cpus=(sum(1 << cpu for cpu in near or ()),)) for at, near in enumerate(cpus)
    ]
    return find_gpus(Nvml(FakeNvml(fakes)), {}).gpus


LOW, HIGH = set(range(8)), set(range(8, 16))
ALL = LOW | HIGH


def test_each_rank_keeps_to_its_side(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tpworker"):
        assert near_cpus(gpus(LOW, HIGH), ALL) == (LOW, HIGH)
    assert "rank 1 keeps to CPUs 8-15, near GPU 1" in caplog.text


def test_ranks_on_one_side_share_it() -> None:
    assert near_cpus(gpus(LOW, LOW, LOW, LOW), ALL) == (LOW,) * 4


def test_too_few_cpus_are_worse_than_distant_ones(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tpworker"):
        assert near_cpus(gpus(LOW, LOW, LOW, LOW, LOW, HIGH), ALL) == (None,) * 5 + (HIGH,)
    assert "too few for the 5 ranks there" in caplog.text
    assert near_cpus(gpus({0}), ALL) == (None,)


def test_what_is_allowed_already_is_only_narrowed() -> None:
    assert near_cpus(gpus(LOW, HIGH), {2, 3, 4, 5, 9}) == ({2, 3, 4, 5}, None)
    assert near_cpus(gpus(LOW), HIGH) == (None,)


def test_where_nothing_can_be_chosen_nothing_is_done() -> None:
    assert near_cpus(gpus(ALL, ALL), ALL) == (None, None)
    assert near_cpus(gpus(None, HIGH), ALL) == (None, HIGH)
    assert near_cpus((), ALL) == ()


def test_sets_are_written_as_the_kernel_does() -> None:
    assert ranges({0, 1, 2, 3, 8, 10, 11}) == "0-3,8,10-11"
    assert ranges(frozenset()) == ""
