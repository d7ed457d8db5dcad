"""Deadlines in the time for which whoever waits was running itself.

A machine that is suspended, a container that is paused, a process stopped by Ctrl-Z: then a clock goes on,
and whoever looks at it afterwards finds every deadline over, and a peer to blame that did nothing but stand
still with everybody else. So waits are cut into slices, with a look at the clock after each of them, and
what lies between two looks counts for at most `_LATE` slices, however long it was: time in which nobody ran
counts for nobody. A peer that alone stands still is waited for in slices that do count.
"""

from __future__ import annotations

import time

_SLICES = 16
"""Into so many slices a deadline is cut, within these bounds, in seconds:"""
_SHORTEST = 0.01
_LONGEST = 0.25
_OVER = 1e-6
"""What is less than so many seconds is nothing."""
_LATE = 2
"""Slices that the time between two looks counts for, at most: one, and the time for the kernel to wake us."""


class Patience:
    """So many seconds of waiting, from now. It belongs to one thread.

        patience = Patience(60.0)
        while not wait(patience.slice()):
            if not patience.left():
                raise TimeoutError

    Args:
        seconds: 0 is over at once; infinity never is.
    """

    __slots__ = ("_left", "_looked", "_slice", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._slice = max(_SHORTEST, min(_LONGEST, seconds / _SLICES))
        self.restart()

    def restart(self) -> None:
        """From now on all of it is left again."""
        self._left = self.seconds
        self._looked = time.monotonic()

    def left(self) -> float:
        """Counts the time since the last look, and says how many seconds are left; 0.0: it has run out."""
        now = time.monotonic()
        self._left -= min(now - self._looked, _LATE * self._slice)
        self._looked = now
        return self._left if self._left >= _OVER else 0.0

    def spent(self) -> float:
        """Looks, and says how many seconds have counted so far."""
        self.left()
        return self.seconds - self._left

    def slice(self) -> float:
        """Looks, and says how many seconds to sleep, at most, until the next look; 0.0: it has run out."""
        return min(self.left(), self._slice)
