"""Qwen3's mixtures of experts, e.g. Qwen3-30B-A3B (Qwen3MoeForCausalLM; arXiv 2505.09388)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpworker.model.families.common import EXPERTS, NAMES, read_decoder, refuse_unknown
from tpworker.model.families.config import Config
from tpworker.model.families.spec import MAX_EXPERTS, Family, MoeSpec
from tpworker.model.families.windows import read_window

_KNOWN: dict[str, tuple[Any, ...] | None] = {"num_experts": None, "num_local_experts": None}


def _read(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that a config of this family determines. Raises ModelError."""
    refuse_unknown(config, "Qwen3MoeForCausalLM", _KNOWN)
    fields = read_decoder(config, rms_norm_eps=1e-6)
    is_windowed = config.boolean("use_sliding_window", default=False)
    attention_bias = config.boolean("attention_bias", default=False)
    return fields | {
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "qk_norm": True,
        "moe": _read_moe(config, fields["num_layers"]),
        # Of all layers, whatever max_window_layers says.
        "window": read_window(config, fields["num_layers"], absent=4096, used=is_windowed),
    }


def _read_moe(config: Config, num_layers: int) -> MoeSpec | None:
    """The mixture's part; None: all layers are dense."""
    step = config.integer("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(number, int) for number in dense):
        config.fail("mlp_only_layers", "must be a list of layer numbers")
    dense = frozenset(dense)  # which may be long
    layers = tuple(n for n in range(num_layers) if n not in dense and (n + 1) % step == 0)
    # Published as num_experts; transformers 5 writes num_local_experts.
    key = "num_local_experts" if config.get("num_experts") is None else "num_experts"
    num_experts = config.integer(key, minimum=0, maximum=MAX_EXPERTS)
    if not layers or num_experts == 0:
        return None
    return MoeSpec(
        layers=layers,
        num_experts=num_experts,
        experts_per_token=config.integer("num_experts_per_tok", maximum=num_experts, reason=key),
        intermediate_size=config.integer("moe_intermediate_size"),
        normalise=config.boolean("norm_topk_prob", default=False),
    )


QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    read=_read,
    names=replace(NAMES, moe=EXPERTS),
)
