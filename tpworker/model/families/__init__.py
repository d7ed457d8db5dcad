"""The models that can be served, from their config.json. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpworker.errors import ModelError, shown
from tpworker.model.families.config import Config
from tpworker.model.families.ernie4_5 import ERNIE4_5, ERNIE4_5_MOE
from tpworker.model.families.gemma import GEMMA, GEMMA3_WITH_VISION
from tpworker.model.families.generation import (
    MAX_TEMPERATURE,
    MAX_TOP_K,
    read_defaults,
    read_ends,
    read_ignored,
)
from tpworker.model.families.glm4_moe import GLM4_MOE
from tpworker.model.families.llama import LLAMA
from tpworker.model.families.mixtral import MIXTRAL
from tpworker.model.families.phi3 import PHI3
from tpworker.model.families.quantization import FP8, MADE, Quantization, read_quantization
from tpworker.model.families.qwen3_moe import QWEN3_MOE
from tpworker.model.families.spec import (
    MAX_ALL_EXPERTS,
    Family,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    MoeNames,
    MoeSpec,
    MtpNames,
    MtpSpec,
    RopeSpec,
    WeightNames,
    WindowSpec,
    YarnScaling,
    with_article,
)

__all__ = [
    "FAMILIES",
    "FP8",
    "MADE",
    "MAX_TEMPERATURE",
    "MAX_TOP_K",
    "Family",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "ModelSpec",
    "MoeNames",
    "MoeSpec",
    "MtpNames",
    "MtpSpec",
    "Quantization",
    "RopeSpec",
    "WeightNames",
    "WindowSpec",
    "YarnScaling",
    "read_spec",
    "why_no_mtp",
]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        GEMMA,
        GEMMA3_WITH_VISION,
        PHI3,
        GLM4_MOE,
        ERNIE4_5,
        ERNIE4_5_MOE,
        QWEN3_MOE,
        MIXTRAL,
    )
}

_DTYPES = ("float32", "bfloat16", "float16")


def read_spec(folder: Path, quantization: str | None = None) -> ModelSpec:
    """Read config.json and, where there is one, generation_config.json of a model folder.

    Args:
        quantization: `fp8`, to which weights are brought as they are read, if the checkpoint's are not in it.

    Raises:
        ModelError: a file is missing or broken, the architecture is unknown, the checkpoint is quantised in
            another way than `Quantization` knows, or the config asks for something that is not implemented.
            Names file, key, value and remedy.
    """
    config = Config(folder / "config.json")
    family = _family(config)
    quantized = read_quantization(config) or (MADE if quantization == FP8 else None)
    model_type: object = config.get("model_type")
    config = family.unwrap(config)
    fields = family.read(config)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        key = "dtype" if config.get("dtype") else "torch_dtype"
        config.fail(key, f"must be one of {', '.join(_DTYPES)}")
    moe: MoeSpec | None = fields.get("moe")
    mtp: MtpSpec | None = fields.get("mtp")
    num_mixtures = 0 if moe is None else len(moe.layers) + (mtp is not None and mtp.has_experts)
    num_experts = 0 if moe is None else num_mixtures * (moe.num_experts + moe.num_shared)
    if num_experts > MAX_ALL_EXPERTS:
        raise ModelError(
            f"{config.path}: all layers together have {num_experts} experts, shared ones included; the limit "
            f"is {MAX_ALL_EXPERTS}: correct the file"
        )
    generation = Config(folder / "generation_config.json", optional=True)
    ends, notes = read_ends(config, generation, fields["vocab_size"])
    notes += fields.pop("notes", [])
    length, promised = fields["max_model_len"], config.values["max_position_embeddings"]
    if length < promised:
        notes.append(
            f"{config.path}: of max_position_embeddings={promised} the first {length} are served: the rotary "
            "positions of a longer sequence would all be others, those of its keys in the cache too"
        )
    return ModelSpec(
        family=family.name,
        architecture=config.values["architectures"][0],
        model_type=model_type if isinstance(model_type, str) else "",
        dtype=dtype,
        quantization=quantized,
        generation_defaults=read_defaults(generation),
        generation_ignored=read_ignored(generation),
        notes=tuple(notes),
        **ends,
        **fields,
    )


def why_no_mtp(spec: ModelSpec) -> str | None:
    """Why a model has no drafts by multi-token prediction, and what to do; None: config.json names a head."""
    if spec.mtp is not None:
        return None
    able = [name for family in FAMILIES.values() if family.names.mtp for name in family.architectures]
    remedy = "use --speculative-method ngram, which needs none, or leave the option out"
    if spec.architecture in able:
        return (
            f"the config.json of this {spec.architecture} names no layer for multi-token prediction "
            f"(num_nextn_predict_layers is absent or 0): {remedy}"
        )
    return (
        f"layers for multi-token prediction of {with_article(spec.architecture)} are not supported "
        f"(supported: those of {', '.join(able)}): {remedy}"
    )


def _family(config: Config) -> Family:
    """The family of the config's architecture. Raises ModelError with the list of those supported."""
    architectures: Any = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        config.fail("architectures", "must be a list with the model's architecture, e.g. LlamaForCausalLM")
    for family in FAMILIES.values():
        if architectures[0] in family.architectures:
            return family
    supported = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise ModelError(
        f"{config.path}: the architecture {shown(architectures[0])} is not supported. Supported: {supported}"
    )
