"""GLM-4.5 and GLM-4.5-Air (Glm4MoeForCausalLM; arXiv 2508.06471).

Half of each head is rotated; the first layers are dense, the others mixtures with sigmoid scores, a
correction bias, groups of experts and a shared expert (as in DeepSeek-V3, arXiv 2412.19437).

The head for multi-token prediction is as DeepSeek-V3's: a layer with experts behind the last of the model's
own, fed [enorm(embedding), hnorm(state behind the model's final norm)] through eh_proj, with a norm of its
own before the output head (as in SGLang's glm4_moe_nextn.py). vLLM's glm4_moe_mtp.py zeroes the embedding at
position 0; it is token 1's, and is kept here. embed_tokens and shared_head.head of that layer are copies of
the model's own.
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
from tpworker.model.families.spec import LAYER, MAX_EXPERTS, Family, MoeSpec, MtpNames
from tpworker.model.families.windows import refuse_sliding_window

_KNOWN: dict[str, tuple[Any, ...] | None] = {
    "partial_rotary_factor": None,
    "n_routed_experts": None,
    "n_group": None,
    "topk_group": None,
    "n_shared_experts": None,
    "routed_scaling_factor": None,
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}


def _read(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that a config of this family determines. Raises ModelError."""
    refuse_unknown(config, "Glm4MoeForCausalLM", _KNOWN)
    fields = read_decoder(config, rms_norm_eps=1e-5, rope=partial(read_rope, partial_rotary=0.5))
    refuse_sliding_window(config, "Glm4MoeForCausalLM", fields["num_layers"])
    moe = _read_moe(config, fields["num_layers"])
    fields |= read_mtp(config, default=1, has_experts=moe is not None)
    return fields | {
        "qkv_bias": config.boolean("attention_bias", default=False),
        "qk_norm": config.boolean("use_qk_norm", default=False),
        "moe": moe,
    }


def _read_moe(config: Config, num_layers: int) -> MoeSpec | None:
    """The mixture's part; None: all layers are dense."""
    first = config.integer("first_k_dense_replace", default=1, minimum=0)
    if first >= num_layers:
        return None
    num_experts = config.integer("n_routed_experts", maximum=MAX_EXPERTS)
    num_groups = config.integer("n_group", default=1)
    top_groups = config.integer("topk_group", default=1)
    if num_experts % num_groups or (num_groups > 1 and num_experts < 2 * num_groups):
        config.fail("n_group", f"must divide n_routed_experts ({num_experts}) into groups of two or more")
    if top_groups > num_groups:
        config.fail("topk_group", f"must be at most n_group ({num_groups})")
    eligible = num_experts // num_groups * top_groups
    reason = "n_routed_experts"
    if top_groups < num_groups:
        reason = f"topk_group={top_groups} of n_group={num_groups} leaves {eligible} of {num_experts} experts"
    return MoeSpec(
        layers=tuple(range(first, num_layers)),
        num_experts=num_experts,
        experts_per_token=config.integer("num_experts_per_tok", maximum=eligible, reason=reason),
        intermediate_size=config.integer("moe_intermediate_size"),
        num_shared=config.integer("n_shared_experts", default=1, minimum=0, maximum=MAX_EXPERTS),
        score="sigmoid",
        has_bias=True,
        normalise=config.boolean("norm_topk_prob", default=True),
        norm_min=1e-20,  # transformers adds it to the sum, which comes to the same
        scale=config.number("routed_scaling_factor", default=1.0),
        num_groups=num_groups,
        top_groups=top_groups,
    )


GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    read=_read,
    names=replace(
        NAMES,
        moe=replace(
            EXPERTS_AND_SHARED,
            bias="model.layers.{layer}.mlp.gate.e_score_correction_bias",
        ),
        mtp=MtpNames(
            layer=LAYER,
            embedding_norm=f"{LAYER}.enorm",
            hidden_norm=f"{LAYER}.hnorm",
            projection=f"{LAYER}.eh_proj",
            norm=f"{LAYER}.shared_head.norm",
            unread=(
                r"model\.layers\.{layer}\.(?:embed_tokens|shared_head\.head)\.weight",
                r"model\.layers\.{further}\..*",
            ),
        ),
    ),
    mtp_tensors=(r"model\.layers\.{layer}\..*",),
    mtp_marks=tuple(f"model.layers.{{layer}}.{name}.weight" for name in ("eh_proj", "enorm", "hnorm")),
)
