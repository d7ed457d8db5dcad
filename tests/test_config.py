"""What may be said, in which types; and that it is Python's own types afterwards."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tpworker import ConfigError, InvalidRequest, Runtime, RuntimeConfig, SamplingParams, SyncRuntime
from tpworker.config import MAX_NUM_SEQS, MAX_PROMPT_LOOKUP, MAX_SPECULATIVE_TOKENS
from tpworker.ipc.child import MAX_LOOKUP, pack_boot
from tpworker.ipc.messages import MAX_DRAFTS, MAX_SLOTS
from tpworker.keywords import OPTIONS, SAMPLING
from tpworker.runtime.settings import scheduler_settings
from tpworker.sampling_params import MAX_BIAS, MAX_CHOICES, choice_seed
from tpworker.values import MAX_SEED, FrozenDict


class Size(IntEnum):
    FIVE = 5


NUMBERS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "n", "priority", "logprobs",
    "prompt_logprobs", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
INTEGERS: list[Any] = [
    np.int64(5), np.int8(5), np.uint16(5), np.array(5), torch.tensor(5), torch.tensor(5).int(), Size.FIVE
]  # fmt: skip
REALS: list[Any] = [
    np.float32(0.5), np.float64(0.5), np.float16(0.5), np.longdouble(0.5), np.array(0.5), torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.bfloat16), Fraction(1, 2), Decimal("0.5"),
]  # fmt: skip


def key_of(value: Any, plain: float = 5) -> Any:
    """The value, or its plain number if it has no hash: arrays cannot be keys."""
    return plain if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("five", INTEGERS, ids=repr)
def test_integers_of_any_library_are_integers(five: Any) -> None:
    names = (
        "max_tokens", "top_k", "seed", "min_tokens", "n", "priority", "logprobs", "prompt_logprobs",
        "repetition_penalty", "temperature",
    )  # fmt: skip
    ids = {"stop_token_ids": [five, 6], "allowed_token_ids": [five, 6]}
    params = SamplingParams(**dict.fromkeys(names, five), **ids, logit_bias={key_of(five): five})
    ids = {"stop_token_ids": [5, 6], "allowed_token_ids": [5, 6]}
    assert params == SamplingParams(**dict.fromkeys(names, 5), **ids, logit_bias={5: 5})
    for name in names:
        assert type(getattr(params, name)) is int
    numbers = [*params.stop_token_ids, *params.allowed_token_ids, *params.logit_bias, params.logit_bias[5]]
    assert [type(number) for number in numbers] == [int] * 6
    assert hash(params) == hash(dataclasses.replace(params))
    config = RuntimeConfig(max_num_seqs=five, seed=five, max_model_len=five, step_timeout=five)
    assert config == RuntimeConfig(max_num_seqs=5, seed=5, max_model_len=5, step_timeout=5)
    assert "np." not in repr(config)


@pytest.mark.parametrize("half", REALS, ids=repr)
def test_real_numbers_of_any_library_are_floats(half: Any) -> None:
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    params = SamplingParams(**dict.fromkeys(names, half), logit_bias={7: half})
    assert params == SamplingParams(**dict.fromkeys(names, 0.5), logit_bias={7: 0.5})
    assert {type(getattr(params, name)) for name in names} == {float}
    assert type(params.logit_bias[7]) is float
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(InvalidRequest, match=f"{name}="):
            SamplingParams(**{name: half})
    for name, given in (("logit_bias", {key_of(half, 0.5): 1}), ("allowed_token_ids", [half])):
        with pytest.raises(InvalidRequest, match=f"{name}="):
            SamplingParams(**{name: given})
    config = RuntimeConfig(gpu_memory_utilization=half, step_timeout=half)
    assert (type(config.step_timeout), config.gpu_memory_utilization) == (float, 0.5)
    with pytest.raises(InvalidRequest, match="top_k="):
        SamplingParams(top_k=half)
    with pytest.raises(ConfigError, match=r"max_num_seqs=.* must be int or None"):
        RuntimeConfig(max_num_seqs=half)


class Device(StrEnum):
    CPU = "cpu"


class Older(str, Enum):  # noqa: UP042  # as before Python 3.11
    CPU = "cpu"


@pytest.mark.parametrize("cpu", [np.str_("cpu"), np.array("cpu"), Device.CPU, Older.CPU], ids=repr)
def test_strings_of_any_library_are_strings(cpu: Any) -> None:
    params = SamplingParams(stop=cpu, bad_words=[cpu], cache_salt=cpu)
    assert params == SamplingParams(stop=["cpu"], bad_words=["cpu"], cache_salt="cpu")
    config = RuntimeConfig(device=cpu, model=cpu)
    texts = [params.stop[0], params.bad_words[0], params.cache_salt, config.device, config.model]
    assert [type(text) for text in texts] == [str] * 5


@pytest.mark.parametrize(
    "dtype", [torch.float16, np.float16, np.dtype("float16"), "float16", np.str_("float16")], ids=repr
)
def test_paths_and_types_of_numbers_are_named(dtype: Any) -> None:
    assert RuntimeConfig(dtype=dtype, model=Path("/a"), chat_template=Path("b")) == RuntimeConfig(
        dtype="float16", model="/a", chat_template="b"
    )


@pytest.mark.parametrize("name", ["half", torch.int8, np.int8, "bf16", float, 16])
def test_other_types_of_numbers_are_refused_with_the_name_here(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"dtype=.*: must be (str|auto, float32)") as error:
        RuntimeConfig(dtype=name)
    assert ("here it is" in str(error.value)) == (name in ("half", "bf16"))


@pytest.mark.parametrize(
    "ids", [np.array([5, 6]), torch.tensor([5, 6]), (np.int32(5), 6), range(5, 7)], ids=repr
)
def test_arrays_are_sequences_of_ids(ids: Any) -> None:
    params = SamplingParams(stop_token_ids=ids, allowed_token_ids=ids)
    assert params.stop_token_ids == params.allowed_token_ids == (5, 6)


@pytest.mark.parametrize("true", [np.bool_(True), np.array(True), torch.tensor(True), True], ids=repr)
def test_truth_of_any_library_is_a_bool_and_no_number(true: Any) -> None:
    params = SamplingParams(ignore_eos=true, detokenize=true)
    assert (params.ignore_eos, params.detokenize) == (True, True)
    assert RuntimeConfig(prefix_caching=true).prefix_caching is True
    for name in NUMBERS:
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
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_is_refused(value: Any) -> None:
    for name in NUMBERS:
        with pytest.raises(InvalidRequest, match=f"{name}="):
            SamplingParams(**{name: value})
    with pytest.raises(InvalidRequest, match="stop_token_ids="):
        SamplingParams(stop_token_ids=[value])
    for name in ("max_num_seqs", "step_timeout"):
        with pytest.raises(ConfigError, match=f"{name}="):
            RuntimeConfig(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), 10**400, -(10**400)])
def test_numbers_that_are_not_finite_or_too_large_are_refused(value: Any) -> None:
    for name in NUMBERS:
        with pytest.raises(InvalidRequest, match=f"{name}="):
            SamplingParams(**{name: value})
    with pytest.raises(InvalidRequest, match="logit_bias="):
        SamplingParams(logit_bias={5: value})


@pytest.mark.parametrize("value", [5, None, np.array(5), torch.tensor(5), 5.0, b"ab", {5: 6}])
@pytest.mark.parametrize(
    "name", ["stop", "shown_special_tokens", "stop_token_ids", "bad_words", "allowed_token_ids"]
)
def test_what_is_no_sequence_is_refused_as_everything_is(name: str, value: Any) -> None:
    if name == "allowed_token_ids" and value is None:
        return  # all are
    with pytest.raises(InvalidRequest, match=rf"{name}=.*must be a") as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name


@pytest.mark.parametrize(
    ("names", "others"),
    [
        ([""], {}),
        ([5], {}),
        (["a"] * 65, {}),
        (["a"], {"detokenize": False}),
        (["a"], {"skip_special_tokens": False}),
    ],
)
def test_special_tokens_that_cannot_be_shown(names: Any, others: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"shown_special_tokens=.*must be") as caught:
        SamplingParams(shown_special_tokens=names, **others)
    assert caught.value.parameter == "shown_special_tokens"
    assert SamplingParams(shown_special_tokens="a").shown_special_tokens == ("a",)
    assert len(SamplingParams(shown_special_tokens=["a"] * 64).shown_special_tokens) == 64


def test_what_they_come_to_crosses_to_the_processes() -> None:
    """msgpack takes Python's own types alone."""
    config = RuntimeConfig(
        max_num_seqs=np.int64(8), step_timeout=np.float32(2.5), prefix_caching=np.bool_(True)
    )
    spec: Any = SimpleNamespace(vocab_size=97)
    settings = scheduler_settings(config, spec, "cpu", 512)
    assert (settings.max_num_seqs, settings.step_timeout, settings.prefix_caching) == (8, 2.5, True)
    from tests.ipc.test_child import SCHEDULER_BOOT

    assert pack_boot(dataclasses.replace(SCHEDULER_BOOT, settings=settings))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("n", [1, 128], [0, -1, 129, None]),
        ("priority", [-(2**31) + 1, 2**31 - 1], [-(2**31), 2**31, None]),
        ("max_tokens", [None, 0, 1, 2**31 - 1], [-1, 2**31, 1.0]),
        ("min_p", [None, 0, 0.0, 1e-300, 1, 1.0], [-0.1, 1.0000001, 2]),
        ("repetition_penalty", [None, 0.01, 1, 100], [0, 0.0099, 100.1, -1]),
        ("presence_penalty", [-2, 0, 2.0], [-2.001, 2.001, None]),
        ("frequency_penalty", [-2, 0, 2.0], [-2.001, 2.001, None]),
        ("logprobs", [None, 0, 20], [-1, 21, 1.0]),
        ("prompt_logprobs", [None, 0, 20], [-1, 21, 1.0]),
        (
            "logit_bias",
            [{}, {0: -100, 2**31: 100}, dict.fromkeys(range(MAX_BIAS), 1)],
            [
                {5: 100.1},
                {5: -100.1},
                {-1: 1},
                {"5": 1},
                {5: "1"},
                {5: None},
                {(5, 6): 1},
                {True: 1},
                {5: True},
                dict.fromkeys(range(MAX_BIAS + 1), 1),
                None,
                [5],
                [(5, 1)],
                "5",
            ],
        ),
        ("allowed_token_ids", [None, (0,), (7, 7)], [(), [-1], [1.0], ["a"], "", "a", [[1]], [None]]),
        (
            "bad_words",
            [(), ("a",), ("ü" * 128,), ("a",) * 1024],
            [[""], "", ["ü" * 129], ["a"] * 1025, [5], [b"a"], [None], ["\udc80"], b"ab"],
        ),
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


EVERYTHING: dict[str, Any] = {
    "logit_bias": {5: 1.5, 7: -2}, "bad_words": ["a"], "allowed_token_ids": [1, 2], "logprobs": 3,
    "presence_penalty": 1, "stop": ["x"],
}  # fmt: skip


def test_parameters_can_be_copied_and_compared_and_have_a_hash() -> None:
    """What those do who put them into sets, or make others of them."""
    params = SamplingParams(**EVERYTHING)
    same = SamplingParams(**dataclasses.asdict(params))
    for other in (copy.copy(params), copy.deepcopy(params), dataclasses.replace(params), same):
        assert other == params
        assert hash(other) == hash(params)
    for changed in ({5: 1.5}, {5: 1.5, 7: -2.5}, {}):
        assert dataclasses.replace(params, logit_bias=changed) != params
    assert len({params, dataclasses.replace(params, logit_bias={5: 1})}) == 2
    assert "logit_bias={5: 1.5, 7: -2}" in repr(params)


def test_parameters_are_frozen_and_keep_nothing_of_who_made_them() -> None:
    given = {name: copy.copy(value) for name, value in EVERYTHING.items()}
    params = SamplingParams(**given)
    given["logit_bias"][5] = 99
    given["bad_words"].append("b")
    given["allowed_token_ids"].append(9)
    assert params == SamplingParams(**EVERYTHING)
    with pytest.raises(TypeError):
        params.logit_bias[5] = 2  # type: ignore[index]
    assert isinstance(params.logit_bias, FrozenDict)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.logprobs = 5  # type: ignore[misc]


def test_one_word_is_a_list_of_it() -> None:
    assert SamplingParams(bad_words="some word").bad_words == ("some word",)


def test_no_tokens_at_all_leave_no_room_for_a_minimum() -> None:
    assert SamplingParams(max_tokens=0, min_tokens=0).max_tokens == 0
    with pytest.raises(InvalidRequest, match=r"min_tokens=1: must be at most max_tokens \(0\)"):
        SamplingParams(max_tokens=0, min_tokens=1)


def test_a_scheduling_policy_is_one_of_two() -> None:
    assert RuntimeConfig().scheduling_policy == "fcfs"
    assert RuntimeConfig(scheduling_policy="priority").scheduling_policy == "priority"
    with pytest.raises(ConfigError, match="scheduling_policy='lpm': must be fcfs or priority"):
        RuntimeConfig(scheduling_policy="lpm")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speculative_method": "eagle"}, "speculative_method='eagle': must be ngram, mtp or None"),
        ({"speculative_method": 1}, "speculative_method=1: must be str or None"),
        ({"num_speculative_tokens": 2}, "num_speculative_tokens=2 has no effect without speculative_method"),
        (
            {"prompt_lookup_max": 2},
            "prompt_lookup_max=2 has no effect without speculative_method: set that to",
        ),
        (
            {"speculative_method": "mtp", "prompt_lookup_min": 2},
            "prompt_lookup_min=2 has no effect with speculative_method=mtp, which looks nothing up",
        ),
        (
            {"speculative_method": "ngram", "num_speculative_tokens": 0},
            "=0: must be from 1 to 8; for none, leave",
        ),
        ({"speculative_method": "mtp", "num_speculative_tokens": 9}, "=9: must be from 1 to 8"),
        (
            {"speculative_method": "ngram", "prompt_lookup_max": 17},
            "prompt_lookup_max=17: must be from 1 to 16",
        ),
        (
            {"speculative_method": "ngram", "prompt_lookup_min": 0},
            "prompt_lookup_min=0: must be from 1 to 16",
        ),
        (
            {"speculative_method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3},
            "prompt_lookup_min=3 is more than prompt_lookup_max=2: raise prompt_lookup_max, or lower",
        ),
        ({"speculative_method": "ngram", "num_speculative_tokens": 2.0}, "must be int or None"),
        (
            {"speculative_method": "ngram", "max_num_batched_tokens": 3, "max_num_seqs": 1},
            "speculative_method=ngram has no effect with max_num_batched_tokens=3: drafts may take half of",
        ),
    ],
)
def test_what_cannot_be_said_of_drafts(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RuntimeConfig(**options)


@pytest.mark.parametrize("name", ["target_itl", "target_ttft"])
def test_targets_are_times(name: str) -> None:
    for value in (1e-9, 1, 3600):
        assert getattr(RuntimeConfig(**{name: value}), name) == float(value)
    for value in (0, -1.0, 3601, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"{name}=.*: must be above 0 and at most 3600 seconds"):
            RuntimeConfig(**{name: value})


def test_bounds_are_those_of_messages() -> None:
    assert (MAX_SPECULATIVE_TOKENS, MAX_PROMPT_LOOKUP) == (MAX_DRAFTS, MAX_LOOKUP)
    assert MAX_NUM_SEQS == MAX_SLOTS


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


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (
            Runtime,
            "enforce_eager",
            "RuntimeConfig has no enforce_eager: not needed: steps on GPUs are always",
        ),
        (Runtime, "tp_size", "RuntimeConfig has no tp_size: the name here is tensor_parallel_size"),
        (
            SyncRuntime,
            "trust_remote_code",
            "has no trust_remote_code: not needed: no code of a model's folder",
        ),
        (RuntimeConfig, "max_num_seq", r"has no max_num_seq: is max_num_seqs meant\?"),
        (RuntimeConfig, "frobnicate", "has no frobnicate: its fields are model, tensor_parallel_size"),
        (SamplingParams, "guided_decoding", "SamplingParams has no guided_decoding: StructuredOutputs"),
        (SamplingParams, "max_new_tokens", "has no max_new_tokens: the name here is max_tokens"),
        (SamplingParams, "best_of", "has no best_of: n choices"),
    ],
)
def test_what_others_call_it_is_answered_by_what_it_is_called_here(
    make: Callable[..., Any], name: str, said: str
) -> None:
    with pytest.raises(TypeError, match=said):
        make(**{name: 1})


@pytest.mark.parametrize(("cls", "table"), [(RuntimeConfig, OPTIONS), (SamplingParams, SAMPLING)])
def test_the_tables_of_keywords_name_what_there_is(cls: Any, table: dict[str, str]) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    assert not fields & table.keys()
    for said in table.values():
        for named in re.findall(r"name here is (\w+)|^(\w+)=", said):
            assert (named[0] or named[1]) in fields, said
    assert copy.copy(cls()) == copy.deepcopy(cls()) == dataclasses.replace(cls()) == cls()
