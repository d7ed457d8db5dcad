"""Memory of a rank that outlives its process: what one process leaves, the next one of that rank finds.

    descriptor    first page: a mark for each area        kept by the runtime, inherited by every process
                  the rest:   on the CPU the area itself  of this rank, of whatever generation

An area is whole once its mark stands: one aligned word, a digest of what the area is for (its layout), of its
size, and on GPUs of the allocation. It is cleared before anything is made anew and set last, so that a
process that is killed at any moment leaves either what it had finished or nothing. A store that was done is
not lost with its process, and the next process of a rank starts when the last one has been reaped.

What is written to a whole area later, as keys and values are, is its users' to account for.
"""

from __future__ import annotations

import mmap
import os
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from tpworker.ipc.memory import WORD

NAMES = ("weights", "kv")
"""The areas."""

_VERSION = 1  # of what layouts mean; raise it when areas of the same layout are filled otherwise
_PAGE = mmap.ALLOCATIONGRANULARITY


class KeptMemory(Protocol):
    """The areas of one rank. Belongs to one thread.

    Tensors are uint8, on the rank's device, as long as the area; those of an area are void once it is made
    anew.
    """

    def keeps(self, name: str) -> bool:
        """Whether this area is kept here at all. Of one that is not, nothing is ever found."""

    def find(self, name: str, layout: str) -> Tensor | None:
        """What an earlier process has left, whole and of this layout; otherwise None, and the area's memory
        is free again."""

    def make(self, name: str, layout: str, num_bytes: int) -> Tensor:
        """New memory, all zero, which is not whole before `finish`."""

    def finish(self, name: str) -> None:
        """The area that was made is whole. Waits for all that was queued to fill it."""


class Marks:
    """The first page of a rank's descriptor.

    Args:
        fd: a file, empty at first; stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size < _PAGE:
            os.ftruncate(fd, _PAGE)
        self._map = mmap.mmap(fd, _PAGE)
        self._words = memoryview(self._map).cast("Q")  # a store of an item is one store, see SharedWords
        self._wanted: dict[str, int] = {}

    def is_whole(self, name: str, layout: str, num_bytes: int, number: int = 0) -> bool:
        """Whether the area was finished as this; number: of the allocation."""
        mark = _mark(name, layout, num_bytes, number)
        self._wanted[name] = mark
        return self._words[NAMES.index(name)] == mark

    def begin(self, name: str, layout: str = "", num_bytes: int = 0, number: int = 0) -> None:
        """The area is not whole from here on; what it will be once it is."""
        self._words[NAMES.index(name)] = 0
        self._wanted[name] = _mark(name, layout, num_bytes, number)

    def set(self, name: str) -> None:
        """It is whole."""
        self._words[NAMES.index(name)] = self._wanted[name]

    def close(self) -> None:
        """Unmaps the page; what it says stays."""
        self._words.release()
        self._map.close()


def _mark(*what: object) -> int:
    """Of 64 bits, and not 0."""
    text = repr((_VERSION, *what))
    return int.from_bytes(blake2b(text.encode(), digest_size=WORD).digest(), "little") | 1


class HostMemory:
    """Areas in the memory behind the descriptor itself: one, that of keys and values.

    Weights are not kept on the CPU: most are packed into a layout of oneDNN's that nobody can map, and files
    that were just read are in the page cache (docs/notes.md).

    Args:
        fd: of a memfd, which stays the caller's; nobody else writes to it or cuts it short.
        name: of the area.
    """

    def __init__(self, fd: int, name: str = "kv") -> None:
        self._fd = fd
        self._name = name
        self.marks = Marks(fd)

    def keeps(self, name: str) -> bool:
        return name == self._name

    def find(self, name: str, layout: str) -> Tensor | None:
        if not self.keeps(name):
            return None
        num_bytes = os.fstat(self._fd).st_size - _PAGE
        if num_bytes and self.marks.is_whole(name, layout, num_bytes):
            return self._mapped(num_bytes)
        self.marks.begin(name)
        os.ftruncate(self._fd, _PAGE)
        return None

    def make(self, name: str, layout: str, num_bytes: int) -> Tensor:
        assert self.keeps(name), name
        self.marks.begin(name, layout, num_bytes)
        os.ftruncate(self._fd, _PAGE)  # the pages are freed, and those to come are zero and cost nothing yet
        os.ftruncate(self._fd, _PAGE + num_bytes)
        return self._mapped(num_bytes)

    def finish(self, name: str) -> None:
        self.marks.set(name)

    def _mapped(self, num_bytes: int) -> Tensor:
        with torch.inference_mode(False):  # or threads that are in no such mode could not fill it
            return torch.frombuffer(mmap.mmap(self._fd, num_bytes, offset=_PAGE), dtype=torch.uint8)


class OwnMemory:
    """No area is kept: what is made is the process's own, and ends with it.

    Args:
        device: where it is made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def keeps(self, name: str) -> bool:
        return False

    def find(self, name: str, layout: str) -> Tensor | None:
        return None

    def make(self, name: str, layout: str, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

    def finish(self, name: str) -> None:
        """Nobody will ask."""
