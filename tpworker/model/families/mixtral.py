"""Mixtral (MixtralForCausalLM; arXiv 2401.04088): every layer is a mixture, and may have a sliding window."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from tpworker.model.families.common import NAMES, read_decoder, refuse_unknown
from tpworker.model.families.config import Config
from tpworker.model.families.rope import read_rope
from tpworker.model.families.spec import MAX_EXPERTS, Family, MoeNames, MoeSpec
from tpworker.model.families.windows import read_window

_KNOWN: dict[str, tuple[Any, ...] | None] = {"num_local_experts": None, "norm_topk_prob": (True,)}


def _read(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that a config of this family determines. Raises ModelError."""
    refuse_unknown(config, "MixtralForCausalLM", _KNOWN)
    fields = read_decoder(config, rms_norm_eps=1e-5, rope=partial(read_rope, theta=1e6))
    num_experts = config.integer("num_local_experts", maximum=MAX_EXPERTS)
    moe = MoeSpec(
        layers=tuple(range(fields["num_layers"])),
        num_experts=num_experts,
        experts_per_token=config.integer(
            "num_experts_per_tok", maximum=num_experts, reason="num_local_experts"
        ),
        intermediate_size=fields["intermediate_size"],
    )
    return fields | {"moe": moe, "window": read_window(config, fields["num_layers"])}


MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    read=_read,
    names=replace(
        NAMES,
        moe=MoeNames(
            router="model.layers.{layer}.block_sparse_moe.gate",
            gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
            up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
            down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
        ),
    ),
)
