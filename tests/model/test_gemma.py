"""Gemma 2 and 3 against transformers, and what of them is data of the config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)

from tests.model.helpers import CPU, Models, Reference, edit_config, references, tiny_model
from tests.model.test_decoder import BASE, heads
from tpworker.checkpoint.weights import dummy_weights
from tpworker.errors import ModelError
from tpworker.model import layer_ops
from tpworker.model.families import LinearScaling, ModelSpec, RopeSpec, WindowSpec, read_spec
from tpworker.model.tp import Shard

LAYERS = BASE | {"num_hidden_layers": 3}
SCALE = {"query_pre_attn_scalar": 20}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0}
NO_CAPS: dict[str, Any] = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
WINDOW = {"sliding_window": 7}
LOCAL = {"rope_type": "default", "rope_theta": 30.0}
GLOBAL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}


def types(pattern: str) -> dict[str, list[str]]:
    """s: sliding, f: full."""
    return {"layer_types": [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in pattern]}


CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2Config(**LAYERS, **heads(8, 4), **WINDOW, **CAPS, **SCALE),
    "gemma2-as-it-is": lambda: Gemma2Config(**LAYERS, **heads(4, 2), **WINDOW),
    "gemma2-without-caps": lambda: Gemma2Config(**LAYERS, **heads(9, 3), **WINDOW, **NO_CAPS),
    "gemma2-biased": lambda: Gemma2Config(**LAYERS, **heads(4, 1), **WINDOW, **CAPS, attention_bias=True),
    "gemma2-untied": lambda: Gemma2Config(**LAYERS, **heads(4, 2), **WINDOW, tie_word_embeddings=False),
    "gemma3": lambda: Gemma3TextConfig(**LAYERS, **heads(4, 1), **WINDOW, **SCALE, sliding_window_pattern=2),
    "gemma3-ropes": lambda: Gemma3TextConfig(
        **LAYERS,
        **heads(9, 3),
        **WINDOW,
        **types("fsf"),
        rope_parameters={"full_attention": dict(GLOBAL), "sliding_attention": dict(LOCAL)},
    ),
    "gemma3-all-local": lambda: Gemma3TextConfig(**LAYERS, **heads(8, 2), **WINDOW),
    "gemma3-all-global": lambda: Gemma3TextConfig(**LAYERS, **heads(8, 4), **types("fff")),
    "gemma3-cap": lambda: Gemma3TextConfig(
        **LAYERS, **heads(4, 4), **WINDOW, **types("ssf"), final_logit_softcapping=5.0, attention_bias=True
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return references(CONFIGS, tmp_path_factory.mktemp)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_transformers(models: Models, name: str, size: int) -> None:
    models(name).check(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_sequence_does_not_depend_on_the_batch(models: Models, name: str, dtype: torch.dtype) -> None:
    models(name).check_independence(dtype)


@pytest.mark.parametrize("name", ["gemma2", "gemma3-ropes"])
def test_half_precision_is_as_near_as_transformers(models: Models, name: str) -> None:
    model = models(name)

    theirs = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        error = (theirs(model.ids).logits.float() - model.logits).norm()
    results = model.compute_on(2, dtype=torch.bfloat16)[0]
    errors = [(result - expected).norm() for result, expected in zip(results, model.expected(), strict=True)]
    assert torch.stack(errors).norm() < 1.2 * error


OLD_ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 5000.0, "rope_local_base_freq": 30.0},
    "scaling": {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "both": {
        "rope_theta": 77.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL},
    },
    "one-of-both": {"rope_parameters": {"sliding_attention": LOCAL}},
    "yarn": {
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
            "sliding_attention": {"rope_type": "linear", "factor": 2.0},
        }
    },
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", OLD_ROPES)
def test_rotary_positions_of_both_kinds_of_layers(tmp_path: Path, name: str, size: int) -> None:
    config = Gemma3TextConfig(**LAYERS, **heads(4, 2), **WINDOW, **types("sfs"))
    tiny_model(tmp_path, config)
    edit_config(tmp_path, {"rope_parameters": None} | OLD_ROPES[name])
    Reference.of_folder(tmp_path).check(size)


VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def with_vision(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What is published with a vision tower, and logits of text."""
    torch.manual_seed(0)
    text = LAYERS | heads(4, 2) | WINDOW | {"sliding_window_pattern": 2}
    places = {"image_token_index": 130, "boi_token_index": 128, "eoi_token_index": 129}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **places)
    config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config).eval()
    ids = torch.randint(0, 128, (3, 40))
    with torch.inference_mode():
        for parameter in model.model.language_model.parameters():
            parameter.normal_(0, 0.6 / parameter.shape[-1] ** 0.5)
        logits = model(ids).logits
    folder = tmp_path_factory.mktemp("vision")
    model.save_pretrained(folder)
    return Reference(folder, ids, logits)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_text_of_a_model_with_a_vision_tower(with_vision: Reference, size: int) -> None:
    with_vision.check(size)
    (note,) = read_spec(with_vision.folder).notes
    assert note.endswith("config.json: of this model, text alone is served; its vision tower is not read")


def test_what_files_with_a_vision_tower_leave_out(tmp_path: Path) -> None:
    """As those of 4B are."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "tie_word_embeddings": False}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "hidden_size": 3}
    spec = read(
        tmp_path, config | {"eos_token_id": [1, 106], "torch_dtype": "bfloat16", "vision_config": VISION}
    )
    theirs = Gemma3Config(text_config=dict(text)).text_config
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size) == (34, 2560, 10240)
    assert spec.num_heads == theirs.num_attention_heads
    assert spec.num_kv_heads == theirs.num_key_value_heads
    assert (spec.head_dim, spec.vocab_size) == (theirs.head_dim, theirs.vocab_size)
    assert spec.max_model_len == theirs.max_position_embeddings
    assert (spec.dtype, spec.eos_ids, spec.tie_embeddings) == ("bfloat16", (1, 106), True)
    assert spec.rope == RopeSpec(theta=1e6, scaling=LinearScaling(factor=8.0))
    assert spec.window is not None
    assert spec.window.size == 1024
    assert len(spec.window.layers) == 29


GEMMA: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GEMMA2 = GEMMA | {"architectures": ["Gemma2ForCausalLM"]}
GEMMA3 = GEMMA | {"architectures": ["Gemma3ForCausalLM"]}
ABOVE_0 = "must be a finite number above 0"


def read(path: Path, config: dict[str, Any]) -> ModelSpec:
    (path / "config.json").write_text(json.dumps(config))
    return read_spec(path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            GEMMA2,
            {
                "head_dim": 256,
                "tie_embeddings": True,
                "window": WindowSpec(size=4096, layers=(0, 2, 4, 6)),
                "attention_scale": 1 / 16,
                "attention_softcap": 50.0,
                "logit_softcap": 30.0,
                "embed_scale": 8.0,
                "activation": "gelu_tanh",
                "norm_offset": 1.0,
                "post_norms": True,
                "qk_norm": False,
                "rope": RopeSpec(theta=1e4),
            },
        ),
        (GEMMA2 | NO_CAPS, {"attention_softcap": None, "logit_softcap": None}),
        (GEMMA2 | {"hidden_act": "silu"}, {"activation": "gelu_tanh"}),
        (
            GEMMA3,
            {
                "head_dim": 256,
                "window": WindowSpec(size=4096, layers=(0, 1, 2, 3, 4, 6), rope=RopeSpec(theta=1e4)),
                "attention_softcap": None,
                "logit_softcap": None,
                "qk_norm": True,
                "rope": RopeSpec(theta=1e6),
            },
        ),
        (GEMMA3 | {"sliding_window_pattern": 1}, {"window": None}),
        (
            GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 7},
            {
                "rope": RopeSpec(theta=1e6, scaling=LinearScaling(factor=8.0)),
                "window": WindowSpec(size=4096, layers=(0, 1, 2, 3, 4, 5), rope=RopeSpec(theta=1e4)),
            },
        ),
        (
            GEMMA3
            | {
                "rope_parameters": {
                    "sliding_attention": {
                        "rope_type": "longrope",
                        "short_factor": [1.0] * 128,
                        "long_factor": [1.0] * 128,
                        "original_max_position_embeddings": 99,
                    }
                }
            },
            {"max_model_len": 99},
        ),
    ],
)
def test_what_a_config_means(tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = read(tmp_path, config)
    assert {key: getattr(spec, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GEMMA2 | {"hidden_activation": "gelu"}, "hidden_activation='gelu': is not supported in a Gemma2"),
        (
            GEMMA2 | {"use_bidirectional_attention": True},
            "bidirectional_attention=True: is not supported",
        ),
        (GEMMA2 | {"sliding_window": None}, "sliding_window=None: is required: 4 layers are of sliding"),
        (GEMMA2 | {"layer_types": ["full_attention"]}, "must be a list of 7 times full_attention or sliding"),
        (GEMMA2 | {"query_pre_attn_scalar": 0}, f"query_pre_attn_scalar=0: {ABOVE_0}"),
        (
            GEMMA2 | {"attn_logit_softcapping": -5},
            f"attn_logit_softcapping=-5: {ABOVE_0}",
        ),
        (GEMMA2 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: is not supported"),
        (
            GEMMA2 | {"rope_parameters": {"full_attention": {}}},
            "rope_parameters=.*: other rotary positions for each type of layer are not supported",
        ),
        (
            GEMMA3 | {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping=50.0: is not supported",
        ),
        (
            GEMMA3 | {"sliding_window_pattern": 0},
            "sliding_window_pattern=0: must be an integer",
        ),
        (GEMMA3 | {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters=.*: must be full_attention and"),
        (GEMMA3 | {"rope_parameters": {"full_attention": 3}}, "full_attention=3: must be an object"),
        (
            GEMMA3 | {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor=0.5: partial rotary positions are not supported",
        ),
        (GEMMA3 | {"original_max_position_embeddings": 7}, "original_max_position_embeddings=7: is not"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, config)


def test_dummy_norms_are_1(tmp_path: Path) -> None:
    spec = read(tmp_path, GEMMA3)
    weights = dummy_weights(spec, Shard.of(spec, 0, 1), torch.float32, CPU)
    layer = weights.layers[0]
    norms = (layer.attention_norm, layer.attention_post_norm, layer.mlp_norm, layer.mlp_post_norm)
    for norm in (*norms, layer.query_norm, layer.key_norm, weights.final_norm):
        assert norm is not None
        assert torch.equal(norm, torch.ones_like(norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_is_torchs_but_has_the_same_bits_everywhere(dtype: torch.dtype) -> None:
    gate_up = (3 * torch.randn(300, 202, generator=torch.Generator().manual_seed(0))).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    result = layer_ops.gelu_mul(gate_up)
    assert result.dtype == dtype
    torch.testing.assert_close(result, torch.nn.functional.gelu(gate, approximate="tanh") * up)
    for rows in (slice(0, 1), slice(3, 10), slice(100, 233)):
        assert torch.equal(layer_ops.gelu_mul(gate_up[rows]), result[rows])
