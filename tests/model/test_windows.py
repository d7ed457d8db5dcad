"""Sliding windows against transformers for any chunks, blocks and TP size; and what decoders make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from tests.model.helpers import CPU, SPEC, Models, references
from tests.model.test_decoder import BASE, heads
from tpworker.checkpoint.weights import dummy_weights
from tpworker.model.decoder import Decoder
from tpworker.model.families import WindowSpec
from tpworker.model.tp import Shard
from tpworker.rank.collectives import SoleRank

LAYERS = BASE | {"num_hidden_layers": 3}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def types(pattern: str) -> list[str]:
    """s: sliding, f: full."""
    return [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in pattern]


CONFIGS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: MistralConfig(**LAYERS, **heads(8, 4), sliding_window=7),
    "mistral-of-one-token": lambda: MistralConfig(**LAYERS, **heads(4, 4), sliding_window=1),
    "mistral-of-a-block": lambda: MistralConfig(**LAYERS, **heads(9, 3), sliding_window=4),
    "mistral-of-all-but-one": lambda: MistralConfig(**LAYERS, **heads(8, 1), sliding_window=39),
    "mistral-of-all": lambda: MistralConfig(**LAYERS, **heads(4, 2), sliding_window=40),
    "qwen2": lambda: Qwen2Config(
        **LAYERS,
        num_attention_heads=6,
        num_key_value_heads=3,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3": lambda: Qwen3Config(
        **LAYERS, **heads(8, 2), use_sliding_window=True, sliding_window=16, layer_types=types("sfs")
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **LAYERS, **heads(4, 2), **EXPERTS, use_sliding_window=True, sliding_window=9, max_window_layers=2
    ),
    "mixtral": lambda: MixtralConfig(**LAYERS, **heads(4, 2), num_local_experts=4, sliding_window=11),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return references(CONFIGS, tmp_path_factory.mktemp)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_transformers(models: Models, name: str, size: int) -> None:
    models(name).check(size)


@pytest.mark.parametrize("block_size", [1, 7, 16])
@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_blocks_of_any_size(models: Models, name: str, block_size: int) -> None:
    models(name).check(1, block_size=block_size, num_blocks=130)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_a_sequence_does_not_depend_on_the_batch(models: Models, name: str, dtype: torch.dtype) -> None:
    models(name).check_independence(dtype)


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_half_precision_is_near(models: Models, name: str) -> None:
    model = models(name)

    for result, reference in zip(model.compute_on(2, dtype=torch.bfloat16)[0], model.expected(), strict=True):
        assert (result - reference).abs().max() < 0.05 * reference.abs().max()


def decoder(window: WindowSpec | None, max_model_len: int, num_layers: int = 4) -> Decoder:
    spec = replace(SPEC, num_layers=num_layers, window=window)
    shard = Shard.of(spec, 0, 1)
    weights = dummy_weights(spec, shard, torch.float32, CPU)
    return Decoder(spec, weights, shard, SoleRank(), max_model_len)


def test_a_window_that_all_tokens_are_within_is_none() -> None:
    """So that any kernel serves it."""
    window = WindowSpec(size=32, layers=(0, 1, 2, 3))
    for length, expected in ((31, None), (32, None), (33, 32)):
        assert decoder(window, length).attention.scores.window == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("layers", "kept"), [((0, 1, 2, 3), [0, 1]), ((1, 3), [0, 1, 2]), ((0,), [0, 1]), ((3,), [0, 1, 3])]
)
def test_an_excerpt_has_layers_with_and_without(layers: tuple[int, ...], kept: list[int]) -> None:
    whole = decoder(WindowSpec(size=8, layers=layers), 32)
    numbers = {id(layer): number for number, layer in enumerate(whole.weights.layers)}
    assert [numbers[id(layer)] for layer in whole.excerpt().weights.layers] == kept
