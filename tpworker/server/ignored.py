"""What requests hold that nobody here knows: accepted, named in a header of the answer, and logged once.

New releases of client libraries add fields, and each would break them if it were refused. Nothing of it can
be used to fill the log, or memory.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from urllib.parse import quote

logger = logging.getLogger(__name__)

HEADER = "X-Ignored-Parameters"
MAX_NAMES = 16
"""Of one answer; how many more there were is told."""
MAX_NAME_CHARS = 64
MAX_LOGGED = 256
"""Names that are logged, and remembered for that, in the life of a process."""


class Ignored:
    """The names that one request has brought in vain, in order, each once."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._num_more = 0

    def add(self, name: str) -> None:
        """A parameter that is ignored; within others it is written as `stream_options.name`."""
        name = quote(name[:MAX_NAME_CHARS], safe="", encoding="ascii", errors="backslashreplace")
        name = name[:MAX_NAME_CHARS] or '""'  # no header may end with nothing
        if name in self._names:
            return
        if len(self._names) == MAX_NAMES:
            self._num_more += 1
            return
        self._names[name] = None
        _log_once(name)

    def header(self) -> str:
        """What the answer's header says; '' if there is nothing to say."""
        more = [f"and-{self._num_more}-more"] if self._num_more else []
        return ", ".join([*self._names, *more])


current: ContextVar[Ignored | None] = ContextVar("tpworker_ignored", default=None)
"""That of the request that is being answered; the gate sets it."""


def ignore(name: str) -> None:
    """A parameter of the current request has no effect."""
    ignored = current.get()
    if ignored is not None:
        ignored.add(name)


_logged: set[str] = set()


def _log_once(name: str) -> None:
    if name in _logged or len(_logged) >= MAX_LOGGED:
        return
    _logged.add(name)
    logger.warning("requests have the parameter %s, which is ignored here; this is said once", name)
    if len(_logged) == MAX_LOGGED:
        logger.warning("%d such names were told; others are ignored without a word", MAX_LOGGED)
