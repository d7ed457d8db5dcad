"""The models that can be served, from their config.json. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpworker.errors import ModelError
from tpworker.model.families.ernie4_5 import ERNIE4_5, ERNIE4_5_MOE
from tpworker.model.families.glm4_moe import GLM4_MOE
from tpworker.model.families.llama import LLAMA
from tpworker.model.families.mixtral import MIXTRAL
from tpworker.model.families.qwen3_moe import QWEN3_MOE
from tpworker.model.families.spec import (
    MAX_ALL_EXPERTS,
    Config,
    Family,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    MoeNames,
    MoeSpec,
    RopeSpec,
    WeightNames,
    YarnScaling,
)
from tpworker.model.json_file import shown

__all__ = [
    "FAMILIES",
    "Family",
    "LinearScaling",
    "Llama3Scaling",
    "ModelSpec",
    "MoeNames",
    "MoeSpec",
    "RopeSpec",
    "WeightNames",
    "YarnScaling",
    "read_spec",
]

FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, GLM4_MOE, ERNIE4_5, ERNIE4_5_MOE, QWEN3_MOE, MIXTRAL)
}

_DTYPES = ("float32", "bfloat16", "float16")
# What generation_config.json may set, that would change the output and that sampling does not do, with the
# values at which it changes nothing.
_OTHER_DEFAULTS: dict[str, tuple[float, ...]] = {
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "no_repeat_ngram_size": (0,),
}

MAX_TEMPERATURE = 100
MAX_TOP_K = 2**31 - 1
"""What a request may ask for, a model's defaults may ask for, and no more."""


def read_spec(folder: Path) -> ModelSpec:
    """Read config.json and, where there is one, generation_config.json of a model folder.

    Raises:
        ModelError: a file is missing or broken, the architecture is unknown, the checkpoint is quantised,
            or the config asks for something that is not implemented. Names file, key, value and remedy.
    """
    config = Config(folder / "config.json")
    family = _family(config)
    for key in ("quantization_config", "compression_config"):
        quantization = config.section(key)
        if quantization is not None and quantization.values:
            method = shown(quantization.get("quant_method") or "unnamed")
            raise ModelError(
                f"{config.path}: the checkpoint is quantised ({key}, method {method}), which is not "
                "supported; use the model's float32, bfloat16 or float16 weights"
            )
    fields = family.read(config)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        key = "dtype" if config.get("dtype") else "torch_dtype"
        config.fail(key, f"must be one of {', '.join(_DTYPES)}")
    moe: MoeSpec | None = fields.get("moe")
    num_experts = 0 if moe is None else len(moe.layers) * (moe.num_experts + moe.num_shared)
    if num_experts > MAX_ALL_EXPERTS:
        raise ModelError(
            f"{config.path}: all layers together have {num_experts} experts, shared ones included; the limit "
            f"is {MAX_ALL_EXPERTS}: correct the file"
        )
    vocab_size: int = fields["vocab_size"]
    generation = Config(folder / "generation_config.json", optional=True)
    bos_ids = config.ids("bos_token_id", vocab_size) or generation.ids("bos_token_id", vocab_size)
    eos_ids = generation.ids("eos_token_id", vocab_size) + config.ids("eos_token_id", vocab_size)
    return ModelSpec(
        family=family.name,
        architecture=config.values["architectures"][0],
        dtype=dtype,
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        generation_defaults=_generation_defaults(generation),
        generation_ignored={
            key: generation.get(key)
            for key, neutral in _OTHER_DEFAULTS.items()
            if generation.get(key) is not None and generation.get(key) not in neutral
        },
        **fields,
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


def _generation_defaults(generation: Config) -> dict[str, float]:
    """temperature, top_p and top_k, as far as they are set. Raises ModelError when one is out of range."""
    defaults: dict[str, float] = {}
    temperature = generation.get("temperature")
    if temperature is not None:
        defaults["temperature"] = 0.0 if temperature == 0 else generation.number("temperature")
        if defaults["temperature"] > MAX_TEMPERATURE:
            generation.fail("temperature", f"must be at most {MAX_TEMPERATURE}")
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    if generation.get("top_p") is not None:
        defaults["top_p"] = generation.number("top_p")
        if defaults["top_p"] > 1:
            generation.fail("top_p", "must be above 0 and at most 1")
    if generation.get("top_k") is not None:
        defaults["top_k"] = generation.integer("top_k", minimum=0, maximum=MAX_TOP_K)
    return defaults
