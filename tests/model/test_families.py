"""read_spec: what a model folder says, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.model.helpers import edit_config, tiny_model
from tpworker.errors import ModelError
from tpworker.model.families import (
    FAMILIES,
    Llama3Scaling,
    MoeSpec,
    MtpSpec,
    RopeSpec,
    WindowSpec,
    read_spec,
)
from tpworker.model.families.generation import LEAST_TOP_P
from tpworker.model.families.spec import MAX_EOS_IDS, MAX_VOCAB_SIZE
from tpworker.model.sampling import _keep
from tpworker.sampling_params import MAX_STOP_IDS

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 32,
    "long_factor": [2.0] * 32,
}

DECODER: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 24,
}
GLM = DECODER | {
    "architectures": ["Glm4MoeForCausalLM"],
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
ERNIE = DECODER | {"architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": 8, "moe_k": 2}
ERNIE_DENSE = DECODER | {"architectures": ["Ernie4_5ForCausalLM"]}
QWEN = DECODER | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2}
PHI_LONGROPE = {
    "original_max_position_embeddings": 77,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}
MIXTRAL = DECODER | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

FAMILY_CONFIGS = {config["architectures"][0]: config for config in (GLM, ERNIE, ERNIE_DENSE, QWEN, MIXTRAL)}
PHI3 = DECODER | {"architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 8192}
ARCHITECTURES = [name for family in FAMILIES.values() for name in family.architectures]
SMALL = {key: DECODER[key] for key in DECODER if key != "moe_intermediate_size"}

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"


def folder(path: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_a_llama_config(tmp_path: Path) -> None:
    spec = read_spec(folder(tmp_path, LLAMA))
    assert spec.family == "llama"
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (9, 3, 64)
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size) == (49152, 576, 1536)
    assert (spec.num_layers, spec.max_model_len, spec.rms_norm_eps) == (30, 8192, 1e-5)
    assert spec.rope == RopeSpec(theta=1e5)
    assert spec.tie_embeddings
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm) == (False,) * 4
    assert (spec.dtype, spec.bos_id, spec.eos_ids) == ("bfloat16", 1, (2,))
    assert spec.generation_defaults == {}
    assert spec.generation_ignored == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"head_dim": 32}, {"head_dim": 32}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 9}),
        ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True, "mlp_bias": False}),
        ({"mlp_bias": True}, {"qkv_bias": False, "mlp_bias": True}),
        ({"tie_word_embeddings": None}, {"tie_embeddings": False}),
        ({"dtype": "float16"}, {"dtype": "float16"}),
        ({"torch_dtype": None}, {"dtype": "float32"}),
        ({"rope_theta": None}, {"rope": RopeSpec(theta=10000.0)}),
        ({"rope_scaling": {"type": "default"}}, {"rope": RopeSpec(theta=1e5)}),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            {"rope": RopeSpec(theta=5e5)},
        ),
        (
            {"rope_scaling": LLAMA3},
            {
                "rope": RopeSpec(
                    theta=1e5,
                    scaling=Llama3Scaling(
                        factor=8,
                        low_freq_factor=1,
                        high_freq_factor=4,
                        original_max_position_embeddings=8192,
                    ),
                )
            },
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, {"qkv_bias": False}),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8192}, {"max_model_len": 8192}),
        ({"architectures": ["Qwen2ForCausalLM"]}, {"qkv_bias": True, "output_bias": False}),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096}, {"max_model_len": 8192}),
        ({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}, {"qk_norm": True}),
    ],
)
def test_variants(tmp_path: Path, change: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = read_spec(folder(tmp_path, LLAMA | change))
    assert {key: getattr(spec, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            GLM,
            {
                "rope": RopeSpec(theta=1e4, rotary_dim=8),
                "qkv_bias": False,
                "qk_norm": False,
                "rms_norm_eps": 1e-5,
                "num_mtp_layers": 1,
                "mtp": MtpSpec(has_experts=True),
                "moe": MoeSpec(
                    layers=(1, 2, 3),
                    num_experts=8,
                    experts_per_token=2,
                    intermediate_size=24,
                    num_shared=1,
                    score="sigmoid",
                    has_bias=True,
                    norm_min=1e-20,
                ),
            },
        ),
        (GLM | {"attention_bias": True}, {"qkv_bias": True, "output_bias": False, "mlp_bias": False}),
        (GLM | {"first_k_dense_replace": 4}, {"moe": None}),
        (GLM | {"partial_rotary_factor": 0.25}, {"rope": RopeSpec(theta=1e4, rotary_dim=4)}),
        (GLM | {"partial_rotary_factor": 1}, {"rope": RopeSpec(theta=1e4)}),
        (
            GLM | {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            {"rope": RopeSpec(theta=1e6, rotary_dim=8)},
        ),
        (GLM | {"num_nextn_predict_layers": 0}, {"num_mtp_layers": 0, "mtp": None}),
        (GLM | {"num_nextn_predict_layers": 3}, {"num_mtp_layers": 3, "mtp": MtpSpec(has_experts=True)}),
        (
            ERNIE,
            {
                "rope": RopeSpec(theta=5e5, interleaved=True),
                "tie_embeddings": True,
                "head_dim": 8,
                "moe": MoeSpec(
                    layers=(1, 2, 3),
                    num_experts=8,
                    experts_per_token=2,
                    intermediate_size=24,
                    num_shared=2,
                    has_bias=True,
                    norm_min=1e-12,
                    float32_gate=True,
                ),
            },
        ),
        (PHI3, {"rope": RopeSpec(theta=1e4), "max_model_len": 8192, "window": None, "rms_norm_eps": 1e-5}),
        (PHI3 | {"num_key_value_heads": None}, {"num_kv_heads": 8}),
        (PHI3 | {"sliding_window": 99}, {"window": WindowSpec(size=99, layers=(0, 1, 2, 3))}),
        (PHI3 | {"partial_rotary_factor": 0.75}, {"rope": RopeSpec(theta=1e4, rotary_dim=6)}),
        *(
            (PHI3 | length | {"rope_scaling": PHI_LONGROPE | {"type": kind}}, {"max_model_len": expected})
            for kind in ("longrope", "su", "yarn")
            # The class's own length hides the section's, 77.
            for length, expected in (({}, 4096), ({"original_max_position_embeddings": 512}, 512))
        ),
        (ERNIE | {"moe_layer_start_index": 4}, {"moe": None}),
        (ERNIE | {"tie_word_embeddings": False}, {"tie_embeddings": False}),
        (ERNIE_DENSE, {"head_dim": 128, "moe": None, "qkv_bias": False, "tie_embeddings": True}),
        (ERNIE_DENSE | {"head_dim": None}, {"head_dim": 8}),
        (ERNIE_DENSE | {"use_bias": True}, {"qkv_bias": True, "output_bias": True, "mlp_bias": True}),
        (
            QWEN,
            {
                "rope": RopeSpec(theta=1e4),
                "qk_norm": True,
                "moe": MoeSpec(
                    layers=(0, 1, 2, 3),
                    num_experts=8,
                    experts_per_token=2,
                    intermediate_size=24,
                    normalise=False,
                ),
            },
        ),
        (QWEN | {"mlp_only_layers": [0, 1, 2, 3]}, {"moe": None}),
        (QWEN | {"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
        (
            MIXTRAL,
            {
                "rope": RopeSpec(theta=1e6),
                "moe": MoeSpec(
                    layers=(0, 1, 2, 3), num_experts=8, experts_per_token=2, intermediate_size=128
                ),
            },
        ),
    ],
)
def test_mixtures_and_their_relatives(
    tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    spec = read_spec(folder(tmp_path, config))
    assert {key: getattr(spec, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (ERNIE | {"moe_layer_start_index": 0, "moe_layer_end_index": 2}, (0, 1, 2)),
        (ERNIE | {"moe_layer_start_index": 0, "moe_layer_interval": 2}, (1, 3)),
        (ERNIE | {"moe_layer_end_index": 99}, (1, 2, 3)),
        (ERNIE | {"moe_layer_end_index": None}, (1, 2, 3)),
        (QWEN | {"decoder_sparse_step": 2}, (1, 3)),
        (QWEN | {"mlp_only_layers": [0, 3]}, (1, 2)),
        (GLM | {"first_k_dense_replace": 3}, (3,)),
    ],
)
def test_which_layers_are_mixtures(tmp_path: Path, config: dict[str, Any], layers: tuple[int, ...]) -> None:
    spec = read_spec(folder(tmp_path, config))
    assert spec.moe is not None
    assert spec.moe.layers == layers


ALL = tuple(range(30))
SLIDING = {"sliding_window": 512, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (LLAMA, None),
        (LLAMA | {"architectures": ["MistralForCausalLM"]}, WindowSpec(size=4096, layers=ALL)),
        (
            LLAMA | SLIDING | {"architectures": ["MistralForCausalLM"], "use_sliding_window": False},
            WindowSpec(size=512, layers=ALL),
        ),
        (LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": None}, None),
        (LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512}, None),
        (LLAMA | SLIDING | {"architectures": ["Qwen2ForCausalLM"]}, WindowSpec(size=512, layers=(28, 29))),
        (
            LLAMA
            | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "max_window_layers": 29},
            WindowSpec(size=4096, layers=(29,)),
        ),
        (LLAMA | SLIDING | {"architectures": ["Qwen3ForCausalLM"], "max_window_layers": 30}, None),
        (
            LLAMA
            | SLIDING
            | {
                "architectures": ["Qwen3ForCausalLM"],
                "layer_types": ["sliding_attention", "full_attention"] * 15,
            },
            WindowSpec(size=512, layers=tuple(range(0, 30, 2))),
        ),
        (QWEN | {"sliding_window": 64}, None),
        (QWEN | SLIDING | {"max_window_layers": 2}, WindowSpec(size=512, layers=(0, 1, 2, 3))),
        (MIXTRAL, None),
        (MIXTRAL | {"sliding_window": 64}, WindowSpec(size=64, layers=(0, 1, 2, 3))),
    ],
)
def test_which_layers_have_a_window(
    tmp_path: Path, config: dict[str, Any], window: WindowSpec | None
) -> None:
    assert read_spec(folder(tmp_path, config)).window == window


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_configs_of_benchmarks_are_supported(path: Path) -> None:
    spec = read_spec(path.parent)
    assert spec.dtype == "bfloat16"
    assert (spec.moe is None) == (path.parent.name in ("qwen3-0.6b", "qwen3-8b"))


@pytest.mark.parametrize("config_ids", [2, [2, 7], [7, 7]])
@pytest.mark.parametrize("generation_ids", ["no file", 5, [5, 7], [7, 5, 7]])
def test_ends_are_those_of_transformers_generate(
    tmp_path: Path, config_ids: Any, generation_ids: Any
) -> None:
    tiny_model(tmp_path, LlamaConfig(**SMALL))
    edit_config(tmp_path, {"eos_token_id": config_ids})
    (tmp_path / "generation_config.json").unlink()
    if generation_ids != "no file":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_ids}))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    expected = expected if isinstance(expected, list) else [expected]
    spec = read_spec(tmp_path)
    assert set(spec.eos_ids) == set(expected)
    assert len(spec.eos_ids) == len(set(expected))
    assert not spec.eos_is_default
    assert spec.notes == ()


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_a_generation_config_that_names_no_end_hides_none(
    tmp_path: Path, generation: dict[str, Any] | None
) -> None:
    assert read_spec(folder(tmp_path, LLAMA, generation)).eos_ids == (2,)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_end_that_no_file_names_is_the_config_classes(tmp_path: Path, architecture: str) -> None:
    config = FAMILY_CONFIGS.get(architecture, LLAMA) | {"architectures": [architecture]}
    config = {key: value for key, value in config.items() if key != "eos_token_id"}
    expected = getattr(transformers, architecture).config_class().get_text_config().eos_token_id
    silent = read_spec(folder(tmp_path, config, {}))
    assert silent.eos_ids == (() if expected is None else (expected,))
    assert silent.ended_by(None).eos_ids == silent.eos_ids
    assert silent.ended_by(9).eos_ids == (9,), "the tokenizer's counts more than the class's"
    null = read_spec(folder(tmp_path, config | {"eos_token_id": None}))
    assert null.eos_ids == ()
    assert null.ended_by(9).eos_ids == (9,)
    small = read_spec(folder(tmp_path, config | {"vocab_size": expected or 2}))
    assert small.eos_ids == ()


def test_the_tokenizers_end_counts_besides(tmp_path: Path) -> None:
    spec = read_spec(folder(tmp_path, LLAMA, {"eos_token_id": [5, 7]}))
    assert spec.ended_by(2).eos_ids == (5, 7, 2)
    assert spec.ended_by(7).eos_ids == (5, 7)
    for nothing in (None, -1, 49152):
        assert spec.ended_by(nothing) == spec


def test_as_many_tokens_end_an_output_as_there_is_room_for(tmp_path: Path) -> None:
    assert MAX_EOS_IDS == MAX_STOP_IDS
    spec = read_spec(folder(tmp_path, LLAMA | {"eos_token_id": list(range(16)) * 2}))
    assert spec.eos_ids == tuple(range(16))
    with pytest.raises(ModelError, match="the tokenizer's EOS, 99, are 17 tokens; at most 16 can end"):
        spec.ended_by(99)
    with pytest.raises(
        ModelError, match=r"config.json: eos_token_id=\[0, 1, .*\]: names 17 tokens; at most 16"
    ):
        read_spec(folder(tmp_path, LLAMA | {"eos_token_id": list(range(17))}))


@pytest.mark.parametrize("ids", [-1, 49152, [2, 49152], [-1], 10**30])
def test_an_end_outside_the_vocabulary_is_told_of(tmp_path: Path, ids: Any) -> None:
    """transformers loads such a model, too, and warns of negative ones."""
    for config, generation in ((LLAMA, {"eos_token_id": ids}), (LLAMA | {"eos_token_id": ids}, {})):
        spec = read_spec(folder(tmp_path, config, generation))
        assert spec.eos_ids in ((2,), ())
        (note,) = spec.notes
        assert "config.json: eos_token_id=" in note
        assert "the vocabulary has ids from 0 to 49151; others are never generated" in note


@pytest.mark.parametrize("ids", [-1, [-1], 49152, None, 1.0])
def test_a_beginning_outside_the_vocabulary_is_none(tmp_path: Path, ids: Any) -> None:
    spec = read_spec(folder(tmp_path, LLAMA | {"bos_token_id": ids}))
    assert spec.bos_id == (1 if ids == 1 else None)
    assert spec.notes == ()


def test_a_quantisation_that_says_nothing_is_none(tmp_path: Path) -> None:
    assert read_spec(folder(tmp_path, LLAMA | {"quantization_config": {}})) == read_spec(
        folder(tmp_path, LLAMA)
    )


def test_generation_defaults(tmp_path: Path) -> None:
    asked = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "min_p": 0.1}
    spec = read_spec(folder(tmp_path, LLAMA, {**asked, "do_sample": True}))
    assert spec.generation_defaults == asked
    assert spec.generation_ignored == {}


def test_generation_defaults_may_be_greedy_or_absent(tmp_path: Path) -> None:
    spec = read_spec(folder(tmp_path, LLAMA, {"temperature": 0, "top_p": None}))
    assert spec.generation_defaults == {"temperature": 0.0}


def test_generation_defaults_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    asked = {"typical_p": 0.5, "suppress_tokens": [3], "stop_strings": ["x"]}
    asked |= {"num_beams": 4, "eta_cutoff": 0.1, "forced_eos_token_id": 2}
    assert read_spec(folder(tmp_path, LLAMA, asked)).generation_ignored == asked
    neutral = {"typical_p": 1, "suppress_tokens": [], "num_beams": 1, "min_length": 0}
    assert read_spec(folder(tmp_path, LLAMA, neutral)).generation_ignored == {}


@pytest.mark.parametrize(
    ("generation", "defaults"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_p": 0}, {"top_p": LEAST_TOP_P}),
        ({"top_p": 0.0, "top_k": None}, {"top_p": LEAST_TOP_P}),
        ({"do_sample": 0}, {"temperature": 0.0}),
    ],
)
def test_what_others_write_for_none(
    tmp_path: Path, generation: dict[str, Any], defaults: dict[str, float]
) -> None:
    spec = read_spec(folder(tmp_path, LLAMA, generation))
    assert spec.generation_defaults == defaults
    assert {type(value) for value in spec.generation_defaults.values()} <= {int, float}


def test_a_top_p_of_0_keeps_the_most_probable_token_alone() -> None:
    """As transformers' TopPLogitsWarper does; even where all are nearly alike, in the largest vocabulary."""
    values = torch.zeros(1, 64, dtype=torch.float32)  # the 64 best of all
    log_total = torch.tensor(MAX_VOCAB_SIZE, dtype=torch.float32).log()[None]
    top_k, top_p = torch.tensor([MAX_VOCAB_SIZE]), torch.tensor([LEAST_TOP_P])
    kept = _keep(values, log_total, top_k, top_p, torch.tensor([-torch.inf]), MAX_VOCAB_SIZE)
    assert kept.tolist() == [[True] + [False] * 63]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["PhiForCausalLM"]},
            r"'PhiForCausalLM' is not supported. Supported: .*Llama",
        ),
        ({"architectures": None}, "architectures=None: must be a list"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM': must be a list"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .*'gptq'.* not supported"),
        ({"compression_config": {"quant_method": "x"}}, "quantised .*'x'"),
        ({"vocab_size": None}, "vocab_size=None: is required"),
        ({"vocab_size": "49152"}, "vocab_size='49152': must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: must be an integer of at least 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True: must be an integer"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads=2: must divide num_attention_heads \(9\)"),
        ({"hidden_size": 577}, r"hidden_size=577: .*multiple of num_attention_heads \(9\)"),
        ({"head_dim": 63}, "head_dim=63: .*even"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05: must be a finite number above 0"),
        ({"rms_norm_eps": True}, "rms_norm_eps=True: must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: must be true or false"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype='float8_e4m3fn': must be one of float32"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: is not supported"),
        *(
            (
                {key: {kind_key: kind, "factor": 4.0}},
                f"{kind_key}='{kind}': is not supported; .* linear, dynamic, yarn, longrope, llama3",
            )
            for key in ("rope_scaling", "rope_parameters")
            for kind_key, kind in (("type", "su"), ("rope_type", "proportional"))
        ),
        *(
            ({"rope_scaling": LONGROPE | {key: value}}, f"{key}=.*: must be {words}")
            for key, value, words in (
                ("short_factor", None, "a list of 32 finite numbers above 0"),
                ("short_factor", [1.0] * 31, "a list of 32"),
                ("short_factor", [1.0] * 31 + [0], "a list of 32"),
                ("long_factor", [1.0] * 31 + ["1"], "a list of 32"),
                ("long_factor", 2.0, "a list of 32"),
                ("original_max_position_embeddings", 1, "at least 2"),
                ("attention_factor", -1.0, "a finite number above 0"),
            )
        ),
        ({"rope_scaling": {"type": "dynamic"}}, "factor=None: is required"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None: is required"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "rope_theta": 1.0}},
            "rope_theta=1.0: must be above 1",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters=.*each type of layer",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling='linear': must be an object"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "factor=None: is required"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0: must be above"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "must be absent or a list of full_attention",
        ),
        ({"layer_types": 5}, "layer_types=5: must be absent or a list"),
        *(
            (
                {"architectures": [f"{name}ForCausalLM"], "layer_types": types},
                "layer_types=.*: must be a list of 30",
            )
            for name in ("Qwen2", "Qwen3")
            for types in (
                5,
                ["full_attention"] * 29,
                ["full_attention"] * 29 + ["chunked_attention"],
                [[]] * 30,
            )
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 30},
            "sliding_window=None: is required with use_sliding_window: 30 layers are",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "layer_types": ["sliding_attention"] * 30,
                "sliding_window": None,
                "use_sliding_window": True,
            },
            "sliding_window=None: is required: 30 layers are",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 30},
            "layer_types=.* a list of sliding_attention, which is what all 30 layers have",
        ),
        *(
            (
                {"architectures": ["MistralForCausalLM"], "sliding_window": size},
                f"sliding_window={size}: must be",
            )
            for size in (0, -1, 2.5, True, 2**31)
        ),
        ({"quantization_config": {}, "compression_config": {"quant_method": "x"}}, "quantised .*'x'"),
        ({"sliding_window": 4096}, "sliding_window=4096: is not supported in a LlamaForCausalLM; a copy"),
        ({"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": None}, "num_key_value_heads"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id=.*: must be a token id or a list"),
        ({"bos_token_id": 1.5}, "bos_token_id=1.5: must be a token id or a list"),
        ({"eos_token_id": [True]}, r"eos_token_id=\[True\]: must be a token id or a list"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_spec(folder(tmp_path, LLAMA | change))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA, {"num_local_experts": 8}, "num_local_experts=8: is not supported in a Llama"),
        (GLM, {"n_group": 3}, r"n_group=3: must divide n_routed_experts \(8\)"),
        (GLM, {"n_group": 8}, "n_group=8: must divide .* into groups of two or more"),
        (GLM, {"n_group": 4, "topk_group": 5}, r"topk_group=5: must be at most n_group \(4\)"),
        (
            GLM,
            {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
            "num_experts_per_tok=3: must be at most 2",
        ),
        (GLM, {"num_experts_per_tok": 9}, r"num_experts_per_tok=9: must be at most 8 \(n_routed_experts\)"),
        (
            GLM,
            {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 9},
            r"must be at most 4 \(topk_group=2 of n_group=4 leaves 4 of 8 experts\)",
        ),
        (MIXTRAL, {"num_experts_per_tok": 9}, r"must be at most 8 \(num_local_experts\)"),
        (QWEN, {"num_experts_per_tok": 9}, r"must be at most 8 \(num_experts\)"),
        *(
            (config, change, "is not supported in a ")
            for config in (MIXTRAL, QWEN)
            for change in (
                {"scoring_func": "sigmoid"},
                {"n_shared_experts": 1},
                {"topk_method": "noaux_tc"},
                {"routed_scaling_factor": 2.5},
                {"n_group": 4},
            )
        ),
        (MIXTRAL, {"norm_topk_prob": False}, "norm_topk_prob=False: is not supported in a Mixtral"),
        (GLM, {"n_routed_experts": None}, "n_routed_experts=None: is required"),
        (GLM, {"scoring_func": "softmax"}, "scoring_func='softmax': is not supported"),
        (GLM, {"topk_method": "greedy"}, "topk_method='greedy': is not supported"),
        (GLM, {"partial_rotary_factor": 0.2}, "partial_rotary_factor=0.2: must leave an even part .* of 16"),
        (GLM, {"partial_rotary_factor": 2.0}, "partial_rotary_factor=2.0: must leave"),
        (GLM, {"hidden_act": "gelu"}, "hidden_act='gelu': is not supported in a Glm4MoeForCausalLM"),
        (GLM, {"routed_scaling_factor": 0}, "routed_scaling_factor=0: must be a finite number above 0"),
        (GLM, {"norm_topk_prob": 1}, "norm_topk_prob=1: must be true or false"),
        (
            GLM,
            {"rope_scaling": {"rope_type": "su", "factor": 4.0}},
            "rope_type='su': .* linear, dynamic",
        ),
        (ERNIE, {"use_bias": True}, "use_bias=True: biases are not supported"),
        (ERNIE, {"moe_k": 9}, r"moe_k=9: must be at most 8 \(moe_num_experts\)"),
        (ERNIE, {"moe_gate_act": "sigmoid"}, "moe_gate_act='sigmoid': is not supported"),
        (ERNIE, {"moe_norm_gate_logits": False}, "moe_norm_gate_logits=False: is not supported"),
        (ERNIE, {"moe_group_experts": True}, "moe_group_experts=True: is not supported"),
        (ERNIE, {"moe_num_experts": [64, 64]}, r"moe_num_experts=\[64, 64\]: must be an integer"),
        (ERNIE, {"moe_layer_end_index": [1, 2]}, "moe_layer_end_index=.*must be an integer"),
        (ERNIE, {"use_rmsnorm": False}, "use_rmsnorm=False: is not supported"),
        (ERNIE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: is not supported"),
        (
            ERNIE_DENSE,
            {"moe_num_experts": 8},
            "moe_num_experts=8: is not supported in an Ernie4_5For",
        ),
        (QWEN, {"num_experts_per_tok": None}, "num_experts_per_tok=None: is required"),
        (
            PHI3,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "type='linear': is not supported in a Phi3",
        ),
        (
            PHI3,
            {"rope_scaling": PHI_LONGROPE | {"type": "su", "long_factor": [1.0]}},
            "be a list of 4 finite",
        ),
        (PHI3, {"attention_bias": True}, "attention_bias=True: is not supported in a Phi3"),
        (QWEN, {"mlp_only_layers": 3}, "mlp_only_layers=3: must be a list"),
        (QWEN, {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8: is not supported"),
        (QWEN, {"layer_types": ["sliding_attention"] * 4}, "layer_types=.* a list of full_attention"),
        (GLM, {"sliding_window": 64}, "sliding_window=64: is not supported in a Glm4MoeForCausalLM"),
        (
            ERNIE_DENSE,
            {"sliding_window": 64},
            "sliding_window=64: is not supported in an Ernie4_5ForCausalLM",
        ),
        (MIXTRAL, {"num_local_experts": None}, "num_local_experts=None: is required"),
    ],
)
def test_mixtures_that_cannot_be_served_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read_spec(folder(tmp_path, config | change))


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temperature": -1}, "temperature=-1: must be a finite number above 0"),
        ({"temperature": 150}, "temperature=150: must be at most 100"),
        ({"top_k": 2**31}, f"top_k={2**31}: must be at most {2**31 - 1}"),
        ({"top_p": 1.5}, "top_p=1.5: must be at least 0 and at most 1"),
        ({"top_p": -0.1}, "top_p=-0.1: must be a finite number of at least 0"),
        ({"top_k": -3}, "top_k=-3: must be an integer of at least -1"),
        ({"top_k": 50.5}, "top_k=50.5: must be an integer of at least -1"),
        ({"top_k": True}, "top_k=True: must be an integer of at least -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>': must be a token id or a list"),
    ],
)
def test_bad_generation_defaults_are_refused(
    tmp_path: Path, generation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=f"generation_config.json: {message}"):
        read_spec(folder(tmp_path, LLAMA, generation))


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds list, not an object"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_spec(tmp_path)


def test_reading_a_spec_imports_no_torch(tmp_path: Path) -> None:
    folder(tmp_path, LLAMA)
    code = (
        "import sys; from pathlib import Path; from tpworker.model.families import read_spec; "
        "read_spec(Path(sys.argv[1])); assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_model_that_says_do_not_sample_is_greedy(tmp_path: Path) -> None:
    spec = read_spec(folder(tmp_path, LLAMA, {"do_sample": False, "temperature": 0.7}))
    assert spec.generation_defaults == {"temperature": 0.0}
