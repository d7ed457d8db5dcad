"""ERNIE 4.5, dense (Ernie4_5ForCausalLM) and as a mixture of experts (Ernie4_5_MoeForCausalLM).

Neighbouring entries of a head are rotated against each other. The router is a softmax in float32 with a
correction bias; its weight is published in float32.

The head for multi-token prediction (mtp_block and its like) is computed as it is trained, in the modeling
code of PaddlePaddle/ERNIE and PaddleFormers: its layer is built as layer 0 is, dense in the published models;
it is fed [mtp_emb_norm(embedding), mtp_hidden_norm(state from before the model's final norm)] through
mtp_linear_proj, and that final norm stands before the output head. vLLM's ernie_mtp.py and SGLang's
ernie4_eagle.py feed it normed states, leave that norm out, and zero the embedding at position 0.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from tpworker.model.families.common import (
    EXPERTS_AND_SHARED,
    NAMES,
    read_decoder,
    read_mtp,
    refuse_unknown,
)
from tpworker.model.families.config import Config
from tpworker.model.families.rope import read_rope
from tpworker.model.families.spec import MAX_EXPERTS, Family, MoeSpec, MtpNames
from tpworker.model.families.windows import refuse_sliding_window

_THETA = 500000.0

_KNOWN: dict[str, tuple[Any, ...] | None] = {"use_rmsnorm": (True,)}
_KNOWN_OF_MIXTURES: dict[str, tuple[Any, ...] | None] = _KNOWN | {
    "moe_num_experts": None,
    "moe_gate_act": ("softmax",),
    "moe_norm_gate_logits": (True,),
    "moe_group_experts": (False,),
}

# What checkpoints hold for multi-token prediction, whatever their config says of it.
_MTP_TENSORS = (r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\..*",)
_MTP = MtpNames(
    layer="model.mtp_block.0",
    embedding_norm="model.mtp_emb_norm.0",
    hidden_norm="model.mtp_hidden_norm.0",
    projection="model.mtp_linear_proj.0",
    unread=(r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\.[1-9]\d*\..*",),
)


def _read_dense(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that a dense model's config determines. Raises ModelError."""
    refuse_unknown(config, "Ernie4_5ForCausalLM", _KNOWN)
    use_bias = config.boolean("use_bias", default=False)
    head_dim = None if "head_dim" in config.values else 128
    fields = _read_decoder(config, head_dim) | {"mlp_bias": use_bias}
    return fields | read_mtp(config, before_final_norm=True, has_bias=use_bias)


def _read_mixture(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that a mixture's config determines. Raises ModelError."""
    refuse_unknown(config, "Ernie4_5_MoeForCausalLM", _KNOWN_OF_MIXTURES)
    if config.boolean("use_bias", default=False):
        config.fail("use_bias", "biases are not supported in an Ernie4_5_MoeForCausalLM")
    fields = _read_decoder(config, None)
    moe = _read_moe(config, fields["num_layers"])
    has_experts = moe is not None and 0 in moe.layers
    return fields | {"moe": moe} | read_mtp(config, before_final_norm=True, has_experts=has_experts)


def _read_decoder(config: Config, head_dim: int | None) -> dict[str, Any]:
    """What both have in common."""
    fields = read_decoder(
        config,
        rms_norm_eps=1e-5,
        rope=partial(read_rope, theta=_THETA),
        tie_embeddings=True,
        head_dim=head_dim,
    )
    refuse_sliding_window(config, config.values["architectures"][0], fields["num_layers"])
    use_bias = config.boolean("use_bias", default=False)
    return fields | {
        "rope": replace(fields["rope"], interleaved=True),
        "qkv_bias": use_bias,
        "output_bias": use_bias,
    }


def _read_moe(config: Config, num_layers: int) -> MoeSpec | None:
    """The mixture's part; None: all layers are dense."""
    interval = config.integer("moe_layer_interval", default=1)
    first = config.integer("moe_layer_start_index", default=1, minimum=0)
    last = config.integer("moe_layer_end_index", default=-1, minimum=-1)
    last = num_layers - 1 if last == -1 else min(last, num_layers - 1)
    layers = tuple(number for number in range(first, last + 1) if (number + 1) % interval == 0)
    if not layers:
        return None
    num_experts = config.integer("moe_num_experts", maximum=MAX_EXPERTS)
    return MoeSpec(
        layers=layers,
        num_experts=num_experts,
        experts_per_token=config.integer("moe_k", maximum=num_experts, reason="moe_num_experts"),
        intermediate_size=config.integer("moe_intermediate_size"),
        num_shared=config.integer("moe_num_shared_experts", default=2, minimum=0, maximum=MAX_EXPERTS),
        has_bias=config.boolean("moe_use_aux_free", default=True),
        norm_min=config.number("moe_norm_min", default=1e-12),
        float32_gate=True,
    )


ERNIE4_5 = Family(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM",),
    read=_read_dense,
    names=replace(NAMES, mtp=_MTP),
    mtp_tensors=_MTP_TENSORS,
)

ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    read=_read_mixture,
    names=replace(
        NAMES,
        moe=replace(
            EXPERTS_AND_SHARED,
            bias="model.layers.{layer}.mlp.moe_statics.e_score_correction_bias",
            bias_is_row=True,
        ),
        mtp=_MTP,
    ),
    mtp_tensors=_MTP_TENSORS,
)
