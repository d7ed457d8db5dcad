"""Rotary positions that change with a sequence's length, served up to there as transformers has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model.helpers import Reference, edit_config, tiny_model
from tests.model.test_decoder import ROPE_MODELS
from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.model.families import read_spec
from tpworker.runtime.settings import resolve_max_model_len

LENGTH = 40  # of the reference's sequences: the longest that is served
SHORT = [1.0, 1.5, 1.7, 2.0, 2.2, 2.5, 2.7, 3.0]
LONG = [4.0 * factor for factor in SHORT]
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": LENGTH,
}
OF_HALF_A_HEAD = {"short_factor": SHORT[:4], "long_factor": LONG[:4]}
DYNAMIC = {"max_position_embeddings": LENGTH, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("llama", {"rope_theta": 500.0, "rope_scaling": LONGROPE}),
    "longrope-5": ("llama", {"rope_parameters": LONGROPE | {"rope_theta": 500.0}}),
    "longrope-factor": ("llama", {"rope_scaling": LONGROPE | {"factor": 8.0}}),
    "longrope-small-factor": ("llama", {"rope_scaling": LONGROPE | {"factor": 0.5}}),
    "longrope-attention-factor": ("llama", {"rope_scaling": LONGROPE | {"attention_factor": 1.7}}),
    "longrope-length-outside": (
        "llama",
        {
            "rope_scaling": LONGROPE | {"original_max_position_embeddings": 13},
            "original_max_position_embeddings": LENGTH,
        },
    ),
    "longrope-of-neighbours": ("ernie4_5", {"rope_scaling": LONGROPE}),
    "longrope-of-half-a-head": ("glm", {"rope_scaling": LONGROPE | OF_HALF_A_HEAD}),
    "dynamic": ("llama", DYNAMIC | {"rope_theta": 500.0}),
    "dynamic-5": (
        "llama",
        {
            "max_position_embeddings": LENGTH,
            "rope_parameters": {"rope_type": "dynamic", "factor": 1.3, "rope_theta": 500.0},
        },
    ),
    "dynamic-of-half-a-head": ("glm", DYNAMIC),
}


@pytest.fixture
def reference(tmp_path: Path, name: str) -> Reference:
    model, rope = ROPES[name]
    tiny_model(tmp_path, ROPE_MODELS[model]())
    edit_config(tmp_path, {"rope_parameters": None} | rope)
    return Reference.of_folder(tmp_path)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ROPES)
def test_sequences_within_the_length_are_transformers(reference: Reference, size: int) -> None:
    reference.check(size)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_longer_sequences_are_not_served(reference: Reference) -> None:
    """There, what transformers makes of the first tokens depends on how many come behind them."""
    spec = read_spec(reference.folder)
    assert spec.max_model_len == spec.rope.max_positions == LENGTH
    ids = torch.cat((reference.ids, reference.ids[:, :1]), dim=1)
    model = AutoModelForCausalLM.from_pretrained(reference.folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        difference = (model(ids).logits[:, :LENGTH] - reference.logits).abs().max()
    assert difference > 1e-3 * reference.logits.abs().max()
    assert resolve_max_model_len(RuntimeConfig(), spec) == LENGTH
    with pytest.raises(
        ConfigError, match=r"max_model_len=41: in a sequence of more than 40 tokens.*use 40 or"
    ):
        resolve_max_model_len(RuntimeConfig(max_model_len=41), spec)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_what_is_not_served_of_the_promised_length_is_told_of(reference: Reference, name: str) -> None:
    notes = read_spec(reference.folder).notes
    if name == "dynamic":
        assert notes == ()
    else:
        (note,) = notes
        assert "of max_position_embeddings=256 the first 40 are served" in note
