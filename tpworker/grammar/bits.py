"""Bit masks of tokens, filled by matchers. Imports numpy and llguidance."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from tpworker.grammar.compiler import MAX_MASK_SECONDS

ALL = -1
"""A word of 32 tokens that may all be chosen."""
SLOW_SECONDS = 0.0015
"""Masks that take longer are filled by threads from then on. Most take 10 µs, and to hand 64 of them out
takes as long as to fill them; those where a string of bounded length begins take milliseconds."""
NUM_IN_PARALLEL = 64
"""So many times; then one after the other is tried again."""


class Masks:
    """A table of masks, in memory that somebody else reads.

    Args:
        memory: int32 [num_rows, num_words], writable: bit i % 32 of word i // 32 is token i's.
        num_words: 32 of them hold the vocabulary that matchers are compiled for.
        num_threads: that fill masks side by side.
    """

    def __init__(self, memory: memoryview, num_words: int, num_threads: int) -> None:
        self._rows: NDArray[np.int32] = np.frombuffer(memory, np.int32).reshape(-1, num_words)
        self._executor = LLExecutor(num_threads) if num_threads > 1 else None
        self._num_in_parallel = 0  # times that are left of them

    def fill(self, matchers: list[tuple[LLMatcher, int]]) -> list[int]:
        """Writes what each matcher allows next to its row. Other threads run meanwhile.

        Returns:
            Rows that took more than MAX_MASK_SECONDS; not each time where several are slow.
        """
        began = time.monotonic()
        if self._executor is not None and self._num_in_parallel and len(matchers) > 1:
            fill_next_token_bitmask_par(self._executor, matchers, self._rows)
            is_too_slow = time.monotonic() - began > MAX_MASK_SECONDS
            self._num_in_parallel = 0 if is_too_slow else self._num_in_parallel - 1  # whose fault is it?
            return []
        slow, last, last_busy = [], began, time.thread_time()
        for matcher, row in matchers:
            fill_next_token_bitmask(matcher, self._rows, row)
            now = time.monotonic()
            if now - last > MAX_MASK_SECONDS:  # on a busy machine it may not have run all the while
                busy = time.thread_time()
                if busy - last_busy > MAX_MASK_SECONDS:
                    slow.append(row)
                last_busy = busy
            last = now
        if last - began > SLOW_SECONDS:
            self._num_in_parallel = NUM_IN_PARALLEL
        return slow

    def allow_all(self, row: int) -> None:
        """Every token may be chosen, those too that there are not."""
        self._rows[row] = ALL

    def remove(self, row: int, tokens: Iterable[int]) -> None:
        """These tokens may not be chosen, unless nothing else may."""
        ids = np.fromiter(tokens, np.int64)
        mask, words = self._rows[row], ids // 32
        before = mask[words]
        np.bitwise_and.at(mask, words, ~(1 << (ids % 32)).astype(np.uint32).view(np.int32))
        if not mask.any():
            mask[words] = before

    def only(self, row: int) -> int | None:
        """The one token that may be chosen; -1: none may; None: several."""
        mask = self._rows[row]
        num_filled = np.count_nonzero(mask)
        if num_filled != 1:
            return None if num_filled else -1
        place = int(mask.astype(bool).argmax())
        word = int(mask[place]) & 0xFFFFFFFF
        return None if word & (word - 1) else 32 * place + word.bit_length() - 1
