"""Gemma 2 (Gemma2ForCausalLM, arXiv 2408.00118) and text models of Gemma 3 (Gemma3ForCausalLM, 2503.19786).

Norms before and after attention and MLP, weights of norms published less 1, embeddings multiplied by the root
of their size, a gated GELU, and layers with a sliding window between those without. Gemma 2 caps scores and
logits; Gemma 3 norms query and key heads, and rotates those of layers with a window otherwise.

Most of Gemma 3 is published with a vision tower (Gemma3ForConditionalGeneration), which is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

from tpworker.model.families.common import NAMES, read_decoder, refuse_unknown
from tpworker.model.families.config import Config
from tpworker.model.families.rope import read_rope, read_section
from tpworker.model.families.spec import MAX_LAYERS, Family, RopeSpec, WeightNames
from tpworker.model.families.windows import FULL, SLIDING, read_window_of_some

_WINDOW = 4096  # what an absent sliding_window means

_KNOWN: dict[str, tuple[Any, ...] | None] = {
    "hidden_act": None,  # not looked at
    "hidden_activation": ("gelu_pytorch_tanh",),
    "final_logit_softcapping": None,
    "use_bidirectional_attention": (False,),
}

# Of transformers' class, as files with a vision tower leave them out.
_TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}


def _read(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that a config of this family determines. Raises ModelError."""
    if config.values["architectures"][0] == "Gemma2ForCausalLM":
        return _read_2(config)
    return _read_3(config)


def _read_2(config: Config) -> dict[str, Any]:
    refuse_unknown(config, "Gemma2ForCausalLM", _KNOWN | {"attn_logit_softcapping": None})
    fields = _read_both(config, read_rope)
    num_layers = fields["num_layers"]
    return fields | {
        "window": read_window_of_some(config, num_layers, _types_but_every(2, num_layers), absent=_WINDOW),
        "attention_softcap": _softcap(config, "attn_logit_softcapping", 50.0),
        "logit_softcap": _softcap(config, "final_logit_softcapping", 30.0),
    }


def _text_config(config: Config) -> Config:
    """The text model's keys, over those beside them and what is absent in published files."""
    text = config.section("text_config") or config.part({})
    above = {
        key: value for key, value in config.values.items() if key not in ("text_config", "vision_config")
    }
    ties = {"tie_word_embeddings": above.get("tie_word_embeddings", True)}
    architectures = {"architectures": above["architectures"]}
    return config.part(_TEXT_DEFAULTS | above | text.values | ties | architectures)


def _read_text(config: Config) -> dict[str, Any]:
    """Of a model with a vision tower."""
    note = f"{config.path}: of this model, text alone is served; its vision tower is not read"
    return _read_3(config) | {"notes": [note]}


def _read_3(config: Config) -> dict[str, Any]:
    architecture = config.values["architectures"][0]
    refuse_unknown(config, architecture, _KNOWN | {"original_max_position_embeddings": ()})
    rope = partial(_read_rope, kind=FULL, theta_key="rope_theta", theta=1e6)
    local_rope = partial(_read_rope, kind=SLIDING, theta_key="rope_local_base_freq", theta=1e4)
    fields = _read_both(config, rope)
    num_layers = fields["num_layers"]
    every = config.integer("sliding_window_pattern", default=6, maximum=MAX_LAYERS)
    window = read_window_of_some(config, num_layers, _types_but_every(every, num_layers), absent=_WINDOW)
    if window is not None:
        positions = local_rope(config, fields["head_dim"])
        window = replace(window, rope=positions)
        if positions.max_positions is not None:
            fields["max_model_len"] = min(fields["max_model_len"], positions.max_positions)
    return fields | {
        "window": window,
        "qk_norm": True,
        "logit_softcap": _softcap(config, "final_logit_softcapping", None),
    }


def _read_both(config: Config, rope: Callable[[Config, int], RopeSpec]) -> dict[str, Any]:
    """What both have in common."""
    fields = read_decoder(config, rms_norm_eps=1e-6, rope=rope, tie_embeddings=True, head_dim=256)
    has_bias = config.boolean("attention_bias", default=False)
    return fields | {
        "qkv_bias": has_bias,
        "output_bias": has_bias,
        "attention_scale": config.number("query_pre_attn_scalar", default=256.0) ** -0.5,
        "embed_scale": fields["hidden_size"] ** 0.5,
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "post_norms": True,
    }


def _types_but_every(number: int, num_layers: int) -> list[str]:
    """All layers slide but every so manieth."""
    return [SLIDING if layer % number else FULL for layer in range(1, num_layers + 1)]


def _softcap(config: Config, key: str, absent: float | None) -> float | None:
    return config.number(key) if config.get(key) is not None else None if key in config.values else absent


def _read_rope(config: Config, head_dim: int, *, kind: str, theta_key: str, theta: float) -> RopeSpec:
    """Gemma 3's rotary positions of one kind of layers.

    rope_parameters has a section for each kind; rope_scaling, of older files, is for those without a window.
    """
    sections = config.section("rope_parameters") or config.part({})
    for key in sections.values:
        if key not in (FULL, SLIDING):
            config.fail("rope_parameters", f"must be {FULL} and {SLIDING}, an object each")
    values = dict((sections.section(kind) or config.part({})).values)
    scaling = config.section("rope_scaling")
    if scaling is not None and kind == FULL:
        values |= scaling.values
    section = config.part(values)
    if section.get("partial_rotary_factor") not in (None, 1, 1.0):
        section.fail("partial_rotary_factor", "partial rotary positions are not supported")
    return read_section(config, section, head_dim, theta=config.number(theta_key, default=theta))


GEMMA = Family(
    name="gemma",
    architectures=("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    read=_read,
    names=replace(
        NAMES,
        attention_post_norm="model.layers.{layer}.post_attention_layernorm",
        mlp_norm="model.layers.{layer}.pre_feedforward_layernorm",
        mlp_post_norm="model.layers.{layer}.post_feedforward_layernorm",
    ),
)


def _below(prefix: str, names: WeightNames) -> WeightNames:
    """The same names, behind a prefix."""
    values = {field.name: getattr(names, field.name) for field in fields(names)}
    return replace(names, **{key: prefix + name for key, name in values.items() if name})


GEMMA3_WITH_VISION = replace(
    GEMMA,
    name="gemma3_with_vision",
    architectures=("Gemma3ForConditionalGeneration",),
    read=_read_text,
    unwrap=_text_config,
    names=_below("language_model.", GEMMA.names),
    ignored_tensors=(*GEMMA.ignored_tensors, r"(?:vision_tower|multi_modal_projector)\..*"),
)
