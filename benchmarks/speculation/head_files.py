"""A head's file, and a model's folder with that head in it, as tpworker serves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.speculation.plain_llama import Head, Sizes

PREFIX = "mtp."
"""Of the names of a head's tensors, as Qwen3-Next's checkpoints have them."""
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def save_head(head: Head, path: Path) -> None:
    """Its tensors alone, in bfloat16."""
    tensors = head.state_dict().items()
    save_file(
        {PREFIX + name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors}, path
    )


def read_head(path: Path, sizes: Sizes) -> Head:
    """In float32."""
    head = Head(sizes)
    head.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()})
    return head


def merge(model: Path, head: Path, out: Path) -> None:
    """Writes a folder with the model and its head.

    Args:
        model: a folder with one file of weights.
        head: what `save_head` has written.
        out: the new folder.

    Raises:
        ValueError: the head is none, or of a model of other sizes.
        FileExistsError: there is such a folder.
    """
    sizes = Sizes.read(model)
    try:
        read_head(head, sizes)
    except RuntimeError as error:
        raise ValueError(f"{head} is no head of {model}: {error}") from None
    weights, added = load_file(model / "model.safetensors"), load_file(head)
    out.mkdir(parents=True)
    config = json.loads((model / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights | added, out / "model.safetensors", metadata={"format": "pt"})
    for name in _BESIDE:
        if (model / name).exists():
            shutil.copy(model / name, out / name)
