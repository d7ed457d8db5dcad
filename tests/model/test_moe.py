"""Routing, and what experts make of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tpworker.model import moe, torch_operations
from tpworker.model.families import MoeSpec
from tpworker.model.linear import Linear
from tpworker.model.moe import Moe

# ---------------------------------------------------------------------------------------- routing

PLAIN = MoeSpec(layers=(0,), num_experts=4, experts_per_token=2, intermediate_size=8)


def chosen(logits: list[float], bias: list[float] | None = None, **fields: Any) -> tuple[list[int], Tensor]:
    """ids and weights of one token."""
    spec = dataclasses.replace(PLAIN, num_experts=len(logits), **fields)
    ids, weights = moe.choose(
        torch.tensor([logits]).log(), None if bias is None else torch.tensor(bias), spec
    )
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    return ids[0].tolist(), weights[0]


def near(weights: Tensor, *expected: float) -> None:
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_softmax_with_and_without_normalisation() -> None:
    ids, weights = chosen([0.1, 0.5, 0.1, 0.3])
    assert ids == [1, 3]
    near(weights, 0.5 / 0.8, 0.3 / 0.8)
    near(chosen([0.1, 0.5, 0.1, 0.3], normalise=False, scale=2.0)[1], 1.0, 0.6)
    near(chosen([0.1, 0.5, 0.1, 0.3], norm_min=2.0)[1], 0.25, 0.15)


def test_sigmoid() -> None:
    ids, weights = chosen([1.0, 4.0, 3.0, 1.0], score="sigmoid", normalise=False)
    assert ids == [1, 2]
    near(weights, 4 / 5, 3 / 4)


def test_a_correction_bias_changes_choices_but_not_weights() -> None:
    ids, weights = chosen([0.1, 0.5, 0.1, 0.3], [0.0, 0.0, 1.0, 0.0], normalise=False)
    assert ids == [2, 1]
    near(weights, 0.1, 0.5)


def test_of_equal_experts_the_lower_id() -> None:
    assert chosen([0.1, 0.3, 0.3, 0.3])[0] == [1, 2]
    assert chosen([0.2] * 5, num_groups=1)[0] == [0, 1]


def test_only_the_best_groups_are_chosen_from() -> None:
    """Groups by their two best: 0.31 and 0.31, then 0.30; the best expert of all is in the last."""
    logits = [0.16, 0.15, 0.155, 0.155, 0.29, 0.01]
    assert chosen(logits, num_groups=3, top_groups=2, normalise=False)[0] == [0, 2]
    assert chosen(logits, num_groups=3, top_groups=3, normalise=False)[0] == [4, 0]
    bias = [0.0, 0.0, 0.0, 0.0, 0.2, 0.0]
    assert chosen(logits, bias, num_groups=3, top_groups=1, normalise=False)[0] == [4, 5]


def test_shared_experts_come_last_with_weight_one() -> None:
    ids, weights = chosen([0.1, 0.5, 0.1, 0.3], num_shared=2, scale=3.0, normalise=False)
    assert ids == [1, 3, 4, 5]
    near(weights, 1.5, 0.9, 1.0, 1.0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_tokens_choice_does_not_depend_on_the_others(score: Any) -> None:
    """Bit by bit."""
    spec = dataclasses.replace(PLAIN, num_experts=13, experts_per_token=5, score=score)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(77, 30, generator=generator)
    gate = Linear(torch.randn(13, 30, generator=generator))
    mixture = Moe(spec, gate, None, [gate] * 13, [gate] * 13, torch_operations)
    ids, weights = mixture.route(x)
    for rows in (*(slice(start, start + 2) for start in range(70)), slice(0, 1), slice(40, 77)):
        some_ids, some_weights = mixture.route(x[rows])
        assert torch.equal(some_ids, ids[rows])
        assert torch.equal(some_weights, weights[rows])


def test_route_takes_logits_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 30, generator=generator).bfloat16()
    gate = torch.randn(4, 30, generator=generator).bfloat16()
    ids, weights = moe.route(x, gate, None, PLAIN)
    expected = (x.double() @ gate.double().T).softmax(dim=-1)
    assert torch.equal(ids.long(), expected.topk(2).indices)
    near_weights = expected.topk(2).values
    torch.testing.assert_close(
        weights.double(), near_weights / near_weights.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6
    )


# ---------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("num_tokens", [1, 2, 17])
def test_experts_against_token_by_token(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 24, generator=generator)
    gate_up = torch.randn(6, 2 * 16, 24, generator=generator)
    down = torch.randn(6, 24, 16, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(num_tokens)]).int()
    weights = torch.rand(num_tokens, 3, generator=generator)
    expected = torch.zeros(num_tokens, 24, dtype=torch.float64)
    for token in range(num_tokens):
        for id_, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (gate_up[id_].double() @ x[token].double()).chunk(2)
            expected[token] += weight * (down[id_].double() @ (gate * gate.sigmoid() * up))
    result = moe.experts(x, ids, weights, gate_up, down)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)
    packed = Moe(
        dataclasses.replace(PLAIN, num_experts=6, experts_per_token=3),
        Linear(torch.zeros(6, 24)),
        None,
        [Linear(weight) for weight in gate_up],
        [Linear(weight) for weight in down],
        torch_operations,
    )
    packed.router = lambda x: (ids, weights)
    torch.testing.assert_close(packed(x), result, rtol=1e-5, atol=1e-4)
