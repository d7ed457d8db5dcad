"""When what happened to a request."""

from __future__ import annotations

import time


class Times:
    """Of one choice of a request, which arrives now. See `RequestRecord`."""

    __slots__ = ("arrived", "first_token", "last_token", "started", "submitted")

    def __init__(self) -> None:
        self.arrived = time.monotonic()
        self.submitted: float | None = None
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
