"""Whether a model fits: a rank's weights, and the KV cache beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tpworker.config import RuntimeConfig
from tpworker.doctor.check import Check, missing, ok, warning
from tpworker.errors import ConfigError, ModelError
from tpworker.observe.nvml import Gpu
from tpworker.runtime.loading import check_drafts, load_tokenizer, what_is_odd
from tpworker.runtime.settings import Speculation, StepSizes, resolve_max_model_len

if TYPE_CHECKING:
    from tpworker.model.families import ModelSpec

CONTEXT_BYTES = 1 << 30
"""What CUDA, NCCL and the libraries' workspaces take of a GPU before anything is allocated, roughly."""

_GIB = 1 << 30


def check_model(config: RuntimeConfig, device: str, gpus: tuple[Gpu, ...]) -> Iterator[Check]:
    """The model of the configuration. Nothing is fetched: a name on the hub is looked for in its cache.

    Args:
        device: 'cpu' or 'cuda'.
        gpus: those of the group; fewer than there are ranks, if there are no more.
    """
    from tpworker.checkpoint.resolve import cached_folder, local_folder
    from tpworker.model.families import read_spec

    assert config.model is not None
    try:
        folder = local_folder(config.model)
        is_fetched = folder is None
        folder = folder or cached_folder(config.model)
        if folder is None or (is_fetched and not (folder / "config.json").exists()):
            yield warning(
                "model", f"{config.model} is not in the hub's cache", "the first start will fetch it"
            )
            return
        spec = read_spec(folder, config.quantization)
        length = resolve_max_model_len(config, spec)
        check_drafts(config, spec)
    except (ModelError, ConfigError) as error:
        yield missing("model", str(error), None)
        return
    yield ok("model", f"{spec.architecture}, {spec.num_layers} layers, up to {length} tokens a request")
    if drafts := str(Speculation.of(config)):
        yield ok("speculation", drafts)
    yield from _files(config, folder, spec, is_fetched)
    yield _tokenizer(folder, is_fetched)
    yield _memory(config, spec, length, device, gpus)


def check_default_model() -> Check:
    """Whether the default model is there, or can be put there."""
    from tpworker.checkpoint.default_model import NAME, find_default_model

    try:
        folder = find_default_model()
    except ModelError as error:
        return missing("model", str(error), None)
    if folder is None:
        return warning("model", f"{NAME} is not in the cache", "the first start will fetch it")
    return ok("model", f"{NAME}, in {folder}")


def _files(config: RuntimeConfig, folder: Path, spec: ModelSpec, is_fetched: bool) -> Iterator[Check]:
    """What a start would find in the files and warn of, and whether the weights are all there."""
    from tpworker.checkpoint.weight_files import absent_files

    has_weights = config.load_format != "dummy"
    if has_weights and is_fetched and (absent := absent_files(folder)):
        more = f" and {len(absent) - 1} more files" if len(absent) > 1 else ""
        yield warning(
            "weights", f"{absent[0]}{more} not in the hub's cache", "the first start will fetch them"
        )
        return
    with_mtp = config.speculative_method == "mtp"
    try:
        for line in what_is_odd(folder, spec, has_weights, with_mtp):
            yield warning("files", line, None)
        if not has_weights:
            return
        from tpworker.checkpoint.weights import check_weights  # imports torch

        check_weights(folder, spec, with_mtp=with_mtp)
    except ModelError as error:
        yield missing("weights", str(error), None)
        return
    yield ok("weights", "every tensor is there, in its shape")


def _tokenizer(folder: Path, is_fetched: bool) -> Check:
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError as error:
        return missing("tokenizer", str(error), None)
    if tokenizer is not None:
        return ok("tokenizer", "with a chat template" if tokenizer.has_chat_template else "no chat template")
    if is_fetched:
        return warning("tokenizer", "not in the hub's cache", "the first start will fetch it")
    return warning("tokenizer", "none: prompts must be token ids, and texts are empty", "add tokenizer.json")


def _memory(config: RuntimeConfig, spec: ModelSpec, length: int, device: str, gpus: tuple[Gpu, ...]) -> Check:
    import torch

    from tpworker.checkpoint.weights import shard_bytes
    from tpworker.model.kv_cache import KVCache, cache_dtype
    from tpworker.model.tp import Shard

    num_ranks, with_mtp = config.tensor_parallel_size, config.speculative_method == "mtp"
    dtype: torch.dtype = getattr(torch, spec.dtype if config.dtype == "auto" else config.dtype)
    shard = Shard.of(spec, 0, num_ranks)
    weights = shard_bytes(spec, shard, dtype, torch.device(device), with_mtp=with_mtp)
    num_layers = spec.num_layers + with_mtp
    kv_dtype = cache_dtype(config.kv_cache_dtype, dtype)
    block = KVCache.bytes_per_block(spec, shard, config.block_size, kv_dtype, num_layers)
    if device == "cuda":
        free = [gpu.free for gpu in gpus if gpu.free is not None]
        if not free:
            return ok("memory", f"{weights / _GIB:.2f} GiB of weights a rank; what is free is not known")
        room = int((min(free) - CONTEXT_BYTES - weights) * config.gpu_memory_utilization)
        place = f"{min(free) / _GIB:.1f} GiB free on the GPU that has least"
    else:
        from tpworker.ipc.limits import available_bytes

        available = available_bytes()
        room = int((available - num_ranks * weights) // 2 // num_ranks * config.gpu_memory_utilization)
        place = (
            f"{available / _GIB:.1f} GiB available for {'1 rank' if num_ranks == 1 else f'{num_ranks} ranks'}"
        )
    slots = StepSizes.of(config, device).max_num_seqs
    most = slots * -(-length // config.block_size)  # no more is taken than all slots can use
    tokens = min(most, max(0, room // block - 1)) * config.block_size
    told = (
        f"{place}; a rank has {weights / _GIB:.2f} GiB of weights, and KV blocks for {tokens} tokens beside "
        f"them ({block / config.block_size / 1024:.1f} KiB a token)"
    )
    more = "take more TP ranks" if device == "cuda" else "end other programs or raise the container's limit"
    if tokens < config.block_size:
        return missing("memory", told, f"{more}, or take a smaller model")
    if tokens < length:
        remedy = f"set --max-model-len to {tokens} or less, or {more}"
        return warning("memory", f"{told}: fewer than one request may have ({length})", remedy)
    return ok("memory", told)
