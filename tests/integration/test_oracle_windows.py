"""The oracle of `test_oracle`, for models with windows, capped scores and matrices published as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, Gemma3TextConfig, Phi3Config

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
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "sliding_window": 19,  # of up to 95 tokens; blocks have 8
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2Config(**BASE, head_dim=8, attn_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**BASE, head_dim=8, sliding_window_pattern=2),
    "phi3": lambda: Phi3Config(**BASE),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """A folder, and each request's tokens with lookahead 0, alone, on one rank."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(folder, CONFIGS[request.param]())
    return folder, answers_alone(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"lookahead": 0},
        {"max_num_seqs": 7, "prepare": True},  # batches padded to the sizes of graphs
        {"num_kv_blocks": 20},  # preemption
        {"max_num_seqs": 3, "max_num_batched_tokens": 10},
    ],
)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_batch(model: tuple[Path, Oracle], num_ranks: int, options: dict[str, Any]) -> None:
    folder, oracle = model
    with InProcessGroup(folder, num_ranks, check_agreement=True, **options) as group:
        group.run(requests())
        compare(group, oracle)


def test_prefixes_that_were_kept(model: tuple[Path, Oracle]) -> None:
    folder, oracle = model
    with InProcessGroup(folder, 2) as group:
        group.run(requests())
        compare(group, oracle)
        assert sum(output.num_cached for output in group.outputs.values()) > 0, "no prefix hit"
