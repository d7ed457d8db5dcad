"""Decode steps made ready for a few batch sizes: on CUDA each is a graph, replayed with one call.

A batch that is between two sizes is padded with the null slot, and what a batch's sampling needs is rounded
up to a mode that has been captured: rows are not affected by what they do not need.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable
from functools import partial

from tpworker.model.sampling import SamplingMode
from tpworker.rank.device import Device

logger = logging.getLogger(__name__)

GREEDY = SamplingMode(False, False, False)
MODES = (SamplingMode(True, True, True), SamplingMode(True, False, False), GREEDY)
"""Those that are captured, the one that needs most memory first."""


def ladder(most: int) -> list[int]:
    """Batch sizes to capture, ascending, up to `most`: close to each other where steps are short."""
    sizes = [1, 2, 4, 8, *range(16, 64, 16), *range(64, 256, 32), *range(256, most, 64)]
    return [*(size for size in sizes if size < most), most]


class DecodeGraphs:
    """Replays by batch size and sampling mode; none before `capture`.

    Args:
        most: slots in the largest batch.
    """

    def __init__(self, most: int) -> None:
        self._sizes = ladder(most)
        self._replays: dict[tuple[int, SamplingMode], Callable[[], None]] = {}

    def capture(self, device: Device, step: Callable[[int, SamplingMode], None]) -> None:
        """Captures `step(size, mode)`, which decodes the first `size` slots of the batch, for all of them.

        The largest comes first: all share one pool of memory, and the others fit into what it has left.
        """
        started = time.monotonic()
        for mode in MODES:
            for size in reversed(self._sizes):
                self._replays[size, mode] = device.capture(partial(step, size, mode))
        logger.info("%d decode steps captured in %.1f s", len(self._replays), time.monotonic() - started)

    def find(self, count: int, mode: SamplingMode) -> Callable[[], None] | None:
        """What replays a step of `count` slots; None if nothing was captured."""
        if not self._replays:
            return None
        if mode.truncate or mode.suppress:
            mode = MODES[0]
        return self._replays[self._sizes[bisect.bisect_left(self._sizes, count)], mode]
