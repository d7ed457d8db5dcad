"""The Llama family: RMSNorm, rotary positions, grouped-query attention, gated SiLU MLP, all dense.

Llama 2 and 3 (and what is published as such: SmolLM2, Vicuna, …), Mistral, and the dense Qwen2 and Qwen3 use
the same weight names; they differ in biases, in Qwen3's norm of query and key heads, and in which layers have
a sliding window: all of Mistral's, and some of Qwen's if the config says so.

A head for multi-token prediction is one that was trained for such a model afterwards, e.g. by distillation.
Its tensors are named as in Qwen3-Next's checkpoints and mean the same (vLLM's qwen3_next_mtp.py): mtp.fc
takes [pre_fc_norm_embedding(embedding), pre_fc_norm_hidden(state behind the model's final norm)],
mtp.layers.0 is a layer like the model's own, without a window, and mtp.norm stands before the output head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpworker.model.families.common import NAMES, read_decoder, read_mtp, refuse_unknown
from tpworker.model.families.config import Config
from tpworker.model.families.spec import MAX_LAYERS, Family, MtpNames, WindowSpec
from tpworker.model.families.windows import (
    read_window,
    read_window_of_some,
    refuse_sliding_window,
    types_from,
)

_WINDOW = 4096  # what an absent sliding_window means


def _read(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that a config of this family determines. Raises ModelError."""
    architecture = config.values["architectures"][0]
    refuse_unknown(config, architecture, {})
    is_llama, is_qwen3 = architecture == "LlamaForCausalLM", architecture == "Qwen3ForCausalLM"
    attention_bias = (is_llama or is_qwen3) and config.boolean("attention_bias", default=False)
    fields = read_decoder(config, rms_norm_eps=1e-6, kv_heads_required=not is_llama) | read_mtp(config)
    return fields | {
        "window": _read_window(config, architecture, fields["num_layers"]),
        "qkv_bias": architecture == "Qwen2ForCausalLM" or attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": is_llama and config.boolean("mlp_bias", default=False),
        "qk_norm": is_qwen3,
    }


def _read_window(config: Config, architecture: str, num_layers: int) -> WindowSpec | None:
    if architecture == "LlamaForCausalLM":
        refuse_sliding_window(config, architecture, num_layers)
        return None
    if architecture == "MistralForCausalLM":
        return read_window(config, num_layers, absent=_WINDOW)
    used = config.boolean("use_sliding_window", default=False)
    first = config.integer("max_window_layers", default=28, minimum=0, maximum=MAX_LAYERS) if used else 0
    return read_window_of_some(config, num_layers, types_from(num_layers, first), absent=_WINDOW, used=used)


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    read=_read,
    names=replace(
        NAMES,
        mtp=MtpNames(
            layer="mtp.layers.0",
            embedding_norm="mtp.pre_fc_norm_embedding",
            hidden_norm="mtp.pre_fc_norm_hidden",
            projection="mtp.fc",
            norm="mtp.norm",
            unread=(r"mtp\.layers\.[1-9]\d*\..*",),
        ),
    ),
    mtp_tensors=(r"mtp\..*",),
)
