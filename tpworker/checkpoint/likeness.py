"""Whether the checkpoint of a folder can take the place of one that is served. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from tpworker.checkpoint.weight_files import WeightFiles, check_files
from tpworker.errors import ModelError, shown
from tpworker.json_file import shown_name
from tpworker.model.families import FAMILIES, FP8, MADE, ModelSpec, read_spec

Shapes = Mapping[str, tuple[int, ...]]
"""Of published tensors, by name."""

_FREE = frozenset(
    {"dtype", "bos_id", "eos_ids", "eos_is_default", "generation_defaults", "generation_ignored", "notes"}
)
"""What of a `ModelSpec` the weights have nothing to do with: it stays as it was at the start."""


def shapes_of(folder: Path, spec: ModelSpec, *, with_mtp: bool = False) -> Shapes:
    """Of the tensors that are read of a folder. Raises ModelError, as `WeightFiles`."""
    files, family = WeightFiles(folder), FAMILIES[spec.family]
    ignored = family.ignored_tensors + family.mtp_patterns(spec, files.names, with_mtp)
    if spec.tie_embeddings:  # it may be there, or not
        ignored += (re.escape(f"{family.names.lm_head}.weight"),)
    unread = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or "(?!)")
    shapes = {}
    for name, file_name in files.file_of.items():
        if unread.fullmatch(name) is None and (entry := files.header(file_name).get(name)) is not None:
            shapes[name] = entry.shape
    return shapes


def check_likeness(folder: Path, spec: ModelSpec, shapes: Shapes, *, with_mtp: bool = False) -> Shapes:
    """Whether the ranks could read the weights of a folder in place of those that they have.

    Args:
        spec: of the model that is served.
        shapes: of its tensors; empty: not known, and not compared.
        with_mtp: it has its head for multi-token prediction.

    Returns:
        Those of the folder.

    Raises:
        ModelError: it is another model, or not whole.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder: give one with config.json and safetensors")
    other = read_spec(folder, FP8 if spec.quantization == MADE else None)
    for field in fields(ModelSpec):
        theirs, ours = getattr(other, field.name), getattr(spec, field.name)
        if field.name not in _FREE and theirs != ours:
            raise ModelError(
                f"{folder / 'config.json'}: {field.name} is {shown(theirs)}, and that of the model that is "
                f"served is {shown(ours)}: weights can be those of another checkpoint of the same model "
                "alone. Start another runtime with this folder"
            )
    check_files(folder, spec, with_mtp=with_mtp)
    found = shapes_of(folder, spec, with_mtp=with_mtp)
    if shapes:
        _compare(folder, found, shapes)
    return found


def _compare(folder: Path, found: Shapes, shapes: Shapes) -> None:
    """Raises ModelError where they differ."""
    for what, names in (
        ("lacks", sorted(shapes.keys() - found.keys())),
        ("has besides", sorted(found.keys() - shapes.keys())),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ModelError(
                f"{folder}: beside the checkpoint that is served, it {what} the tensors "
                f"{', '.join(map(shown_name, names[:5]))}{more}: save it with the same names"
            )
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ModelError(
                f"{folder}: tensor {shown_name(name)} has shape {list(found[name])}, and that of the "
                f"checkpoint that is served has {list(shape)}"
            )
