"""The oracle of `test_oracle`, for mixtures of experts: what else is in a step changes no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Ernie4_5_MoeConfig, Glm4MoeConfig

from tests.integration.conftest import VOCAB
from tests.integration.test_oracle import Oracle, answers_alone, compare, requests
from tests.model.helpers import tiny_model
from tpworker.testing.in_process import InProcessGroup

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 24,
    "eos_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "glm": Glm4MoeConfig(
        **BASE, n_routed_experts=12, num_experts_per_tok=4, attention_bias=True, n_group=3, topk_group=2
    ),
    "ernie": Ernie4_5_MoeConfig(**BASE, moe_num_experts=8, moe_k=3, tie_word_embeddings=False),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """A folder, and each request's tokens with lookahead 0, alone, on one rank."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(folder, CONFIGS[request.param])
    return folder, answers_alone(folder)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_every_lookahead_and_tp_size(model: tuple[Path, Oracle], num_ranks: int, lookahead: int) -> None:
    folder, oracle = model
    with InProcessGroup(folder, num_ranks, lookahead=lookahead, check_agreement=True) as group:
        group.run(requests())
        compare(group, oracle)
        assert sum(output.num_cached for output in group.outputs.values()) > 0, "no prefix hit"


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 7, "prepare": True},  # batches padded to the sizes of graphs
        {"num_kv_blocks": 20},  # preemption
        {"max_num_seqs": 3, "max_num_batched_tokens": 10},
    ],
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_other_batches(model: tuple[Path, Oracle], num_ranks: int, options: dict[str, Any]) -> None:
    folder, oracle = model
    with InProcessGroup(folder, num_ranks, **options) as group:
        group.run(requests())
        compare(group, oracle)
