"""The safetensors files of a model folder, read by slice."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpworker.errors import ModelError
from tpworker.model.families.spec import with_article
from tpworker.model.tp import Split

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OTHER_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_FLOATS = ("F64", "F32", "F16", "BF16")


class Checkpoint:
    """The safetensors files of a folder, opened as they are needed; knows what was looked up and what not.

    Several threads may read at once: a slice is a view of the mapped file, and copying it releases the GIL.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._opening = threading.Lock()
        self._used: set[str] = set()
        self._file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        """Which file holds which tensor. Raises ModelError."""
        index = self.folder / _INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {str(name): str(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{index} is not a safetensors index: {error!r}") from error
        if (self.folder / _SINGLE).is_file():
            return dict.fromkeys(self._file(_SINGLE).keys(), _SINGLE)
        others = sorted(path.name for path in self.folder.iterdir() if path.suffix in _OTHER_FORMATS)
        found = f"; found {', '.join(others)}, which is not read" if others else ""
        raise ModelError(
            f"{self.folder} has neither {_SINGLE} nor {_INDEX}{found}. Fetch or convert the weights, or ask "
            "for random ones with --load-format dummy"
        )

    def _file(self, name: str) -> Any:
        """The open file. Raises ModelError if it is missing, truncated or no safetensors."""
        path = self.folder / name
        with self._opening:
            if name not in self._open:
                try:
                    self._open[name] = safe_open(path, framework="pt", device="cpu")
                except FileNotFoundError:
                    raise ModelError(
                        f"{path} is missing, although {_INDEX} names it; fetch it again"
                    ) from None
                except (SafetensorError, OSError) as error:
                    raise ModelError(_what_is_wrong(path, str(error))) from error
            return self._open[name]

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._file_of.keys()

    def look_up(self, out: Tensor, name: str, dim: int, split: Split) -> Any:
        """The tensor that `read_into` would read with the same arguments; nothing of it is read.

        Raises:
            ModelError: the tensor is missing, of another shape or not of a float type.
        """
        if name not in self._file_of:
            raise ModelError(
                f"{self.folder}: the checkpoint has no tensor {name}, which config.json asks for; the files "
                "do not belong to this config.json, or some are missing"
            )
        file_name = self._file_of[name]
        path = self.folder / file_name
        try:
            tensor = self._file(file_name).get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{path} has no tensor {name}, although {_INDEX} says so: {error}") from error
        expected = [split.full if axis == dim else size for axis, size in enumerate(out.shape)]
        if list(tensor.get_shape()) != expected:
            raise ModelError(
                f"{path}: tensor {name} has shape {list(tensor.get_shape())}; config.json asks for {expected}"
            )
        if tensor.get_dtype() not in _FLOATS:
            raise ModelError(
                f"{path}: tensor {name} is of type {tensor.get_dtype()}, expected one of "
                f"{', '.join(_FLOATS)}; quantised checkpoints are not supported"
            )
        self._used.add(name)
        return tensor

    def read_into(self, out: Tensor, name: str, dim: int, split: Split) -> None:
        """Read the runs of `split` along `dim` into `out` [.., split.local at dim, ..], casting to its dtype.

        Raises:
            ModelError: as `look_up`.
        """
        tensor = self.look_up(out, name, dim, split)
        for run in split.runs:
            cut = slice(run.source, run.source + run.length)
            out.narrow(dim, run.target, run.length).copy_(tensor[cut] if dim == 0 else tensor[:, cut])

    def unused(self, patterns: tuple[str, ...]) -> list[str]:
        """Tensors that nobody looked up, and whose names match one of these regular expressions."""
        unused = sorted(self._file_of.keys() - self._used)
        return [name for name in unused if any(re.fullmatch(pattern, name) for pattern in patterns)]

    def refuse_unused(self, ignored: tuple[str, ...], architecture: str) -> None:
        """Raise ModelError if there are tensors that nobody looked up: this is not the model they are for."""
        known = set(self.unused(ignored))
        unknown = [name for name in self.unused((".*",)) if name not in known]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise ModelError(
                f"{self.folder}: {with_article(architecture)} with this config.json has no use for the "
                f"checkpoint's tensors {', '.join(unknown[:5])}{more}; without them the output would be wrong"
            )


def absent_files(folder: Path) -> list[str]:
    """What the index, if there is one, names and the folder lacks: it may be on its way from the hub."""
    try:
        files = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a broken one is for `Checkpoint`
        files = set() if (folder / _INDEX).exists() else {_SINGLE}
    return sorted(str(file) for file in files if not (folder / str(file)).exists())


def _what_is_wrong(path: Path, error: str) -> str:
    """Why a file cannot be opened; of a truncated one the first tensor that is not there in full."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
        ends = {
            name: 8 + header_size + entry["data_offsets"][1]
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return f"{path} ({size} bytes) is not a safetensors file, or is cut off in its header: {error}"
    beyond = sorted((end, name) for name, end in ends.items() if end > size)
    if beyond:
        return (
            f"{path} is truncated: expected {beyond[-1][0]} bytes, found {size}; {len(beyond)} tensors "
            f"are not there in full, the first is {beyond[0][1]}. Fetch the file again"
        )
    return f"{path} cannot be read as safetensors: {error}"
