"""Where the tensors of a rank's weights lie, if they lie in one piece of memory that outlives the rank.

    memory   | layer 0 | layer 1 | … | layer of the MTP head | embedding, final norm, output head, … |

Each layer has a region of its own, as layers are built side by side; in it tensors follow one another in the
order in which they are built, which is always the same. So whoever builds the same weights over the same
memory finds every tensor in its place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT = 512
"""Bytes; what torch's allocator gives on CUDA, and kernels may rely on."""

_ENDLESS = 1 << 60
_NAME = "weights"


class Kept(Protocol):
    """Memory of a rank that outlives its process: the part of `KeptMemory` that weights need."""

    def find(self, name: str, layout: str) -> Tensor | None:
        """What was left, uint8; None: nothing whole of this layout."""

    def make(self, name: str, layout: str, num_bytes: int) -> Tensor:
        """uint8 zeros, which are not whole before `finish`."""

    def finish(self, name: str) -> None:
        """It is whole, once all is done that was queued to fill it: this waits for that."""


class Region:
    """Tensors one after the other. Belongs to one thread.

    Args:
        memory: uint8 [bytes], of zeros, or of what a region of the same tensors left.

    Attributes:
        used: bytes of it that are tensors by now.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self.used = 0

    @classmethod
    def endless(cls) -> Region:
        """One of tensors without memory, for their sizes alone."""
        return cls(torch.empty(_ENDLESS, dtype=torch.uint8, device="meta"))

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor."""
        start, num_bytes = self.used, math.prod(shape) * dtype.itemsize
        self.used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        assert self.used <= len(self._memory), "the region was measured for other tensors"
        return self._memory[start : start + num_bytes].view(dtype).view(torch.Size(shape))


def sizes_of(count: int, build: Callable[[Sequence[Region]], object]) -> list[int]:
    """The bytes that each of so many regions needs, by building without memory."""
    regions = [Region.endless() for _ in range(count)]
    build(regions)
    return [region.used for region in regions]


class Place:
    """Kept memory, cut into regions; or none, where nothing is kept.

    Args:
        kept: None: there are no regions, and nothing is ever found.
        layout: what the weights are; the same text, the same tensors.
        sizes: of the regions, in bytes.
    """

    def __init__(self, kept: Kept | None, layout: str = "", sizes: Sequence[int] = ()) -> None:
        self._kept = kept
        self._layout = layout
        self._sizes = list(sizes)
        self.num_bytes = sum(sizes)

    def find(self) -> list[Region] | None:
        """With what was left in them; None: nothing whole."""
        memory = None if self._kept is None else self._kept.find(_NAME, self._layout)
        return None if memory is None else self._cut(memory)

    def make(self) -> list[Region] | None:
        """New ones, of zeros; None: each tensor is to have its own memory."""
        if self._kept is None:
            return None
        return self._cut(self._kept.make(_NAME, self._layout, self.num_bytes))

    def finish(self) -> None:
        """They hold what is to be found next time."""
        if self._kept is not None:
            self._kept.finish(_NAME)

    def _cut(self, memory: Tensor) -> list[Region]:
        starts = itertools.accumulate(self._sizes, initial=0)
        return [Region(memory.narrow(0, *place)) for place in zip(starts, self._sizes, strict=False)]
