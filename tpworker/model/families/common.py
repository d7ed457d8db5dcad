"""What the families have in common: a decoder of attention and gated MLPs, named as Llama's is.

Defaults for absent keys are those of transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tpworker.model.families.config import Config
from tpworker.model.families.rope import longest, read_rope
from tpworker.model.families.spec import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_LENGTH,
    MAX_VOCAB_SIZE,
    MoeNames,
    MtpSpec,
    RopeSpec,
    WeightNames,
    with_article,
)

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # Keys that change what a model computes and that the decoder knows nothing of, with the values at which
    # they change nothing. Other architectures use them.
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
    # A mixture's number of experts, in the configs that are published.
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "n_routed_experts": (0, 1),
    "moe_num_experts": (0, 1),
    "shared_expert_intermediate_size": (0,),
    # How a mixture chooses its experts, and what it adds to them.
    "scoring_func": ("softmax",),
    "topk_method": ("greedy",),
    "n_group": (1,),
    "topk_group": (1,),
    "routed_scaling_factor": (1, 1.0),
    "n_shared_experts": (0,),
}

NAMES = WeightNames(
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
)
"""Llama's."""

EXPERTS = MoeNames(
    router="model.layers.{layer}.mlp.gate",
    gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj",
    up="model.layers.{layer}.mlp.experts.{expert}.up_proj",
    down="model.layers.{layer}.mlp.experts.{expert}.down_proj",
)
"""Most families'."""

EXPERTS_AND_SHARED = replace(
    EXPERTS,
    shared_gate="model.layers.{layer}.mlp.shared_experts.gate_proj",
    shared_up="model.layers.{layer}.mlp.shared_experts.up_proj",
    shared_down="model.layers.{layer}.mlp.shared_experts.down_proj",
)


def read_mtp(config: Config, *, default: int = 0, **fields: bool) -> dict[str, Any]:
    """`num_mtp_layers` and `mtp` of a family that has heads for multi-token prediction. Raises ModelError.

    Args:
        default: what an absent key means.
        fields: of `MtpSpec`.
    """
    count = config.integer("num_nextn_predict_layers", default=default, minimum=0, maximum=MAX_LAYERS)
    return {"num_mtp_layers": count, "mtp": MtpSpec(**fields) if count else None}


def refuse_unknown(config: Config, architecture: str, known: Mapping[str, tuple[Any, ...] | None]) -> None:
    """Raise ModelError at the first key that changes what is computed, unless its value does not.

    Args:
        known: keys that the family reads itself (None), or that mean something in its configs, with the
            values that are supported.
    """
    for key, neutral in {**_NEUTRAL, **known}.items():
        if neutral is not None and config.get(key) is not None and config.get(key) not in neutral:
            allowed = f" (only {', '.join(map(repr, neutral))})" if neutral else ""
            config.fail(key, f"is not supported in {with_article(architecture)}{allowed}")


def read_decoder(
    config: Config,
    *,
    rms_norm_eps: float,
    rope: Callable[[Config, int], RopeSpec] = read_rope,
    tie_embeddings: bool = False,
    head_dim: int | None = None,
    kv_heads_required: bool = True,
) -> dict[str, Any]:
    """The fields of `ModelSpec` that every config determines alike. Raises ModelError.

    Args:
        rms_norm_eps, tie_embeddings, head_dim: what an absent key means; a head_dim of None:
            hidden_size / num_attention_heads.
        rope: reads the rotary positions of heads of this size.
        kv_heads_required: num_key_value_heads must be there; else an absent one means as many as heads.
    """
    num_heads = config.integer("num_attention_heads", maximum=MAX_HEADS)
    hidden_size = config.integer("hidden_size")
    if config.get("num_key_value_heads") is None and kv_heads_required:
        config.fail("num_key_value_heads", "is required")
    num_kv_heads = config.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        config.fail("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
    if config.get("head_dim") is None and head_dim is None and hidden_size % num_heads:
        config.fail(
            "hidden_size", f"without head_dim, must be a multiple of num_attention_heads ({num_heads})"
        )
    head_dim = config.integer("head_dim", default=head_dim or hidden_size // num_heads, maximum=MAX_HEAD_DIM)
    max_length = config.integer("max_position_embeddings", maximum=MAX_LENGTH)
    if max_length < 2:
        config.fail("max_position_embeddings", "must be at least 2: a prompt's token and one of the answer")
    if head_dim % 2:
        config.fail("head_dim", f"rotary positions need an even size of a head, not {head_dim}")
    positions = rope(config, head_dim)
    return {
        "vocab_size": config.integer("vocab_size", maximum=MAX_VOCAB_SIZE),
        "hidden_size": hidden_size,
        "intermediate_size": config.integer("intermediate_size"),
        "num_layers": config.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_model_len": longest(positions, max_length),
        "rms_norm_eps": config.number("rms_norm_eps", default=rms_norm_eps),
        "rope": positions,
        "tie_embeddings": config.boolean("tie_word_embeddings", default=tie_embeddings),
    }
