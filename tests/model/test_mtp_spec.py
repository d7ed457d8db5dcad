"""Which models have a head for multi-token prediction, and what its tensors are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.model.test_families import ERNIE, ERNIE_DENSE, GLM, LLAMA, MIXTRAL, PHI3, QWEN, folder
from tpworker.errors import ModelError
from tpworker.model.families import FAMILIES, MtpSpec, read_spec, why_no_mtp
from tpworker.model.families.spec import MAX_LAYERS

KEY = "num_nextn_predict_layers"
ONE = {KEY: 1}
OF_ERNIE = MtpSpec(before_final_norm=True)
LLAMAS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SLIDING = {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 0}


@pytest.mark.parametrize(
    ("config", "count", "mtp"),
    [
        (GLM, 1, MtpSpec(has_experts=True)),  # transformers' default
        (GLM | {KEY: 3}, 3, MtpSpec(has_experts=True)),
        (GLM | ONE | {"first_k_dense_replace": 4}, 1, MtpSpec()),
        (GLM | {KEY: 0}, 0, None),
        (ERNIE, 0, None),
        (ERNIE | ONE, 1, OF_ERNIE),
        (ERNIE | ONE | {"moe_layer_start_index": 0}, 1, MtpSpec(before_final_norm=True, has_experts=True)),
        (ERNIE | ONE | {"moe_layer_start_index": 0, "moe_layer_interval": 2}, 1, OF_ERNIE),
        (ERNIE_DENSE, 0, None),
        (ERNIE_DENSE | ONE, 1, OF_ERNIE),
        (ERNIE_DENSE | ONE | {"use_bias": True}, 1, MtpSpec(before_final_norm=True, has_bias=True)),
        *((LLAMA | {"architectures": [name]}, 0, None) for name in LLAMAS),
        *((LLAMA | ONE | {"architectures": [name]}, 1, MtpSpec()) for name in LLAMAS),
        *((LLAMA | ONE | SLIDING | {"architectures": [name]}, 1, MtpSpec()) for name in LLAMAS[1:]),
        (MIXTRAL | ONE, 0, None),
        (QWEN | ONE, 0, None),
        (PHI3 | ONE, 0, None),
    ],
)
def test_which_head_a_config_names(
    tmp_path: Path, config: dict[str, Any], count: int, mtp: MtpSpec | None
) -> None:
    spec = read_spec(folder(tmp_path, config))
    assert (spec.num_mtp_layers, spec.mtp) == (count, mtp)
    reason = why_no_mtp(spec)
    assert (reason is None) == (mtp is not None)
    if reason is None:
        return
    assert spec.architecture in reason
    assert "--speculative-method ngram" in reason
    assert (KEY in reason) == (FAMILIES[spec.family].names.mtp is not None)
    assert ("not supported" in reason) == (FAMILIES[spec.family].names.mtp is None)


@pytest.mark.parametrize("value", [-1, MAX_LAYERS + 1, True, "1", 1.5, [1]])
@pytest.mark.parametrize("config", [GLM, ERNIE, ERNIE_DENSE, LLAMA], ids=["glm", "ernie", "dense", "llama"])
def test_a_number_of_heads_that_is_none_is_named(tmp_path: Path, config: dict[str, Any], value: Any) -> None:
    with pytest.raises(ModelError, match=f"{KEY}=.*must be"):
        read_spec(folder(tmp_path, config | {KEY: value}))


def test_experts_of_the_head_count(tmp_path: Path) -> None:
    """16 layers of 4096 experts are all that there may be."""
    config = GLM | {"num_hidden_layers": 17, "n_routed_experts": 4095, "n_shared_experts": 1}
    assert read_spec(folder(tmp_path, config | {KEY: 0})).moe is not None
    with pytest.raises(ModelError, match="all layers together have 69632 experts"):
        read_spec(folder(tmp_path, config))


@pytest.mark.parametrize(
    ("family", "layer", "others"),
    [
        (
            "glm4_moe",
            "model.layers.46",
            tuple(f"model.layers.46.{name}" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")),
        ),
        (
            "ernie4_5_moe",
            "model.mtp_block.0",
            ("model.mtp_emb_norm.0", "model.mtp_hidden_norm.0", "model.mtp_linear_proj.0", ""),
        ),
        (
            "llama",
            "mtp.layers.0",
            ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm"),
        ),
    ],
)
def test_names_of_published_tensors(family: str, layer: str, others: tuple[str, ...]) -> None:
    names = FAMILIES[family].names.of_mtp(46)
    assert names.mtp is not None
    mtp = names.mtp
    assert (mtp.embedding_norm, mtp.hidden_norm, mtp.projection, mtp.norm) == others
    assert names.query == f"{layer}.self_attn.q_proj"
    assert names.down == f"{layer}.mlp.down_proj"
    if names.moe is not None:
        assert names.moe.up == f"{layer}.mlp.experts.{{expert}}.up_proj"
        assert names.moe.bias.startswith(f"{layer}.mlp.")
    assert (names.embed, names.lm_head, names.final_norm) == ("model.embed_tokens", "lm_head", "model.norm")
    assert FAMILIES[family].names.of_layer(3).query == "model.layers.3.self_attn.q_proj"
