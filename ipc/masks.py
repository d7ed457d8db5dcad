"""What guided slots may choose: bit masks in shared memory, from the scheduler to every rank.

    scheduler   result of step N - 1 ──► masks of step N ──► 'written up to N', wakes the ranks
    rank        forward of step N ·····························► waits for that word, samples

A slot is guided while its request's output is held to a grammar. Its mask for a token depends on the token
before, which nobody knows when the step is launched: the host writes it while the forward runs, and only the
end of the step waits, on the device (CUDA ranks map this memory).

There are two sets of masks, taken by turns. Masks of step N may be written as soon as step N - 2 is answered:
whoever has answered it has read its masks, on every rank, since all of them have a part in every token.

Where memory is weakly ordered (AArch64, POWER, RISC-V), to see a word does not mean to see what was stored
before it. There a futex call on either side orders them: the kernel runs a full barrier before it looks for
sleepers.
"""

from __future__ import annotations

import platform
import time

from tpworker.ipc import futex
from tpworker.ipc.memory import LINE, WORD, SharedWords
from tpworker.ipc.patience import Patience

TURNS = 2
"""Sets of masks."""

_SIGNATURE = int.from_bytes(b"tpwmasks", "little")
_WRITTEN = LINE  # the word that says so: steps below it have their masks
_MASKS = 2 * LINE  # the first word of masks
_GRAIN = 32  # int32 words that a row's length is a multiple of: 128 bytes, as GPUs read
_IS_ORDERED = platform.machine() in ("x86_64", "AMD64")
_SPIN_SECONDS = 50e-6
_SLICE = 0.005
"""Seconds of one sleep at most."""


class MasksMissing(Exception):
    """The scheduler has not written a step's masks in time."""


class MaskBoard:
    """Masks of all slots. Make it with `create` or `attach`."""

    def __init__(self, memory: SharedWords, num_slots: int, vocab_size: int) -> None:
        self.fd = memory.fd
        self.num_slots = num_slots
        self.num_words = words_of(vocab_size)
        """int32 words of a mask: bit i % 32 of word i // 32 says whether token i may be chosen."""
        self.address = memory.address
        """Of the whole memory, for whoever maps it elsewhere; see `num_bytes`."""
        self._memory = memory
        self._wake = futex.waker(memory.address + _WRITTEN * WORD)
        self._sleep = futex.sleeper(memory.address + _WRITTEN * WORD, _SLICE)

    @classmethod
    def create(cls, num_slots: int, vocab_size: int) -> MaskBoard:
        """New masks, all zero; pass `fd` on to the processes. Nothing is written yet, not even for step 0."""
        memory = SharedWords.create("tpworker-masks", _size(num_slots, vocab_size), _SIGNATURE)
        return cls(memory, num_slots, vocab_size)

    @classmethod
    def attach(cls, fd: int, num_slots: int, vocab_size: int) -> MaskBoard:
        """The masks that another process has created. The descriptor stays the caller's.

        Raises:
            ValueError: `fd` is not memory for so many slots and tokens.
        """
        what = f"masks of {num_slots} slots and {vocab_size} tokens"
        memory = SharedWords.attach(fd, _size(num_slots, vocab_size), _SIGNATURE, what)
        return cls(memory, num_slots, vocab_size)

    @property
    def num_bytes(self) -> int:
        """Of the whole memory."""
        return _MASKS * WORD + 4 * TURNS * self.num_slots * self.num_words

    @property
    def written_address(self) -> int:
        """Of the int64 that says how many steps have their masks, 0 at first."""
        return self.address + _WRITTEN * WORD

    @property
    def memory(self) -> memoryview:
        """The bytes of int32 [TURNS, num_slots, num_words], writable, as words of `SharedWords`. Step N has
        the masks of turn N % TURNS."""
        return self._memory.words[_MASKS:]

    # ------------------------------------------------------------------------------- scheduler

    def publish(self, step: int) -> None:
        """The masks of this step, of all its slots that are guided, are written."""
        if not _IS_ORDERED:
            self._wake()
        self._memory.words[_WRITTEN] = step + 1
        self._wake()

    @property
    def num_written(self) -> int:
        """Steps that have their masks."""
        return self._memory.words[_WRITTEN]

    # ----------------------------------------------------------------------------------- ranks

    def wait(self, step: int, timeout: float) -> None:
        """Returns when the masks of a step are written. Spins for a moment, then sleeps in the kernel.

        Args:
            timeout: seconds, of the time in which this process runs (see `Patience`).

        Raises:
            MasksMissing: they did not come in time.
        """
        words = self._memory.words
        spin_end = time.monotonic() + _SPIN_SECONDS
        while words[_WRITTEN] <= step and time.monotonic() < spin_end:
            pass
        patience = Patience(timeout)
        while (written := words[_WRITTEN]) <= step:
            seconds = patience.slice()
            if not seconds:
                raise MasksMissing(
                    f"step {step}: no masks from the scheduler within {timeout:g} s, for requests that are "
                    f"held to a grammar; it has written those of {written} steps"
                )
            self._sleep(written & 0xFFFFFFFF, seconds)
        if not _IS_ORDERED:
            self._wake()

    def close(self) -> None:
        """Unmaps the memory, and closes `fd` on the side that created it. Views of `memory` must be gone."""
        self._memory.close()


def words_of(vocab_size: int) -> int:
    """int32 words of a mask, with at least 1,024 bits of zeros behind the last token: a rank's part of the
    vocabulary may end beyond it, and is read word by word from where it begins."""
    return _GRAIN * (-(-vocab_size // (32 * _GRAIN)) + 1)


def _size(num_slots: int, vocab_size: int) -> int:
    """In words of 8 bytes."""
    return _MASKS + TURNS * num_slots * words_of(vocab_size) * 4 // WORD
