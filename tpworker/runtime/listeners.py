"""Those who are told what a runtime does, as it happens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from tpworker.outputs import Listener, RequestRecord, RuntimeEvent, StepRecord

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Listeners(Listener):
    """Tells all that were added, in that order. What one of them raises is nobody else's concern."""

    def __init__(self) -> None:
        self._all: tuple[Listener, ...] = ()
        self._failed: set[tuple[int, str]] = set()  # of whom it has been logged, and where

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, listener: Listener) -> None:
        """From now on."""
        self._all = (*self._all, listener)

    def remove(self, listener: Listener) -> None:
        """Not any more. Unknown ones are ignored."""
        self._all = tuple(one for one in self._all if one is not listener)

    def on_event(self, event: RuntimeEvent) -> None:
        for listener in self._all:
            self._call(listener.on_event, event)

    def on_request_end(self, record: RequestRecord) -> None:
        for listener in self._all:
            self._call(listener.on_request_end, record)

    def on_first_tokens(self, waits: Sequence[float]) -> None:
        for listener in self._all:
            self._call(listener.on_first_tokens, waits)

    def on_tokens(self, intervals: Sequence[tuple[int, float]]) -> None:
        for listener in self._all:
            self._call(listener.on_tokens, intervals)

    def on_step(self, step: StepRecord) -> None:
        for listener in self._all:
            self._call(listener.on_step, step)

    def _call(self, method: Callable[[T], None], told: T) -> None:
        try:
            method(told)
        except (Exception, asyncio.CancelledError):  # of a future of its own, say: we are not cancelled
            owner = getattr(method, "__self__", method)
            failed = id(owner), method.__name__
            if failed not in self._failed:  # a step may be a millisecond
                self._failed.add(failed)
                logger.exception("%s of %r raised; it will not be logged again", method.__name__, owner)


class EventListener(Listener):
    """Calls a function with each event.

    Args:
        tell: is called.
    """

    def __init__(self, tell: Callable[[RuntimeEvent], None]) -> None:
        self._tell = tell

    def on_event(self, event: RuntimeEvent) -> None:
        self._tell(event)
