"""read_spec: what a model folder says, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tpworker.errors import ModelError
from tpworker.model.families import Llama3Scaling, RopeSpec, read_spec

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
    ("config_ids", "generation_ids", "expected"),
    [
        (2, None, (2,)),
        (None, None, ()),
        (2, [5, 7], (5, 7, 2)),
        ([2, 7], [5, 7], (5, 7, 2)),
        ([], 9, (9,)),
    ],
)
def test_end_of_sequence_ids_of_both_files_are_merged(
    tmp_path: Path, config_ids: Any, generation_ids: Any, expected: tuple[int, ...]
) -> None:
    spec = read_spec(folder(tmp_path, LLAMA | {"eos_token_id": config_ids}, {"eos_token_id": generation_ids}))
    assert spec.eos_ids == expected


def test_generation_defaults(tmp_path: Path) -> None:
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True, "repetition_penalty": 1.0}
    spec = read_spec(folder(tmp_path, LLAMA, generation))
    assert spec.generation_defaults == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert spec.generation_ignored == {}


def test_generation_defaults_may_be_greedy_or_absent(tmp_path: Path) -> None:
    spec = read_spec(folder(tmp_path, LLAMA, {"temperature": 0, "top_p": None}))
    assert spec.generation_defaults == {"temperature": 0.0}


def test_generation_defaults_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    spec = read_spec(folder(tmp_path, LLAMA, {"repetition_penalty": 1.1, "min_p": 0.05}))
    assert spec.generation_ignored == {"repetition_penalty": 1.1, "min_p": 0.05}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["Gemma3ForCausalLM"]},
            r"'Gemma3ForCausalLM' is not supported. Supported: .*Llama",
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
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn': .*only llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "type='linear': .*only llama3"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear': must be an object"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "factor=None: is required"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0: must be above"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention"),
        ({"sliding_window": 4096}, "sliding_window=4096: sliding-window attention is not supported"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding-window attention is not supported"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 4096, "use_sliding_window": True},
            "sliding-window attention is not supported",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": None}, "num_key_value_heads"),
        ({"eos_token_id": 49152}, "eos_token_id=49152: must be token ids from 0 to 49151"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id=.*: must be token ids"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_spec(folder(tmp_path, LLAMA | change))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temperature": -1}, "temperature=-1: must be a finite number above 0"),
        ({"temperature": 150}, "temperature=150: must be at most 100"),
        ({"top_k": 2**31}, f"top_k={2**31}: must be at most {2**31 - 1}"),
        ({"top_p": 1.5}, "top_p=1.5: must be above 0 and at most 1"),
        ({"top_k": -3}, "top_k=-3: must be an integer of at least 0"),
        ({"eos_token_id": -1}, "eos_token_id=-1"),
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
