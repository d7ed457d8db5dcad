"""What a runtime's owner is told of its processes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from tpworker.outputs import EventKind, RuntimeEvent
from tpworker.runtime.faults import Fault

logger = logging.getLogger(__name__)

NUM_KEPT = 64


class Events:
    """Tells of events, and keeps the last ones.

    Args:
        listener: called with each.
    """

    def __init__(self, listener: Callable[[RuntimeEvent], None] | None) -> None:
        self.recent: deque[RuntimeEvent] = deque(maxlen=NUM_KEPT)
        self._listener = listener

    def add(
        self,
        kind: EventKind,
        generation: int,
        fault: Fault,
        seconds: float | None = None,
        requests: int = 0,
    ) -> None:
        """Something has happened now. The arguments are the fields of `RuntimeEvent`."""
        event = RuntimeEvent(kind, time.time(), generation, fault.process, fault.summary, seconds, requests)
        self.recent.append(event)
        if self._listener is not None:
            try:
                self._listener(event)
            except (Exception, asyncio.CancelledError):  # of a future of its own, say: we are not cancelled
                logger.exception("on_event raised")
