"""What a runtime's owner is told of its processes."""

from __future__ import annotations

import time
from collections import deque

from tpworker.outputs import EventKind, Listener, RuntimeEvent
from tpworker.runtime.faults import Fault

NUM_KEPT = 64


class Events:
    """Tells of events, and keeps the last ones.

    Args:
        listener: told of each.
    """

    def __init__(self, listener: Listener) -> None:
        self.recent: deque[RuntimeEvent] = deque(maxlen=NUM_KEPT)
        self._listener = listener

    def add(
        self,
        kind: EventKind,
        generation: int,
        about: Fault | str,
        seconds: float | None = None,
        requests: int = 0,
    ) -> None:
        """Something has happened now. The arguments are the fields of `RuntimeEvent`.

        Args:
            about: its process and summary; the summary alone, if no process is at fault.
        """
        process, summary = ("", about) if isinstance(about, str) else (about.process, about.summary)
        event = RuntimeEvent(kind, time.time(), generation, process, summary, seconds, requests)
        self.recent.append(event)
        self._listener.on_event(event)
