"""Signals, as the server's life takes them: each means to end, and one more means at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Generator
from contextlib import contextmanager

_AGAIN = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """SIGINT, SIGTERM and SIGHUP, counted.

    A terminal that is closed sends SIGHUP, its shell another one and the kernel a third: however many come,
    they count as one, and not at all as a repetition of another signal. Where it was ignored, as `nohup`
    does, it stays so.
    """

    def __init__(self) -> None:
        self.last = ""
        """The name of the last one that counted."""
        self._counted = asyncio.Semaphore(0)

    async def one(self) -> None:
        """Until one more has come that counts."""
        await self._counted.acquire()

    def take(self, number: signal.Signals) -> None:
        """A signal has come."""
        if number in _AGAIN or not self.last:
            self.last = number.name
            self._counted.release()


@contextmanager
def watched_signals() -> Generator[Signals, None, None]:
    """Meanwhile, in the main thread and on its event loop, signals do nothing but count."""
    loop = asyncio.get_running_loop()
    signals = Signals()
    numbers = [*_AGAIN]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, signals.take, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # whoever started us may have blocked them
    try:
        yield signals
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
