"""What each KV block holds, in shared memory: what the next scheduler finds when this one is gone.

The memory is a memfd of the runtime's, the same for all generations, and has an entry for each block:

    word 0       the content's number, never used again; 0: nothing is known of this block
    word 1       the number of the content before it; 0: it is the first of its text
    words 2 … 6  of a first one its root: whose alone it is, and the SHA-256 of its salt
    words 7 …    its tokens, int32

Keys and values outlive the ranks likewise, see there. An entry is there only while it is true of them:

    registered ──► its plan is answered ──► written, word 0 last
    evicted    ──► word 0 is cleared    ──► a plan that gives the block to somebody else is sent

A process that is killed has executed all of its program up to some place and nothing behind it, on CPUs that
order memory weakly too: so, whenever that is, what word 0 says is true. A content is named by its number and
not by its block, so that nothing is taken for what follows a text that is gone.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from tpworker.ipc.memory import LINE, WORD

SIGNATURE = int.from_bytes(b"tpblocks", "little")

_ROOT_WORDS = 5
_TOKENS = 2 + _ROOT_WORDS  # where in an entry they begin
_SALT_BYTES = 32


class Root(NamedTuple):
    """The content of an empty text. Only texts that begin at the same one share blocks."""

    salt: bytes
    """Its SHA-256; 32 zeroes for none."""
    owner: int | None = None
    """The number of the request, or of the group of choices, whose alone it is; None: everybody's."""


Node = int | Root
"""A content: of the text from the beginning of a sequence to the end of one full block. Numbers begin at 1,
and a text's is greater than that of what stands before it."""


class Entry(NamedTuple):
    """What a block holds."""

    node: int
    block: int
    parent: Node
    tokens: bytes  # int32 [block_size]


class KeptBlocks:
    """A table of the contents of KV blocks.

    Args:
        fd: the memfd, of any size; it stays the caller's.
        num_blocks: blocks of the KV cache, the null block included.
        block_size: tokens in a block.
        is_kept: whether the KV cache is the one that the table is of, if it is of one of this size. Else the
            table is cleared. So it must be opened before anything is written to a KV cache: if this process
            died before that, the next one would take the new cache for the old.
    """

    def __init__(self, fd: int, num_blocks: int, block_size: int, is_kept: bool) -> None:
        self._stride = _TOKENS + -(-4 * block_size // WORD)
        self._num_bytes = 4 * block_size
        size = WORD * (LINE + num_blocks * self._stride)
        header = struct.pack("=3Q", SIGNATURE, num_blocks, block_size)
        if not is_kept or os.fstat(fd).st_size != size or os.pread(fd, len(header), 0) != header:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)  # zeroes, which take memory when they are first written to
            os.pwrite(fd, header, 0)
        self._map = mmap.mmap(fd, size)
        self._bytes: memoryview[int] = memoryview(self._map)[WORD * LINE :]
        self._entries: memoryview[int] = self._bytes.cast("Q")

    def write(self, block: int, node: int, parent: Node, tokens: bytes) -> None:
        """A block's content, of which nothing was known. All plans that compute it have been answered."""
        entries, first = self._entries, block * self._stride
        if isinstance(parent, int):
            entries[first + 1] = parent
        else:
            entries[first + 1] = 0
            entries[first + 2] = 0 if parent.owner is None else parent.owner + 1
            start = WORD * (first + 3)
            self._bytes[start : start + _SALT_BYTES] = parent.salt
        start = WORD * (first + _TOKENS)
        self._bytes[start : start + self._num_bytes] = tokens
        entries[first] = node

    def clear(self, block: int) -> None:
        """Nothing is known of it any more. Only then may a plan that writes to it be sent."""
        self._entries[block * self._stride] = 0

    def read(self) -> Iterator[Entry]:
        """What is known, by ascending numbers: of a text what stands first comes first."""
        numbered = enumerate(self._entries[:: self._stride].tolist())
        for node, block in sorted((node, block) for block, node in numbered if node):
            yield self._entry(node, block)

    def _entry(self, node: int, block: int) -> Entry:
        first = block * self._stride
        parent: Node = self._entries[first + 1]
        if parent == 0:
            owner, start = self._entries[first + 2], WORD * (first + 3)
            parent = Root(bytes(self._bytes[start : start + _SALT_BYTES]), owner - 1 if owner else None)
        start = WORD * (first + _TOKENS)
        return Entry(node, block, parent, bytes(self._bytes[start : start + self._num_bytes]))
