"""Deadlines chosen from what steps have taken.

A step takes longer the more tokens it has, and hardly ever ten times as long as the slowest of its size so
far. What is slow and no fault shows there: a slow machine, many ranks on few cores, other programs, contexts
that have grown long.

    tokens       1     2 – 3    4 – 7    8 – 15     the slowest step of each size so far
    seconds     0.9              1.5                a plan of 3 tokens: 10 × 1.5 s, one of 12: 10 × 2 × 1.5 s;
                                                    and no less than the shortest deadline

Seconds are counted as a `Patience` counts them, like the deadlines that they make: a pause of the whole
machine is no slow step.
"""

from __future__ import annotations

from tpworker.ipc.deadlines import LONGEST_SECONDS

MULTIPLE = 10.0
"""Of the slowest step so far."""

SURE_MULTIPLE = 2.0
"""The same where that is more than LONGEST_SECONDS."""

FIRST_STEPS = 2
"""So many must have been answered before anything is chosen from them."""

_SIZES = 33  # powers of two
_SEEN = 1e-9  # seconds; 0 is a size that has not been seen


class Deadlines:
    """How long plans may take.

    Args:
        step_timeout: seconds that the user has given, and which hold then; 0: none.
        shortest: seconds of the shortest deadline that is chosen.
    """

    def __init__(self, step_timeout: float, shortest: float) -> None:
        self.is_given = step_timeout > 0
        self._given = step_timeout
        self._shortest = shortest
        self._slowest = [0.0] * _SIZES  # seconds, by the number of bits of the number of tokens
        self._largest = 0
        self._num_answered = 0

    def of(self, num_tokens: int) -> float:
        """Seconds within which a plan of so many tokens must be answered, from when it is the next to be."""
        if self.is_given:
            return self._given
        if self._num_answered < FIRST_STEPS:
            return LONGEST_SECONDS
        size = num_tokens.bit_length()
        slowest = max(self._slowest[: size + 1])
        if size > self._largest:
            expected = slowest * (1 << (size - self._largest))
        else:
            expected = max(slowest, next(seconds for seconds in self._slowest[size:] if seconds))
        return max(self._shortest, min(MULTIPLE * expected, LONGEST_SECONDS), SURE_MULTIPLE * slowest)

    def answered(self, num_tokens: int, seconds: float) -> None:
        """A plan of so many tokens took so long, from when it was the next to be answered."""
        self._num_answered += 1
        size = num_tokens.bit_length()
        self._slowest[size] = max(self._slowest[size], seconds, _SEEN)
        self._largest = max(self._largest, size)
