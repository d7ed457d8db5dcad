"""What the families have in common: a decoder of attention and gated MLPs, named as Llama's is.

Defaults for absent keys are those of transformers' configuration classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tpworker.model.families.spec import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_LENGTH,
    MAX_VOCAB_SIZE,
    Config,
    LinearScaling,
    Llama3Scaling,
    MoeNames,
    RopeSpec,
    WeightNames,
    YarnScaling,
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
    rope_theta: float = 10000.0,
    partial_rotary: float | None = None,
    tie_embeddings: bool = False,
    head_dim: int | None = None,
    kv_heads_required: bool = True,
) -> dict[str, Any]:
    """The fields of `ModelSpec` that every config determines alike. Raises ModelError.

    Args:
        rms_norm_eps, rope_theta, tie_embeddings, head_dim: what an absent key means; a head_dim of None:
            hidden_size / num_attention_heads.
        partial_rotary: what an absent partial_rotary_factor means; None: the family rotates whole heads.
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
    rope = _read_rope(config, rope_theta, partial_rotary, head_dim)
    if isinstance(rope.scaling, YarnScaling):  # some configs leave the length as it was before
        length = rope.scaling.original_max_position_embeddings * rope.scaling.factor
        max_length = max(max_length, int(min(length, MAX_LENGTH)))
    return {
        "vocab_size": config.integer("vocab_size", maximum=MAX_VOCAB_SIZE),
        "hidden_size": hidden_size,
        "intermediate_size": config.integer("intermediate_size"),
        "num_layers": config.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_model_len": max_length,
        "rms_norm_eps": config.number("rms_norm_eps", default=rms_norm_eps),
        "rope": rope,
        "tie_embeddings": config.boolean("tie_word_embeddings", default=tie_embeddings),
    }


def _read_rope(config: Config, theta: float, partial: float | None, head_dim: int) -> RopeSpec:
    """Rotary positions, from the keys of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    As there, rope_scaling hides rope_parameters, its theta too, unless it is empty.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    section = config.section(key)
    theta = config.number("rope_theta", default=theta)
    rotary_dim = _read_rotary_dim(config, section, partial, head_dim)
    if section is None:
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)
    if any(isinstance(value, dict) for value in section.values.values()):
        config.fail(key, "other rotary positions for each type of layer are not supported")
    theta = section.number("rope_theta", default=theta)
    kind = section.get("rope_type") or section.get("type") or "default"
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    if kind == "linear":
        scaling = LinearScaling(factor=section.number("factor"))
    elif kind == "llama3":
        scaling = _read_llama3(config, section)
    elif kind == "yarn":
        scaling = _read_yarn(config, section)
        if theta <= 1:
            source = section if "rope_theta" in section.values else config
            source.fail("rope_theta", "must be above 1 with yarn")
    elif kind != "default":
        key = "rope_type" if section.get("rope_type") else "type"
        section.fail(key, "is not supported; of the scaled rotary positions linear, llama3 and yarn are")
    return RopeSpec(theta=theta, scaling=scaling, rotary_dim=rotary_dim)


def _read_llama3(config: Config, section: Config) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position_embeddings=_original_length(config, section),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        section.fail("high_freq_factor", f"must be above low_freq_factor ({scaling.low_freq_factor:g})")
    return scaling


def _read_yarn(config: Config, section: Config) -> YarnScaling:
    original = _original_length(config, section)
    # DeepSeek's configs leave the factor to the two lengths.
    length = config.integer("max_position_embeddings", maximum=MAX_LENGTH)
    factor = section.number("factor", default=length / original)

    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    def optional(key: str) -> float | None:
        """None if it is absent, or 0, which comes to the same."""
        return section.number(key) if section.get(key) else None

    weight, weight_of_all = optional("mscale"), optional("mscale_all_dim")
    inferred = sharpness(1.0)
    if weight and weight_of_all:
        inferred = sharpness(weight) / sharpness(weight_of_all)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=section.number("attention_factor", default=inferred),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        truncate=section.boolean("truncate", default=True),
    )


def _original_length(config: Config, section: Config) -> int:
    """Positions before the scaling: what stands beside the section counts more than what stands in it."""
    key = "original_max_position_embeddings"
    place = config if config.get(key) is not None else section
    length = config.integer("max_position_embeddings", maximum=MAX_LENGTH)
    return place.integer(key, default=length, maximum=MAX_LENGTH)


def _read_rotary_dim(
    config: Config, section: Config | None, partial: float | None, head_dim: int
) -> int | None:
    """How much of a head is rotated; None: all of it."""
    place = section if section is not None and section.get("partial_rotary_factor") is not None else config
    if partial is None:
        if place.get("partial_rotary_factor") not in (None, 1, 1.0):
            place.fail("partial_rotary_factor", "partial rotary positions are not supported")
        return None
    factor = place.number("partial_rotary_factor", default=partial)
    rotary_dim = int(head_dim * factor)
    if factor > 1 or rotary_dim < 2 or rotary_dim % 2:
        place.fail("partial_rotary_factor", f"must leave an even part of a head of {head_dim}")
    return rotary_dim if rotary_dim < head_dim else None
