"""Whether to go on after a fault, and with whom.

Processes that are killed say nothing against the requests that they served. Those that crash by themselves
may have done so because of one of them, and would again:

    a crash ─► all go on together
    one more, before they have come further ─► who was there both times is suspected, and runs apart:
               some at a time, and nobody else, until these have come further, or crash: then fewer at a time
    a crash with a single one ─► that one fails, alone; all others go on

"Further" is so many tokens more than what may have been in flight when the crash came.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from tpworker.runtime.requests import Request

PARTS = 8
"""Suspects are split into so many groups: of 512, one is found in three crashes more."""


class Restarts:
    """Counts restarts, and says when there have been too many.

    Args:
        most: within the window.
        window: seconds.
        now: a clock.
    """

    def __init__(self, most: int, window: float, now: Callable[[], float] = time.monotonic) -> None:
        self.num = 0
        """Since the start."""
        self._most = most
        self._window = window
        self._now = now
        self._times: deque[float] = deque()

    @property
    def are_allowed(self) -> bool:
        """Whether there may ever be one."""
        return self._most > 0

    def allow(self, in_a_row: bool = False) -> bool:
        """Whether there may be one more now; then it counts.

        Args:
            in_a_row: the last one has not got ready. Then none is forgotten for its age: starts that hang may
                take so long that there are never many within the window.
        """
        now = self._now()
        while not in_a_row and self._times and self._times[0] <= now - self._window:
            self._times.popleft()
        if len(self._times) >= self._most:
            return False
        self._times.append(now)
        self.num += 1
        return True

    def why_not(self) -> str:
        """What to say when there may not be."""
        if not self._most:
            return "nothing is restarted (--max-restarts 0)"
        return (
            f"there were {len(self._times)} restarts within {self._window:g} s, or in a row without getting "
            "ready, as many as --max-restarts allows within --restart-window"
        )


class Quarantine:
    """Who is suspected of crashes, and who may run meanwhile.

    Args:
        enough: tokens that a request must have got since it went on, to have come further.
    """

    def __init__(self, enough: int) -> None:
        self._enough = enough
        self._apart: deque[list[Request]] = deque()  # the first of these groups runs, and nobody else

    def admits(self, request: Request) -> bool:
        """Whether a request may run now."""
        return not self._apart or request in self._apart[0]

    @property
    def is_empty(self) -> bool:
        """Whether all may run."""
        return not self._apart

    def crashed(self, submitted: Sequence[Request]) -> Request | None:
        """A crash came while these requests were there. Returns who is to blame, once that is certain."""
        if self._apart:
            suspects = [request for request in self._apart[0] if request in submitted]
            self._apart.clear()  # it was none of the others
        else:
            for request in submitted:
                request.num_crashes = 1 if self._is_further(request) else request.num_crashes + 1
            suspects = [request for request in submitted if request.num_crashes > 1]
        for request in submitted:
            request.num_at_crash = request.num_received
        if len(suspects) == 1 == len(submitted):
            return suspects[0]
        size = -(-len(suspects) // PARTS)
        self._apart.extend(suspects[start : start + size] for start in range(0, len(suspects), size or 1))
        return None

    def advance(self, is_open: Callable[[Request], bool]) -> bool:
        """Looks whether those that run apart have come further, or ended. True: others may run now."""
        has_changed = False
        while self._apart and all(
            not is_open(request) or self._is_further(request) for request in self._apart[0]
        ):
            for request in self._apart.popleft():
                request.num_crashes = 0
            has_changed = True
        return has_changed

    def _is_further(self, request: Request) -> bool:
        return request.num_received - request.num_at_crash >= self._enough
