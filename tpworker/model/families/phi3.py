"""Phi-3, Phi-3.5 and Phi-4, dense (Phi3ForCausalLM; arXiv 2404.14219).

Query, key and value heads are one published matrix, gate and up another. Long contexts are longrope's, under
three names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpworker.model.families.common import NAMES, read_decoder, refuse_unknown
from tpworker.model.families.config import Config
from tpworker.model.families.rope import read_rope
from tpworker.model.families.spec import Family, RopeSpec
from tpworker.model.families.windows import read_window

_KNOWN: dict[str, tuple[Any, ...] | None] = {"partial_rotary_factor": None, "attention_bias": (False,)}
_ORIGINAL = "original_max_position_embeddings"


def _read(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that a config of this family determines. Raises ModelError."""
    refuse_unknown(config, "Phi3ForCausalLM", _KNOWN)
    # The class has this length of its own, and it counts more than one in the section.
    config = config.part({_ORIGINAL: 4096} | config.values)
    fields = read_decoder(config, rms_norm_eps=1e-5, rope=_read_rope, kv_heads_required=False)
    return fields | {"window": read_window(config, fields["num_layers"])}


def _read_rope(config: Config, head_dim: int) -> RopeSpec:
    values = dict(config.values)
    for key in ("rope_scaling", "rope_parameters"):
        section = config.section(key)
        if section is None or not section.values:
            continue
        name = "rope_type" if section.get("rope_type") else "type"
        kind = section.get(name) or "default"
        if kind not in ("default", "longrope", "su", "yarn"):
            section.fail(name, "is not supported in a Phi3ForCausalLM; longrope (also named su or yarn) is")
        values[key] = section.values | {"rope_type": "default" if kind == "default" else "longrope"}
    return read_rope(config.part(values), head_dim, partial_rotary=1.0)


PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    read=_read,
    names=replace(
        NAMES,
        query="model.layers.{layer}.self_attn.qkv_proj",
        key="model.layers.{layer}.self_attn.qkv_proj",
        value="model.layers.{layer}.self_attn.qkv_proj",
        gate="model.layers.{layer}.mlp.gate_up_proj",
        up="model.layers.{layer}.mlp.gate_up_proj",
    ),
)
