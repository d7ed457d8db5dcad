"""The Llama family: RMSNorm, rotary positions, grouped-query attention, gated SiLU MLP, all dense.

Llama 2 and 3 (and what is published as such: SmolLM2, Vicuna, …), Mistral without a sliding window, and
the dense Qwen2 and Qwen3 use the same weight names; they differ in biases and in Qwen3's norm of query and
key heads.
"""

from __future__ import annotations

from typing import Any

from tpworker.model.families.common import NAMES, read_decoder, refuse_sliding_window, refuse_unknown
from tpworker.model.families.spec import Config, Family


def _read(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that a config of this family determines. Raises ModelError."""
    architecture = config.values["architectures"][0]
    refuse_unknown(config, architecture, {})
    is_llama, is_qwen3 = architecture == "LlamaForCausalLM", architecture == "Qwen3ForCausalLM"
    refuse_sliding_window(
        config,
        absent=4096 if architecture == "MistralForCausalLM" else None,
        used=architecture not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    )
    attention_bias = (is_llama or is_qwen3) and config.boolean("attention_bias", default=False)
    return read_decoder(config, rms_norm_eps=1e-6, kv_heads_required=not is_llama) | {
        "qkv_bias": architecture == "Qwen2ForCausalLM" or attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": is_llama and config.boolean("mlp_bias", default=False),
        "qk_norm": is_qwen3,
    }


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    read=_read,
    names=NAMES,
)
