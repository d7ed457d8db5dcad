"""From a folder of safetensors to one rank's weights, reading only that rank's slices; and random weights."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tpworker.checkpoint.assembly import assemble, num_regions
from tpworker.checkpoint.checkpoint import Checkpoint
from tpworker.checkpoint.regions import Kept, Place, sizes_of
from tpworker.checkpoint.weight_files import WeightFiles, check_mtp, output_head
from tpworker.model.families import FAMILIES, ModelSpec
from tpworker.model.fp8 import E4M3, LARGEST
from tpworker.model.linear import can_pack
from tpworker.model.tp import Shard, Split
from tpworker.model.weights import DecoderWeights, LayerWeights, MtpWeights

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes done, bytes in all, of this rank's weights
Admit = Callable[[int], None]  # bytes in all

MAX_READERS = 4
"""Threads that read weights; on the CPU no more than it has cores for this rank."""

_DUMMY_STD = 0.02
_DUMMY_SCALE = 6 * _DUMMY_STD / LARGEST  # of weights in FP8
_DUMMY_PERIOD = 4_194_301  # a prime: no two rows of a matrix are alike, although the values repeat


def load_weights(
    folder: Path,
    spec: ModelSpec,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda done, total: None,
    admit: Admit = lambda total: None,
    *,
    with_mtp: bool = False,
    kept: Kept | None = None,
    fd: int | None = None,
    number: int = 0,
) -> DecoderWeights:
    """Read one rank's slices of model.safetensors, or of the files of model.safetensors.index.json.

    All is looked up before anything is allocated. Several threads read, each a layer at a time: at most so
    many layers are held that are not packed yet.

    Args:
        admit: told the bytes of the rank's weights before any are allocated; may raise.
        with_mtp: the head for multi-token prediction, too; the spec has one (see `why_no_mtp`).
        kept: memory for weights that are not packed. Those that it has already are not read, nor admitted.
        fd: of a file of safetensors, to be read instead of the folder's.
        number: tells weights from others that were once in the same place.

    Raises:
        ModelError: a file is missing, truncated or no safetensors; a tensor is missing, has another shape
            than config.json says, is not of a float type, or is one that this decoder has no use for.
    """
    checkpoint, spec = _open(folder, spec, with_mtp, fd)
    place = _place(kept, f"{number} {folder}", spec, shard, dtype, device, with_mtp)
    build = partial(assemble, spec, shard, dtype, device, with_mtp=with_mtp)
    if (regions := place.find()) is not None:
        progress(place.num_bytes, place.num_bytes)
        return build(None, regions=regions)
    done = to_read = 0

    def look_up(out: Tensor, name: str, dim: int, split: Split) -> None:
        nonlocal to_read
        checkpoint.look_up(out, name, dim, split)
        to_read += out.nbytes

    total = shard_bytes(spec, shard, dtype, device, look_up, with_mtp=with_mtp)
    skipped = _refuse_unused(checkpoint, spec, with_mtp)
    if skipped and shard.rank == 0:
        logger.info("not read: %d tensors for multi-token prediction (%s, …)", len(skipped), skipped[0])
    admit(total)
    lock = threading.Lock()

    def fill(out: Tensor, name: str, dim: int, split: Split) -> None:
        nonlocal done
        checkpoint.read_into(out, name, dim, split)
        with lock:
            done += out.nbytes  # of what becomes FP8 more than its weight takes
            progress(total * done // to_read, total)

    num_readers = MAX_READERS if device.type == "cuda" else min(MAX_READERS, torch.get_num_threads())
    with torch.no_grad(), ThreadPoolExecutor(num_readers, "weights", _use, (device,)) as pool:
        weights = build(fill, layers=pool.map, regions=place.make())
    place.finish()
    progress(total, total)
    return weights


def check_weights(folder: Path, spec: ModelSpec, *, with_mtp: bool = False, fd: int | None = None) -> None:
    """Whether `load_weights` would find what it needs, all headers read and no tensor.

    Raises:
        ModelError: as `load_weights` does.
    """
    checkpoint, spec = _open(folder, spec, with_mtp, fd)
    shard_bytes(spec, Shard.of(spec, 0, 1), torch.float32, look_up=checkpoint.look_up, with_mtp=with_mtp)
    _refuse_unused(checkpoint, spec, with_mtp)


def path_of(fd: int) -> Path:
    """By which this process can open what it has open."""
    return Path(f"/proc/self/fd/{fd}")


def needed_tensors(spec: ModelSpec, *, with_mtp: bool = False) -> dict[str, int]:
    """The published tensors that `load_weights` reads, and the size of each along one dimension."""
    needed: dict[str, int] = {}

    def note(out: Tensor, name: str, dim: int, split: Split) -> None:
        needed[name] = split.full

    shard_bytes(spec, Shard.of(spec, 0, 1), torch.float32, look_up=note, with_mtp=with_mtp)
    return needed


def _open(
    folder: Path, spec: ModelSpec, with_mtp: bool, fd: int | None = None
) -> tuple[Checkpoint, ModelSpec]:
    """The checkpoint, and the model with the output head that it has. Raises ModelError."""
    files = WeightFiles(folder, None if fd is None else path_of(fd))
    head = output_head(files, spec)
    if with_mtp:
        check_mtp(files, spec)
    return Checkpoint(files, head.aliases), head.spec


def _refuse_unused(checkpoint: Checkpoint, spec: ModelSpec, with_mtp: bool) -> list[str]:
    """After all has been looked up; tensors for multi-token prediction that were not. Raises ModelError."""
    family = FAMILIES[spec.family]
    tied = (re.escape(f"{family.names.lm_head}.weight"),) if spec.tie_embeddings else ()
    mtp = family.mtp_patterns(spec, checkpoint.names, with_mtp)
    checkpoint.refuse_unused(ignored=family.ignored_tensors + tied + mtp, architecture=spec.architecture)
    return checkpoint.unused(mtp)


def _use(device: torch.device) -> None:
    """What is current on CUDA is so for a thread: another device's context costs hundreds of MB."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def dummy_weights(
    spec: ModelSpec,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    admit: Admit = lambda total: None,
    *,
    with_mtp: bool = False,
    kept: Kept | None = None,
) -> DecoderWeights:
    """Random weights for benchmarks: normal with σ 0.02, norms 1, biases 0. Other TP sizes, other models.

    Those of a checkpoint in FP8 are in it from the start, with scales that are all alike. `progress`,
    `admit`, `with_mtp` and `kept` are as those of `load_weights`.
    """
    place = _place(kept, f"dummy {seed}", spec, shard, dtype, device, with_mtp)
    build = partial(assemble, spec, shard, dtype, device, with_mtp=with_mtp)
    if (regions := place.find()) is not None:
        progress(place.num_bytes, place.num_bytes)
        return build(None, regions=regions)
    done = to_make = 0

    def count(out: Tensor, name: str, dim: int, split: Split) -> None:
        nonlocal to_make
        to_make += out.nbytes

    total = shard_bytes(spec, shard, dtype, device, count, with_mtp=with_mtp)
    admit(total)
    generator = torch.Generator(device=device).manual_seed(seed * 64 + shard.rank)
    normal = torch.empty(_DUMMY_PERIOD, dtype=dtype, device=device)
    normal.normal_(0, _DUMMY_STD, generator=generator)
    periods = {dtype: normal}
    if spec.quantization is not None:
        periods[E4M3] = (normal.float() / _DUMMY_SCALE).clamp_(-LARGEST, LARGEST).to(E4M3)
    position = 0

    def fill(out: Tensor, name: str, dim: int, split: Split) -> None:
        nonlocal position, done
        if name.endswith("bias"):
            out.zero_()
        elif spec.quantization is not None and name.endswith(f".{spec.quantization.name}"):
            out.fill_(_DUMMY_SCALE)
        elif out.dim() == 1:
            out.fill_(1 - spec.norm_offset)
        else:  # copies run at the speed of memory, random numbers do not
            flat, period = out.view(-1), periods.get(out.dtype, normal)
            start = 0
            while start < flat.numel():
                length = min(flat.numel() - start, _DUMMY_PERIOD - position)
                flat[start : start + length] = period[position : position + length]
                start += length
                position = (position + length) % _DUMMY_PERIOD
        done += out.nbytes
        progress(total * done // to_make, total)

    with torch.no_grad():
        weights = build(fill, regions=place.make())
    place.finish()
    progress(total, total)
    return weights


def _place(
    kept: Kept | None,
    source: str,
    spec: ModelSpec,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    with_mtp: bool,
) -> Place:
    """Where weights from this source lie."""
    if kept is None:
        return Place(None)
    assert not can_pack(device, dtype), "packed weights lie where oneDNN puts them"
    meta = torch.device("meta")
    measure = partial(assemble, spec, shard, dtype, meta, None, with_mtp=with_mtp, sized_for=device)
    sizes = sizes_of(num_regions(spec, with_mtp), lambda regions: measure(regions=regions))
    return Place(kept, repr((source, spec, shard, dtype, with_mtp)), sizes)


def shard_bytes(
    spec: ModelSpec,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device | None = None,
    look_up: Callable[[Tensor, str, int, Split], object] = lambda out, name, dim, split: None,
    *,
    with_mtp: bool = False,
) -> int:
    """Bytes of one rank's weights on `device` (None: the CPU), for sizing; nothing is allocated.

    Args:
        look_up: called, as `Fill`, for each published tensor that they are made of.
        with_mtp: as that of `load_weights`.
    """
    device = device or torch.device("cpu")
    meta = torch.device("meta")

    def fill(out: Tensor, name: str, dim: int, split: Split) -> None:
        look_up(out, name, dim, split)

    weights = assemble(spec, shard, dtype, meta, fill, with_mtp=with_mtp, sized_for=device)
    total = sum(tensor.nbytes for tensor in _tensors(weights))
    if spec.tie_embeddings and not can_pack(device, dtype):
        total -= weights.embed.nbytes  # one tensor for both; packed, the output head is a copy
    return total


def _tensors(weights: DecoderWeights) -> Iterator[Tensor]:
    """Every tensor of a rank, a tied output head as if it were one more."""
    parts: list[DecoderWeights | LayerWeights | MtpWeights] = [weights, *weights.layers]
    if weights.mtp is not None:
        parts += [weights.mtp, weights.mtp.layer]
    for part in parts:
        for item in (getattr(part, field.name) for field in fields(part)):
            if isinstance(item, Tensor):
                yield item
            elif hasattr(item, "tensors"):  # a matrix, an MLP, a mixture
                yield from item.tensors()
