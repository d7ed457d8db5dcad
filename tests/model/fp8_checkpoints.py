"""Checkpoints in FP8, in each published form, made of plain ones; and the plain ones that they stand for."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 32
_LINEAR = re.compile(r".*\.(?:[a-z]+_proj|w[123])\.weight")
_NOT = re.compile(r".*(?:eh_proj|linear_proj).*")


def _scheme(strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": "float", "num_bits": 8, "symmetric": True, "strategy": strategy, **more}


def compressed(strategy: str, ignore: list[str], **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    group = {
        "targets": ["Linear"],
        "weights": _scheme(strategy, dynamic=False, **more),
        "input_activations": _scheme("token", dynamic=True),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


FP8_CONFIG: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}

FORMS: dict[str, dict[str, Any]] = {
    "channels": compressed("channel", ["lm_head", "re:.*layers\\.1\\.self_attn"]),
    "blocks": FP8_CONFIG
    | {
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", "model.layers.1.self_attn"],
    },
    "tensors": FP8_CONFIG | {"ignored_layers": ["model.layers.1.self_attn"]},
    "compressed-blocks": compressed("block", ["re:.*layers\\.1\\.self_attn"], block_structure=[BLOCK, BLOCK]),
}
"""`quantization_config` of each; layer 1's attention is not quantised."""


def publish(plain: Path, folder: Path, form: str) -> Path:
    """Write a plain model's FP8 checkpoint to `folder` / "fp8", and what that stands for to "plain".

    Scales are such that those of neighbours differ by far.
    """
    tensors, means = dict[str, Tensor](), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(3)
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not _LINEAR.fullmatch(name) or _NOT.fullmatch(name) or ".1.self_attn" in name:
            tensors[name] = means[name] = tensor
            continue
        rows, columns = {"channels": (1, tensor.shape[1]), "tensors": tuple(tensor.shape)}.get(
            form, (BLOCK, BLOCK)
        )
        shape = math.ceil(tensor.shape[0] / rows), math.ceil(tensor.shape[1] / columns)
        scales = float(tensor.abs().max()) / 448 * (1 + 3 * torch.rand(shape, generator=generator))
        wide = scales.repeat_interleave(rows, 0)[: tensor.shape[0]]
        wide = wide.repeat_interleave(columns, 1)[:, : tensor.shape[1]]
        values = (tensor / wide).to(torch.float8_e4m3fn)
        suffix = "weight_scale_inv" if form == "blocks" else "weight_scale"
        tensors[name] = values
        tensors[name.removesuffix("weight") + suffix] = scales.reshape([]) if form == "tensors" else scales
        means[name] = values.float() * wide
    config = json.loads((plain / "config.json").read_text())
    for kind, contents in (("plain", means), ("fp8", tensors)):
        shutil.copytree(plain, folder / kind)
        save_file(contents, folder / kind / "model.safetensors", {"format": "pt"})
    (folder / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": FORMS[form]}))
    return folder / "fp8"
