"""Kernels that are needed later are run once by other threads, while the first steps run."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from tpworker.model.decoder import Decoder
from tpworker.model.kv_cache import KVCache
from tpworker.rank.device import Device

logger = logging.getLogger(__name__)


def attend_ahead(
    decoder: Decoder, cache: KVCache, counts: Sequence[int], width: int, device: Device
) -> Callable[[], None]:
    """Runs the attention of decode steps of so many sequences, in threads: sizes have kernels of their own.

    On the first start on a machine they must be compiled, which takes a second each; one after the other that
    was a third of the start. Nothing depends on it: what goes wrong here will be seen when a step needs it.

    Args:
        width: of the block tables.

    Returns:
        What waits for all of it.
    """
    if device.torch_device.type == "cuda":
        importlib.import_module("triton").runtime.driver.active.utils  # noqa: B018  # once, not in each thread
    pool = ThreadPoolExecutor(
        min(len(counts), torch.get_num_threads()), "tpworker-ahead", initializer=device.adopt_thread
    )

    def attend(count: int) -> None:
        with torch.inference_mode():
            decoder.attend_once(count, width, cache)

    work = [pool.submit(attend, count) for count in counts]

    def wait() -> None:
        pool.shutdown()
        for count, done in zip(counts, work, strict=True):
            if (error := done.exception()) is not None:
                logger.warning("attention of %d sequences was not tried ahead: %s", count, error)

    return wait
