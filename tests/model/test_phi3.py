"""Phi-3 against transformers: matrices that are published as one, parts of heads, longrope and windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config

from tests.model.helpers import CPU, Models, Reference, edit_config, references, tiny_model
from tests.model.test_decoder import BASE
from tpworker.checkpoint.weights import load_weights
from tpworker.errors import ModelError
from tpworker.model.families import read_spec
from tpworker.model.tp import Shard

PHI: dict[str, Any] = BASE | {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
FACTORS = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [4.0, 5.0, 6.0, 8.0]}
LONGROPE: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 500.0} | FACTORS


def phi(heads: int, kv_heads: int, **values: Any) -> Callable[[], Any]:
    return lambda: Phi3Config(**(PHI | values), num_attention_heads=heads, num_key_value_heads=kv_heads)


CONFIGS: dict[str, Callable[[], Any]] = {
    "multi-head": phi(9, 9),
    "grouped": phi(9, 3, tie_word_embeddings=True),
    "multi-query": phi(6, 1),
    "window": phi(9, 3, sliding_window=7),
    "half-a-head": phi(6, 3, rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 500.0}),
    "longrope": phi(9, 3, rope_parameters=dict(LONGROPE), original_max_position_embeddings=40),
    "longrope-of-half-a-head": phi(
        4,
        2,
        hidden_size=64,
        rope_parameters=LONGROPE | {"partial_rotary_factor": 0.5},
        original_max_position_embeddings=40,
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return references(CONFIGS, tmp_path_factory.mktemp)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_transformers(models: Models, name: str, size: int) -> None:
    models(name).check(size)


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_older_names_of_longrope(tmp_path: Path, kind: str) -> None:
    tiny_model(tmp_path, CONFIGS["longrope"]())
    # The length that stands beside the section, 40, counts.
    section = FACTORS | {"type": kind, "original_max_position_embeddings": 13}
    rope = {"rope_theta": 77.0, "rope_scaling": section}
    edit_config(tmp_path, {"rope_parameters": None} | rope)
    reference = Reference.of_folder(tmp_path)
    assert read_spec(tmp_path).max_model_len == 40
    reference.check(2)


def test_a_matrix_of_other_heads_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path, CONFIGS["grouped"]())
    edit_config(tmp_path, {"num_key_value_heads": 9})
    spec = read_spec(tmp_path)
    with pytest.raises(
        ModelError, match=r"qkv_proj.weight has shape \[120, 72\]; config.json asks for \[216, 72\]"
    ):
        load_weights(tmp_path, spec, Shard.of(spec, 0, 1), torch.float32, CPU)
