"""Shared memory as aligned 64-bit words.

It is a memfd: an anonymous file that child processes inherit by descriptor and that the kernel frees with
its last user, whatever any of them died of. Nothing has a name, so nothing can be left behind.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

WORD = 8
"""Bytes of a word."""
LINE = 8
"""Words of a cache line. What different processes write lies on different lines."""


class SharedWords:
    """A mapped memfd. Make it with `create` or `attach`.

    Word 0 holds the signature that both sides must agree on; all other words start as zero.

    One load or store of `words[i]` is one access of the CPU: `memoryview` items of format 'Q' are read and
    written by CPython with a memcpy of constant size 8, which compilers turn into one move. (Not so
    `struct.pack_into`: it writes zeroes first.) tests/ipc/test_memory.py hammers it.
    """

    def __init__(self, fd: int, num_words: int, *, owns_fd: bool, writable: bool = True) -> None:
        self.fd = fd
        self.owns_fd = owns_fd
        """Whether this is the side that created it."""
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._map = mmap.mmap(fd, num_words * WORD, access=access)
        self.words: memoryview[int] = memoryview(self._map).cast("Q")
        # An object made from a mapping keeps it from being closed: take its address and let it go.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) if writable else 0
        """Of word 0, for native code; 0 where it is mapped to read only."""

    @classmethod
    def create(cls, name: str, num_words: int, signature: int) -> SharedWords:
        """New memory, all zero but for the signature; `.fd` is to be passed on to child processes.

        Args:
            name: is only there to be read by people (in /proc/PID/maps).
            num_words: its size, in words of 8 bytes.
            signature: what `attach` must be given too, an integer of 64 bits that is not 0.
        """
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, num_words * WORD)
        # Nobody can cut it short under somebody else's mapping, which would be a SIGBUS there.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        memory = cls(fd, num_words, owns_fd=True)
        memory.words[0] = signature
        return memory

    @classmethod
    def open(cls, fd: int, what: str, *, writable: bool) -> SharedWords:
        """Maps all of a file that may be such memory, for who finds out what it is. The descriptor stays the
        caller's.

        Raises:
            ValueError: it cannot be `what` the caller takes it for, by its size.
        """
        size = os.fstat(fd).st_size
        if not size or size % WORD:
            raise ValueError(f"descriptor {fd} is not {what}: {size} bytes")
        return cls(fd, size // WORD, owns_fd=False, writable=writable)

    @classmethod
    def attach(cls, fd: int, num_words: int, signature: int, what: str) -> SharedWords:
        """Maps memory that another process, or this one, has created. The descriptor stays the caller's.

        Raises:
            ValueError: it is not `what` the caller takes it for, by its size or its signature.
        """
        size = os.fstat(fd).st_size
        if size != num_words * WORD:
            raise ValueError(f"descriptor {fd} is not {what}: {size} bytes instead of {num_words * WORD}")
        memory = cls(fd, num_words, owns_fd=False)
        found = memory.words[0]
        if found != signature:
            memory.close()
            raise ValueError(f"descriptor {fd} is not {what}: signature {found:#x} instead of {signature:#x}")
        return memory

    def close(self) -> None:
        """Unmaps the memory, and closes the descriptor on the side that created it. Once is enough."""
        self.words.release()
        self._map.close()
        if self.owns_fd:
            os.close(self.fd)
            self.owns_fd = False
