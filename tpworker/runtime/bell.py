"""How a consumer hears that there is something to take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Bell:
    """Tells the one consumer of a request, or of several choices: at once, or by waking its task."""

    __slots__ = ("_waiter", "on_ring")

    def __init__(self) -> None:
        self.on_ring: Callable[[], None] | None = None
        """Of a consumer that is called; None: it has a task, which waits."""
        self._waiter: asyncio.Future[None] | None = None  # of a task that has not been woken

    def ring(self) -> None:
        """Something has changed. A task is woken if it waits, and has not been woken already."""
        if self.on_ring is not None:
            self.on_ring()
            return
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def listen(self) -> asyncio.Future[None]:
        """Done when it rings. What has changed before must have been looked at."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter


class Turns:
    """Calls consumers at the event loop's next turn, each once, however often they are to be called.

    So the steps that lie there when a turn comes are told of together, which is the less work the later they
    are; and between two turns everybody else has one.
    """

    def __init__(self) -> None:
        self._next: dict[Callable[[], None], None] = {}

    def call(self, consumer: Callable[[], None]) -> None:
        """Soon."""
        if not self._next:
            asyncio.get_running_loop().call_soon(self._turn)
        self._next[consumer] = None

    def _turn(self) -> None:
        consumers, self._next = self._next, {}
        for consumer in consumers:
            try:
                consumer()
            except Exception:
                logger.exception("a consumer of outputs raised, who must not")
