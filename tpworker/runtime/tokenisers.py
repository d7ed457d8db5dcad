"""Threads that turn prompts into tokens. Neither the event loop nor a short prompt waits for long ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from tpworker.runtime.workers import Workers

T = TypeVar("T")

SHORT_CHARS = 16_384
"""Texts of so many characters are tokenised in ten milliseconds; longer ones have threads of their own."""
NUM_SHORT = 4
NUM_LONG = 2
"""So many long texts are tokenised at once: each takes 100 bytes of memory a token meanwhile, and a second a
million tokens. The others wait in order, and hold no more than their text."""


class Tokenisers:
    """Runs what tokenises, in threads chosen by the length of the text."""

    def __init__(self) -> None:
        self._short = Workers(NUM_SHORT, "tpworker-tokenise")
        self._long = Workers(NUM_LONG, "tpworker-tokenise-long")

    async def run(self, work: Callable[[], T], num_chars: int) -> T:
        """What `work` returns, or raises.

        Args:
            work: not begun if the caller is cancelled before.
            num_chars: of all its texts together.
        """
        threads = self._short if num_chars <= SHORT_CHARS else self._long
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def abandon(self, error: Callable[[], Exception]) -> None:
        """See `Workers.abandon`."""
        self._short.abandon(error)
        self._long.abandon(error)
