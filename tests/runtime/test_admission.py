from __future__ import annotations

from array import array
from collections.abc import Sequence
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import VOCAB_SIZE
from tpworker.errors import InvalidRequest, PromptTooLong
from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.messages import NO_LOGPROBS
from tpworker.runtime.admission import Limits, fit, pack_prompt, resolve_sampling
from tpworker.sampling_params import SamplingParams


class Spec:
    vocab_size = VOCAB_SIZE
    eos_ids = (2, 3)
    generation_defaults: dict[str, float] = {"temperature": 0.2, "top_k": 50}  # noqa: RUF012


spec: Any = Spec()


class Two(IntEnum):
    TWO = 2


def test_a_prompt_is_packed() -> None:
    assert unpack_int32(pack_prompt([0, 5, VOCAB_SIZE - 1], spec)).tolist() == [0, 5, VOCAB_SIZE - 1]
    arrays: list[Any] = [
        np.array([1, 2]), np.array([1, 2], dtype=np.uint8), torch.tensor([1, 2]), torch.tensor([1, 2]).int(),
        [np.int64(1), torch.tensor(2)], (1, np.uint16(2)), [np.array(1), Two.TWO], array("q", [1, 2]),
        iter([1, 2]),
    ]  # fmt: skip
    for ids in arrays:
        assert unpack_int32(pack_prompt(ids, spec)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ([1, VOCAB_SIZE], f"token id {VOCAB_SIZE}; the model's vocabulary has 0 to {VOCAB_SIZE - 1}"),
        ([1, -1], "token id -1"),
        ([1, 2**40], "must be a string, or token ids"),
        ([1, 1.5], "must be a string, or token ids"),
        ([1, "a"], "must be a string, or token ids"),
        ([[1]], "must be a string, or token ids"),
        ([1, True], "a bool is no token id"),
        ([1, torch.tensor(True)], "a bool is no token id"),
        ([np.bool_(True)], "a bool is no token id"),
        ([torch.tensor([1])], "an array is no token id"),
        ([np.array([1])], "an array is no token id"),
        ([Decimal(1)], "must be a string, or token ids"),
        ([Fraction(1)], "must be a string, or token ids"),
        ({1: 2}, "must be a string, or token ids from 0 to .*: got dict"),
        ({1, 2}, "must be a string, or token ids from 0 to .*: got set"),
        (np.array([True, False]), "a bool is no token id"),
        (np.array([1.0]), "must be a string, or token ids"),
        (np.array([[1]]), "must be a string, or token ids"),
        (np.array(1), "must be a string, or token ids"),
        (torch.tensor([1.0]), "must be a string, or token ids"),
        (np.array([2**40]), "must be a string, or token ids"),
        (None, "must be a string, or token ids"),
        (5, "must be a string, or token ids"),
    ],
)
def test_a_prompt_that_is_none_is_refused(prompt: Sequence[int], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        pack_prompt(prompt, spec)
    assert caught.value.parameter == "prompt"


def test_max_tokens_are_as_asked_for_or_as_many_as_fit() -> None:
    for limits in (Limits(17, 2048, 1000), Limits(17, 17, 1000), Limits(1000, 2048, 17)):
        assert fit(SamplingParams(max_tokens=7), 10, limits) == 7
        assert fit(SamplingParams(), 10, limits) == 7
        assert fit(SamplingParams(), 16, limits) == 1


@pytest.mark.parametrize(
    ("max_tokens", "num_prompt", "limits", "parameter", "words"),
    [
        (None, 17, Limits(17, 50, 99), "prompt", "17 tokens, but max_model_len is 17.*raise --max-model-len"),
        (8, 10, Limits(17, 50, 99), "max_tokens", "together 18, but max_model_len is 17: ask for at most 7"),
        (8, 10, Limits(17, 17, 99), "max_tokens", "made for at most 17.*a model with a longer context"),
        (8, 10, Limits(99, 99, 17), "max_tokens", "hold 17 .*max_model_len is 99.*--gpu-memory-utilization"),
        (None, 17, Limits(99, 99, 17), "prompt", "KV blocks here hold 17"),
    ],
)
def test_what_does_not_fit_is_refused_with_value_limit_and_remedy(
    max_tokens: int | None, num_prompt: int, limits: Limits, parameter: str, words: str
) -> None:
    with pytest.raises(PromptTooLong, match=words) as caught:
        fit(SamplingParams(max_tokens=max_tokens), num_prompt, limits)
    assert caught.value.parameter == parameter


def test_no_tokens_are_one_that_nobody_gets() -> None:
    """A step yields a token at least, which needs no room."""
    for limits in (Limits(17, 99, 1000), Limits(99, 99, 17)):
        for num_prompt in (10, 16, 17):
            assert fit(SamplingParams(max_tokens=0), num_prompt, limits) == 1
    with pytest.raises(PromptTooLong, match="18 tokens, but max_model_len is 17: shorten the prompt, or"):
        fit(SamplingParams(max_tokens=0), 18, Limits(17, 99, 1000))


def test_min_tokens_must_fit_too() -> None:
    with pytest.raises(InvalidRequest, match="only 7 tokens fit") as caught:
        fit(SamplingParams(min_tokens=8), 10, Limits(17, 99, 1000))
    assert caught.value.parameter == "min_tokens"


def test_defaults_are_the_requests_then_the_models_then_ours() -> None:
    sampling = resolve_sampling(SamplingParams(temperature=0.0), spec, 9, seed=5)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 50, 1.0)
    assert (sampling.seed, sampling.max_tokens) == (5, 9)
    sampling = resolve_sampling(SamplingParams(top_k=-1, seed=-7), spec, 9, seed=5)
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.2, 0, -7)


def test_what_is_not_asked_for_is_not_there() -> None:
    sampling = resolve_sampling(SamplingParams(), spec, 9, seed=5)
    assert (sampling.min_p, sampling.rules) == (0.0, None)
    assert sampling.num_logprobs == sampling.num_prompt_logprobs == NO_LOGPROBS
    sampling = resolve_sampling(SamplingParams(logprobs=0, prompt_logprobs=20), spec, 9, seed=5)
    assert (sampling.num_logprobs, sampling.num_prompt_logprobs) == (0, 20)


def stop_ids(**params: Any) -> list[int]:
    return unpack_int32(resolve_sampling(SamplingParams(**params), spec, 9, 0).stop_ids).tolist()


def test_stop_ids_are_the_models_and_the_requests() -> None:
    assert stop_ids() == [2, 3]
    assert stop_ids(stop_token_ids=[7, 3, 7]) == [2, 3, 7]
    assert stop_ids(stop_token_ids=[7], ignore_eos=True) == [7]
    assert len(stop_ids(stop_token_ids=range(10, 24))) == 16


def test_stop_ids_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=f"holds {VOCAB_SIZE}"):
        stop_ids(stop_token_ids=[5, VOCAB_SIZE])
    with pytest.raises(InvalidRequest, match=r"model's 2 end-of-sequence.*17 different ids; the limit is 16"):
        stop_ids(stop_token_ids=range(10, 25))
