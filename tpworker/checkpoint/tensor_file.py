"""Tensors of a program, as a file of safetensors in memory that ranks read like any other.

    header, padded with spaces to the bytes that were set aside for it | tensors, one behind the other

The header comes last, when all names and sizes are known. Each tensor begins at a multiple of 8 bytes: one
whose bytes are no such multiple is stored in float64, which holds each of its values.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpworker.checkpoint.weights import check_weights, needed_tensors, path_of
from tpworker.errors import InvalidRequest, ModelError, shown
from tpworker.model.families import ModelSpec

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}
_SOURCE = Path("update_weights")
"""What the tensors are called in errors: for a folder, they have none."""
_ENTRY_BYTES = 160  # of the header, for a tensor beside its name
_SPARE_BYTES = 1 << 16


def write_tensors(
    fd: int, tensors: Iterable[tuple[str, Tensor]], spec: ModelSpec, *, with_mtp: bool = False
) -> None:
    """Writes all of a model's tensors, under their published names, on whatever device each is.

    Args:
        fd: of an empty file, which is of no use if this raises.
        tensors: iterated once; one at a time is held.
        with_mtp: those of the head for multi-token prediction, too.

    Raises:
        ModelError: one is missing, is there twice, has another shape than the model's, or is none of its.
        InvalidRequest: something is no pair of a name and a tensor of floats.
    """
    needed = needed_tensors(spec, with_mtp=with_mtp)
    room = _SPARE_BYTES + 2 * sum(len(name) + _ENTRY_BYTES for name in needed)
    room = -(-room // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    header: dict[str, Any] = {}
    place = 0
    for pair in tensors:
        name, tensor = _checked(pair)
        if name in header:
            raise ModelError(f"update_weights: tensor {shown(name)} came twice")
        dtype = tensor.dtype if tensor.nbytes % 8 == 0 else torch.float64
        num_bytes = tensor.numel() * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + num_bytes],
        }
        _write(fd, room + place, tensor, dtype)
        place += num_bytes
    text = json.dumps(header).encode()
    if len(text) > room - 8:
        raise ModelError(f"update_weights: {len(header)} tensors came; the model has {len(needed)}")
    os.ftruncate(fd, room + place)
    os.pwrite(fd, (room - 8).to_bytes(8, "little") + text.ljust(room - 8), 0)
    try:
        check_weights(_SOURCE, spec, with_mtp=with_mtp, fd=fd)
    except ModelError as error:
        raise ModelError(str(error).replace(str(path_of(fd)), str(_SOURCE))) from None


def _checked(pair: object) -> tuple[str, Tensor]:
    """A name and its tensor. Raises InvalidRequest."""
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
        raise InvalidRequest(f"update_weights: pairs (name, tensor) are wanted, not {shown(pair)}", "source")
    name, tensor = pair
    if not isinstance(tensor, Tensor) or tensor.dtype not in _NAMES or tensor.layout != torch.strided:
        what = f"of {tensor.dtype}" if isinstance(tensor, Tensor) else f"of type {type(tensor).__name__}"
        raise InvalidRequest(
            f"update_weights: {shown(name)} is {what}: a dense torch.Tensor of float64, float32, float16, "
            "bfloat16 or float8_e4m3fn is wanted",
            "source",
        )
    return name, tensor.detach()


def _write(fd: int, place: int, tensor: Tensor, dtype: torch.dtype) -> None:
    """Stores a tensor at a place in a file, which grows."""
    num_bytes = tensor.numel() * dtype.itemsize
    if not num_bytes:
        return
    start = place - place % mmap.ALLOCATIONGRANULARITY
    os.ftruncate(fd, place + num_bytes)
    mapped = mmap.mmap(fd, place + num_bytes - start, offset=start)
    out = torch.frombuffer(mapped, dtype=dtype, count=tensor.numel(), offset=place - start)
    out.view(tensor.shape).copy_(tensor)  # the mapping ends with its last user
