"""Which GPUs the ranks get, if any."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.observe.nvml import Found, Gpu, find_gpus

logger = logging.getLogger(__name__)


def resolve_gpus(config: RuntimeConfig) -> tuple[Gpu, ...]:
    """The ranks' GPUs, if there is one for each rank and torch can use them; none: they run on the CPU.

    Raises:
        ConfigError: device='cuda', and that is not so.
    """
    if config.device == "cpu":
        return ()
    found = find_all_gpus() if config.join_address else find_gpus()
    reason = cuda_obstacle(config.tensor_parallel_size, found)
    if reason is None:
        return found.gpus[: config.tensor_parallel_size]
    if config.device == "cuda":
        raise ConfigError(reason)
    if found.gpus:
        logger.warning("%d GPUs found, but serving on the CPU: %s", len(found.gpus), reason)
    elif found.problem and found.has_library:
        logger.warning("no GPU can be used, so serving on the CPU: %s", found.problem)
    return ()


def find_all_gpus() -> Found:
    """All that this process could use, whatever CUDA_VISIBLE_DEVICES shows it."""
    return find_gpus(environment={k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"})


def gpus_by_uuid(uuids: Sequence[str]) -> tuple[Gpu, ...]:
    """These GPUs, in this order; none, if the driver does not show all of them to this process."""
    known = {gpu.uuid: gpu for gpu in find_all_gpus().gpus} if uuids else {}
    return tuple(known[uuid] for uuid in uuids) if all(uuid in known for uuid in uuids) else ()


def cuda_obstacle(num_ranks: int, found: Found) -> str | None:
    """Why so many ranks cannot run on these GPUs; None: they can."""
    num_gpus = len(found.gpus)
    if num_ranks > num_gpus:
        why = f" ({found.problem})" if found.problem else ""
        return (
            f"tensor_parallel_size={num_ranks} needs as many GPUs, and this machine has {num_gpus}{why}: "
            f"{remedy(found)}"
        )
    if torch_cuda() is None:
        return "the torch that is installed is its CPU build: install one for CUDA, or use --device cpu"
    return None


def remedy(found: Found) -> str:
    """What to do where there are fewer GPUs than ranks."""
    is_hidden = found.problem is not None and found.problem.startswith("CUDA_VISIBLE_DEVICES=")
    correct = "correct CUDA_VISIBLE_DEVICES, or " if is_hidden else ""
    fewer = f"-tp {len(found.gpus)}, or " if found.gpus else ""
    return f"{correct}use {fewer}--device cpu"


def count_gpus() -> int:
    """GPUs that CUDA will show to the ranks. Needs no CUDA."""
    return len(find_gpus().gpus)


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA that the installed torch was built for; None: it is a CPU build, or is not installed.

    Read from its version.py, since importing torch takes seconds.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return None if match is None else (int(match[1]), int(match[2]))
