"""The Llama family: RMSNorm, rotary positions, grouped-query attention, gated SiLU MLP, all dense.

Llama 2 and 3 (and what is published as such: SmolLM2, Vicuna, …), Mistral without a sliding window, and
the dense Qwen2 and Qwen3 use the same weight names; they differ in biases and in Qwen3's norm of query and
key heads. Defaults for absent keys are those of transformers' configuration classes.
"""

from __future__ import annotations

from typing import Any

from tpworker.model.families.spec import Config, Family, Llama3Scaling, RopeSpec, WeightNames

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # Keys that change what a model computes and that the decoder knows nothing of, with the values at which
    # they change nothing. Other architectures use them; a config that sets one is not a plain Llama.
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
}


def _read(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that a config of this family determines. Raises ModelError."""
    architecture = config.values["architectures"][0]
    for key, neutral in _NEUTRAL.items():
        if config.get(key) is not None and config.get(key) not in neutral:
            allowed = f" (only {', '.join(map(repr, neutral))})" if neutral else ""
            config.fail(key, f"is not supported in a {architecture}{allowed}")
    max_model_len = config.integer("max_position_embeddings")
    _refuse_sliding_window(config, architecture, max_model_len)

    num_heads = config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    if config.get("num_key_value_heads") is None and architecture != "LlamaForCausalLM":
        config.fail("num_key_value_heads", "is required")
    num_kv_heads = config.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        config.fail("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
    if config.get("head_dim") is None and hidden_size % num_heads:
        config.fail(
            "hidden_size", f"without head_dim, must be a multiple of num_attention_heads ({num_heads})"
        )
    head_dim = config.integer("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        config.fail("head_dim", f"rotary positions need an even size of a head, not {head_dim}")

    qwen2 = architecture == "Qwen2ForCausalLM"
    attention_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and config.boolean(
        "attention_bias", default=False
    )
    return {
        "vocab_size": config.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": config.integer("intermediate_size"),
        "num_layers": config.integer("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_model_len": max_model_len,
        "rms_norm_eps": config.number("rms_norm_eps", default=1e-6),
        "rope": _read_rope(config),
        "tie_embeddings": config.boolean("tie_word_embeddings", default=False),
        "qkv_bias": qwen2 or attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": architecture == "LlamaForCausalLM" and config.boolean("mlp_bias", default=False),
        "qk_norm": architecture == "Qwen3ForCausalLM",
    }


def _refuse_sliding_window(config: Config, architecture: str, max_model_len: int) -> None:
    """Raise ModelError if some layer would not see every earlier token."""
    layer_types = config.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        config.fail("layer_types", "only full_attention is supported")
    window = config.get("sliding_window")
    if architecture == "MistralForCausalLM" and "sliding_window" not in config.values:
        window = 4096  # what a Mistral config means when it is silent
    if window is None or config.get("use_sliding_window") is False:
        return
    if architecture == "Qwen2ForCausalLM" and config.get("use_sliding_window") is None:
        return  # a Qwen2 or Qwen3 config means false when it is silent
    if architecture == "Qwen3ForCausalLM" and config.get("use_sliding_window") is None:
        return
    if not isinstance(window, int) or window < max_model_len:
        config.fail(
            "sliding_window",
            f"sliding-window attention is not supported; a copy of the folder with sliding_window=null and "
            f"max_position_embeddings={window} gives the same output within the window",
        )


def _read_rope(config: Config) -> RopeSpec:
    """Rotary positions, from the keys of transformers 5 (rope_parameters) or 4 (rope_theta, rope_scaling)."""
    section = config.section("rope_parameters") or config.section("rope_scaling")
    theta = config.number("rope_theta", default=10000.0)
    if section is None:
        return RopeSpec(theta=theta)
    theta = section.number("rope_theta", default=theta)
    kind = section.get("rope_type") or section.get("type") or "default"
    if section.get("partial_rotary_factor") not in (None, 1, 1.0):
        section.fail("partial_rotary_factor", "partial rotary positions are not supported")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind != "llama3":
        key = "rope_type" if "rope_type" in section.values else "type"
        section.fail(key, "is not supported; of the scaled rotary positions only llama3 is")
    scaling = Llama3Scaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        section.fail("high_freq_factor", f"must be above low_freq_factor ({scaling.low_freq_factor:g})")
    return RopeSpec(theta=theta, scaling=scaling)


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    read=_read,
    names=WeightNames(
        embed="model.embed_tokens",
        final_norm="model.norm",
        lm_head="lm_head",
        attention_norm="model.layers.{layer}.input_layernorm",
        query="model.layers.{layer}.self_attn.q_proj",
        key="model.layers.{layer}.self_attn.k_proj",
        value="model.layers.{layer}.self_attn.v_proj",
        query_norm="model.layers.{layer}.self_attn.q_norm",
        key_norm="model.layers.{layer}.self_attn.k_norm",
        output="model.layers.{layer}.self_attn.o_proj",
        mlp_norm="model.layers.{layer}.post_attention_layernorm",
        gate="model.layers.{layer}.mlp.gate_proj",
        up="model.layers.{layer}.mlp.up_proj",
        down="model.layers.{layer}.mlp.down_proj",
    ),
    # Old exports carry the rotary frequencies, which are computed here.
    ignored_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
