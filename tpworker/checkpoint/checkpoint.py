"""The safetensors files of a model folder, read by slice."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpworker.checkpoint.weight_files import INDEX, WeightFiles
from tpworker.errors import ModelError
from tpworker.json_file import shown_name
from tpworker.model.families.spec import with_article
from tpworker.model.tp import Split

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3",)


class Checkpoint:
    """The safetensors files of a folder, opened as they are needed; knows what was looked up and what not.

    Several threads may read at once: a slice is a view of the mapped file, and copying it releases the GIL.

    Args:
        files: what there is.
        aliases: the name in the files of a tensor that is looked up under another.
    """

    def __init__(self, files: WeightFiles, aliases: Mapping[str, str]) -> None:
        self.folder = files.folder
        self._files = files
        self._aliases = aliases
        self._open: dict[str, Any] = {}
        self._opening = threading.Lock()
        self._used: set[str] = set()

    def _file(self, name: str) -> Any:
        """The open file. Raises ModelError if it is missing, truncated or no safetensors."""
        path = self.folder / name
        with self._opening:
            if name not in self._open:
                self._files.header(name)  # which says better what is wrong
                try:
                    self._open[name] = safe_open(path, framework="pt", device="cpu")
                except (SafetensorError, OSError) as error:
                    size = path.stat().st_size
                    raise ModelError(
                        f"{path} ({size} bytes) is not a safetensors file: {error}; fetch it again"
                    ) from error
            return self._open[name]

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._files.names

    def look_up(self, out: Tensor, name: str, dim: int, split: Split) -> Any:
        """The tensor that `read_into` would read with the same arguments; nothing of it is read.

        A single number may be of shape [1] or [].

        Raises:
            ModelError: the tensor is missing, of another shape or not of a float type.
        """
        name = self._aliases.get(name, name)
        if name not in self.names:
            raise ModelError(
                f"{self.folder}: the checkpoint has no tensor {name}, which config.json asks for; the files "
                "do not belong to this config.json, or some are missing"
            )
        file_name = self._files.file_of[name]
        path = self.folder / file_name
        try:
            tensor = self._file(file_name).get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{path} has no tensor {name}, although {INDEX} says so: {error}") from error
        shape = [split.full if axis == dim else size for axis, size in enumerate(out.shape)]
        if list(tensor.get_shape()) not in (shape, [] if shape == [1] else shape):
            raise ModelError(
                f"{path}: tensor {name} has shape {list(tensor.get_shape())}; config.json asks for {shape}"
            )
        dtype, types = tensor.get_dtype(), _FP8 if out.dtype == torch.float8_e4m3fn else _FLOATS
        if dtype not in types:
            expected = types[0] if len(types) == 1 else f"one of {', '.join(types)}"
            raise ModelError(
                f"{path}: tensor {name} is of type {dtype}, expected {expected}: quantization_config in "
                "config.json says which modules are in FP8, and without it none is"
            )
        self._used.add(name)
        return tensor

    def read_into(self, out: Tensor, name: str, dim: int, split: Split) -> None:
        """Read the runs of `split` along `dim` into `out` [.., split.local at dim, ..], casting to its dtype.

        Raises:
            ModelError: as `look_up`.
        """
        tensor = self.look_up(out, name, dim, split)
        if not tensor.get_shape():
            out.copy_(tensor[...])
            return
        for run in split.runs:
            cut = slice(run.source, run.source + run.length)
            out.narrow(dim, run.target, run.length).copy_(tensor[cut] if dim == 0 else tensor[:, cut])

    def unused(self, patterns: tuple[str, ...]) -> list[str]:
        """Tensors that nobody looked up, and whose names match one of these regular expressions."""
        unused = sorted(set(self.names) - self._used)
        return [name for name in unused if any(re.fullmatch(pattern, name) for pattern in patterns)]

    def refuse_unused(self, ignored: tuple[str, ...], architecture: str) -> None:
        """Raise ModelError if there are tensors that nobody looked up: this is not the model they are for."""
        unknown = sorted(set(self.names) - self._used - set(self.unused(ignored)))
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise ModelError(
                f"{self.folder}: {with_article(architecture)} with this config.json has no use for the "
                f"checkpoint's tensors {', '.join(map(shown_name, unknown[:5]))}{more}. If another model is "
                "meant, whose output would be wrong without them, correct config.json; else take them out"
            )
