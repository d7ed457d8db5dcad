"""What may be said, in which types; and that it is Python's own types afterwards."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tpworker import ConfigError, InvalidRequest, RuntimeConfig, SamplingParams
from tpworker.config import MAX_CHOICES, MAX_SEED, choice_seed
from tpworker.ipc.child import pack_boot
from tpworker.runtime.settings import scheduler_settings


class Size(IntEnum):
    FIVE = 5


INTEGERS: list[Any] = [
    np.int64(5), np.int8(5), np.uint16(5), np.array(5), torch.tensor(5), torch.tensor(5).int(), Size.FIVE
]  # fmt: skip
REALS: list[Any] = [
    np.float32(0.5), np.float64(0.5), np.float16(0.5), np.longdouble(0.5), np.array(0.5), torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.bfloat16), Fraction(1, 2), Decimal("0.5"),
]  # fmt: skip


@pytest.mark.parametrize("five", INTEGERS, ids=repr)
def test_integers_of_any_library_are_integers(five: Any) -> None:
    names = ("max_tokens", "top_k", "seed", "min_tokens", "n", "priority")
    params = SamplingParams(**dict.fromkeys(names, five), stop_token_ids=[five, 6], temperature=five)
    assert params == SamplingParams(**dict.fromkeys(names, 5), stop_token_ids=[5, 6], temperature=5)
    for name in (*names, "temperature"):
        assert type(getattr(params, name)) is int
    assert [type(i) for i in params.stop_token_ids] == [int, int]
    assert hash(params) == hash(dataclasses.replace(params))
    config = RuntimeConfig(max_num_seqs=five, seed=five, max_model_len=five, step_timeout=five)
    assert config == RuntimeConfig(max_num_seqs=5, seed=5, max_model_len=5, step_timeout=5)
    assert "np." not in repr(config)


@pytest.mark.parametrize("half", REALS, ids=repr)
def test_real_numbers_of_any_library_are_floats(half: Any) -> None:
    params = SamplingParams(temperature=half, top_p=half)
    assert params == SamplingParams(temperature=0.5, top_p=0.5)
    assert (type(params.temperature), type(params.top_p)) == (float, float)
    config = RuntimeConfig(gpu_memory_utilization=half, step_timeout=half)
    assert (type(config.step_timeout), config.gpu_memory_utilization) == (float, 0.5)
    with pytest.raises(InvalidRequest, match="top_k="):
        SamplingParams(top_k=half)
    with pytest.raises(ConfigError, match=r"max_num_seqs=.* must be int or None"):
        RuntimeConfig(max_num_seqs=half)


@pytest.mark.parametrize(
    "ids", [np.array([5, 6]), torch.tensor([5, 6]), (np.int32(5), 6), range(5, 7)], ids=repr
)
def test_arrays_are_sequences_of_ids(ids: Any) -> None:
    assert SamplingParams(stop_token_ids=ids).stop_token_ids == (5, 6)


@pytest.mark.parametrize("true", [np.bool_(True), np.array(True), torch.tensor(True), True], ids=repr)
def test_truth_of_any_library_is_a_bool_and_no_number(true: Any) -> None:
    params = SamplingParams(ignore_eos=true, detokenize=true)
    assert (params.ignore_eos, params.detokenize) == (True, True)
    assert RuntimeConfig(prefix_caching=true).prefix_caching is True
    for name in ("max_tokens", "temperature", "top_p", "top_k", "seed", "min_tokens", "n", "priority"):
        with pytest.raises(InvalidRequest, match=f"{name}="):
            SamplingParams(**{name: true})
    with pytest.raises(InvalidRequest, match="stop_token_ids="):
        SamplingParams(stop_token_ids=[true])
    for name in ("max_num_seqs", "step_timeout", "seed", "max_model_len"):
        with pytest.raises(ConfigError, match=f"{name}="):
            RuntimeConfig(**{name: true})


@pytest.mark.parametrize(
    "value",
    [np.array([5]), torch.tensor([5]), np.array([0.5]), "5", [5], 5j, object(), np.datetime64(5, "s")],
    ids=repr,
)
def test_what_is_no_number_is_refused(value: Any) -> None:
    for name in ("max_tokens", "temperature", "min_tokens", "n", "priority"):
        with pytest.raises(InvalidRequest, match=f"{name}="):
            SamplingParams(**{name: value})
    with pytest.raises(InvalidRequest, match="stop_token_ids="):
        SamplingParams(stop_token_ids=[value])
    for name in ("max_num_seqs", "step_timeout"):
        with pytest.raises(ConfigError, match=f"{name}="):
            RuntimeConfig(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), 10**400, -(10**400)])
def test_numbers_that_are_not_finite_or_too_large_are_refused(value: Any) -> None:
    for name in ("temperature", "top_p"):
        with pytest.raises(InvalidRequest, match=f"{name}="):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("value", [5, None, np.array(5), torch.tensor(5), 5.0])
@pytest.mark.parametrize("name", ["stop", "stop_token_ids"])
def test_what_is_no_sequence_is_refused_as_everything_is(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"{name}=.*must be a") as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name


def test_what_they_come_to_crosses_to_the_processes() -> None:
    """msgpack takes Python's own types alone."""
    config = RuntimeConfig(
        max_num_seqs=np.int64(8), step_timeout=np.float32(2.5), prefix_caching=np.bool_(True)
    )
    settings = scheduler_settings(config, "cpu", 512)
    assert (settings.max_num_seqs, settings.step_timeout, settings.prefix_caching) == (8, 2.5, True)
    from tests.ipc.test_child import SCHEDULER_BOOT

    assert pack_boot(dataclasses.replace(SCHEDULER_BOOT, settings=settings))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("n", [1, 128], [0, -1, 129, None]),
        ("priority", [-(2**31) + 1, 2**31 - 1], [-(2**31), 2**31, None]),
        ("cache_salt", [None, "s", "ü" * 256], ["", "s" * 257, 5, b"s", "\udc80"]),
    ],
)
def test_bounds_from_both_sides(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(InvalidRequest, match=f"{name}=.*must be") as caught:
            SamplingParams(**{name: value})
        assert caught.value.parameter == name


def test_a_scheduling_policy_is_one_of_two() -> None:
    assert RuntimeConfig().scheduling_policy == "fcfs"
    assert RuntimeConfig(scheduling_policy="priority").scheduling_policy == "priority"
    with pytest.raises(ConfigError, match="scheduling_policy='lpm': must be fcfs or priority"):
        RuntimeConfig(scheduling_policy="lpm")  # type: ignore[arg-type]


def test_each_choice_has_a_seed_of_its_own_and_the_first_the_requests() -> None:
    params = SamplingParams(n=4, seed=7, temperature=0.5)
    assert params.of_choice(0) == SamplingParams(seed=7, temperature=0.5)
    seeds = {choice_seed(seed, index) for seed in range(-50, 50) for index in range(MAX_CHOICES)}
    assert len(seeds) == 100 * MAX_CHOICES, "neighbouring seeds have a choice in common"
    assert choice_seed(7, 1) == 4595731978703777594, "a promise: what was generated can be had again"
    for extreme in (MAX_SEED, -MAX_SEED - 1):
        assert SamplingParams(n=2, seed=extreme).of_choice(1).n == 1
    with pytest.raises(InvalidRequest, match="seed=None"):
        SamplingParams(n=4).of_choice(1)
    with pytest.raises(InvalidRequest, match="the choices are 0 to 3, and not 4"):
        params.of_choice(4)
