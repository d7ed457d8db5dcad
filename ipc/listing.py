"""Some of the open requests, on the status board: of the oldest ones how old and how far they are.

The runtime writes all of it a few times a second, and only while there are any. A counter, odd while it
writes, tells a reader that it has caught it in the middle.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from tpworker.ipc.memory import LINE, WORD

NUM_ENTRIES = 16
"""As many requests are listed."""
MAX_NAME = 10 * WORD
"""Bytes of a request's name; the rest is cut off."""

_ENTRY = 2 * LINE  # words: number, arrival, prompt, output, state, length of the name, and the name
_FIRST = 2 * LINE  # of the first entry, behind the counter and the number of entries
_NAME = _ENTRY - MAX_NAME // WORD
NUM_WORDS = _FIRST + NUM_ENTRIES * _ENTRY

_ATTEMPTS = 100


class Listed(NamedTuple):
    """A request that is open."""

    number: int
    """Its name towards the scheduler."""
    name: str
    """What its client calls it."""
    arrived_ns: int
    """time.monotonic_ns()."""
    num_prompt: int
    """Tokens; 0 while it is tokenised."""
    num_output: int
    """Tokens."""
    is_running: bool
    """Whether it has got a slot."""


class Listing:
    """That part of a board."""

    def __init__(self, words: memoryview[int]) -> None:
        assert len(words) == NUM_WORDS
        self._words = words

    def write(self, requests: Sequence[Listed]) -> None:
        """Takes the place of what was there. Of more than NUM_ENTRIES the first count."""
        words, shown = self._words, requests[:NUM_ENTRIES]
        words[0] |= 1  # odd
        words[1] = len(shown)
        for i, one in enumerate(shown):
            name = one.name.encode(errors="replace")[:MAX_NAME]
            entry = words[_FIRST + i * _ENTRY : _FIRST + (i + 1) * _ENTRY]
            entry[0], entry[1], entry[2], entry[3] = (
                one.number,
                one.arrived_ns,
                one.num_prompt,
                one.num_output,
            )
            entry[4], entry[5] = one.is_running, len(name)
            entry[_NAME:] = memoryview(name.ljust(MAX_NAME, b"\0")).cast("Q")
        words[0] += 1

    def read(self) -> list[Listed]:
        """What is there, all of one moment; but for a writer that was killed while it wrote."""
        for _ in range(_ATTEMPTS):
            before = self._words[0]
            found = self._read()
            if not before % 2 and self._words[0] == before:
                break
        return found

    def _read(self) -> list[Listed]:
        found = []
        # Copied at once: part of a mapping that some thread holds keeps another from taking it away.
        words = array("Q", self._words.tobytes())
        for first in range(_FIRST, _FIRST + min(words[1], NUM_ENTRIES) * _ENTRY, _ENTRY):
            number, arrived, num_prompt, num_output, is_running, size = words[first : first + 6]
            padded = words[first + _NAME : first + _ENTRY].tobytes()
            name = padded[: min(size, MAX_NAME)].decode(errors="ignore")
            found.append(Listed(number, name, arrived, num_prompt, num_output, bool(is_running)))
        return found

    def release(self) -> None:
        """It is of no use any more."""
        self._words.release()
