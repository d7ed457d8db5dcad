"""How many tokens of prompts a step holds: as many as what decodes beside them can wait for.

    nothing decodes                   as many as a step may have
    all that waits is soon computed   as many as keep the time between two tokens (ITL) below its target
    more waits than that              large steps: when the backlog would take longer than the target of the
                                      time to first token (TTFT); or when slow tokens can be afforded

A large step delays each request that decodes once, by a token; small ones delay all prompts behind them.
Where few decode and many wait, as when clients begin together, the first costs next to nothing: every token
that came in time earns a part of a slow one, and a large step costs as many as decode. So of all tokens less
than a hundredth is slow for this, and the 99th percentile of the time between tokens does not see it.

What a step takes is learnt from the device's times of answered ones: of steps that only decode by the number
that do, and of a prompt's token by how many there are. Nothing here reads a clock.

Graphs are captured for some numbers of tokens (`step_ladder`), and what is between two of them is padded. So
a step that leaves some of what waits to the next has one of these numbers, and one that would be padded by
much leaves a little.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from tpworker.ipc.child import SchedulerSettings
from tpworker.ipc.step_sizes import step_ladder

EARNED = 0.005
"""Of a slow token, that each token earns which came in time."""

SAVED_AT_FIRST, MOST_SAVED = 32.0, 256.0
"""Slow tokens. What was earned in hours of decoding is not spent at once."""

PLAIN_STEPS = 3.0
"""So many times a step that only decodes may take one with prompts, if that is more than the target: or on a
slow device prompts would never be done."""

FEWEST = 64
"""Tokens of prompts in a step, if so many wait."""

FIRST_GUESS = 512
"""The same before anything is known of what steps take."""

MOST_PADDING, MUCH_PADDING = 0.07, 160
"""Of a step, and tokens: where a step would be padded by more, it is cut to the next lower size."""

_LEARNT = 0.25  # of each new time
_SMALLEST_TOLD = 16  # tokens of a step that tells what prompts take


class Filling:
    """Chooses the number of prompt tokens of each step.

    Args:
        most: tokens of a step.
        target_itl, target_ttft: seconds; see the module.
        ladder: numbers of tokens that steps are padded to, ascending; empty: none are padded.
    """

    def __init__(self, most: int, target_itl: float, target_ttft: float, ladder: Sequence[int] = ()) -> None:
        self._most = most
        self._target_itl, self._target_ttft = target_itl, target_ttft
        self._ladder = ladder
        self._plain: dict[int, float] = {}  # seconds of a step that only decodes, by the size of the batch
        self._per_token: dict[int, float] = {}  # seconds of a prompt's token, by the size of the step
        self.saved = SAVED_AT_FIRST
        """Slow tokens that can be afforded."""

    # -------------------------------------------------------------------------------------- learn

    def answered(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """A step has come back.

        Args:
            num_decodes: requests that decoded in it.
            num_prefill_tokens: of its chunks.
            seconds: that the device took for it.
        """
        if seconds <= 0:
            return
        if not num_prefill_tokens:
            _learn(self._plain, _size(num_decodes), seconds)
        elif num_prefill_tokens >= _SMALLEST_TOLD:
            # Weights are read once for both: at least half of the time is the prompts'.
            own = max(seconds - self._plain_seconds(num_decodes), seconds / 2)
            _learn(self._per_token, _size(num_prefill_tokens), own / num_prefill_tokens)
        if num_decodes and seconds <= self._longest(num_decodes):
            self.saved = min(self.saved + EARNED * num_decodes, MOST_SAVED)

    # ------------------------------------------------------------------------------------- choose

    def choose(self, num_decodes: int, num_rows: int, num_waiting: int) -> int:
        """The most tokens of prompts for the next step.

        Args:
            num_decodes: requests that decode in it.
            num_rows: tokens that these take of the step.
            num_waiting: tokens of prompts that could be computed, those that a cache may have included.
        """
        room = self._most - num_rows
        if not num_decodes:
            return self._fitted(room, num_rows, num_waiting)
        few = min(self.few(num_decodes), room)
        if num_waiting > few and self._may_be_large(num_decodes, few, num_waiting):
            few = room
        return self._fitted(few, num_rows, num_waiting)

    def few(self, num_decodes: int) -> int:
        """Tokens of prompts that so many requests can wait for."""
        if not self._per_token:
            return FIRST_GUESS
        seconds = self._longest(num_decodes) - self._plain_seconds(num_decodes)
        count = FIRST_GUESS
        for _ in range(2):  # what a token takes depends on how many there are
            count = max(FEWEST, int(seconds / self._token_seconds(count)))
        return count

    def _may_be_large(self, num_decodes: int, few: int, num_waiting: int) -> bool:
        """Whether the step is, though it delays what decodes; if that is bought, it is paid for here."""
        if self._per_token and num_waiting * self._token_seconds(few) > self._target_ttft:
            return True
        if self.saved < num_decodes:
            return False
        self.saved -= num_decodes
        return True

    def _fitted(self, count: int, num_rows: int, num_waiting: int) -> int:
        """At most so many, so that little of the step is padding."""
        total = num_rows + min(count, num_waiting)
        index = bisect.bisect_left(self._ladder, total)
        if index == len(self._ladder) or self._ladder[index] == total:
            return count
        leaves_some = count < num_waiting
        if not leaves_some and self._ladder[index] - total <= max(MUCH_PADDING, MOST_PADDING * total):
            return count
        lower = self._ladder[index - 1] - num_rows if index else 0
        return lower if lower >= FEWEST else count

    # ----------------------------------------------------------------------------------- estimates

    def expected(self, num_decodes: int, num_prefill_tokens: int) -> float:
        """Seconds that a step of these should take; 0: not known."""
        plain = self._plain_seconds(num_decodes)
        if not num_prefill_tokens:
            return plain
        seconds = self._token_seconds(num_prefill_tokens) * num_prefill_tokens
        return seconds + plain if seconds else 0.0

    def _longest(self, num_decodes: int) -> float:
        """Seconds that a step may take without being slow."""
        return max(self._target_itl, PLAIN_STEPS * self._plain_seconds(num_decodes))

    def _plain_seconds(self, num_decodes: int) -> float:
        return _nearest(self._plain, _size(num_decodes)) if num_decodes else 0.0

    def _token_seconds(self, count: int) -> float:
        return _nearest(self._per_token, _size(count))


def filling_of(settings: SchedulerSettings) -> Filling | None:
    """None: every step holds as much as it may."""
    if not settings.target_itl:
        return None
    most = settings.max_num_batched_tokens
    ladder = step_ladder(most) if settings.has_graphs else ()
    return Filling(most, settings.target_itl, settings.target_ttft, ladder)


def _size(count: int) -> int:
    return count.bit_length()


def _learn(times: dict[int, float], size: int, seconds: float) -> None:
    before = times.get(size, seconds)
    times[size] = before + _LEARNT * (seconds - before)


def _nearest(times: dict[int, float], size: int) -> float:
    """What is known of this size, or of the nearest; 0: nothing."""
    if size in times:
        return times[size]
    return times[min(times, key=lambda other: (abs(other - size), other))] if times else 0.0
