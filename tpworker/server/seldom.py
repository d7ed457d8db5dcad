"""A log that nobody can fill: what clients can cause at will is written once in a while, with a count."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager

from tpworker.server.request_ids import WithRequestId

PERIOD_S = 30.0
_MAX_LINES = 256  # different ones that are remembered
_LOGGERS = ("asyncio", "uvicorn.error", "tpworker.server.answer")


class Seldom(logging.Filter):
    """Lets the same line pass once in PERIOD_S. The next one that passes says how many did not."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[object, tuple[float, int]] = {}  # when it passed, how many have come since

    def filter(self, record: logging.LogRecord) -> bool:
        # The first line as it is before arguments are filled in: below it objects are printed, which differ.
        line = record.name, str(record.msg).partition("\n")[0], _origin(record)
        now = time.monotonic()
        passed, num_more = self._seen.get(line, (None, 0))
        if passed is not None and now - passed < PERIOD_S:
            self._seen[line] = passed, num_more + 1
            return False
        if len(self._seen) >= _MAX_LINES:
            self._seen.clear()
        self._seen[line] = now, 0
        if num_more and passed is not None:
            record.msg = f"{record.getMessage()} ({num_more} more like it in the {now - passed:.0f} s before)"
            record.args = ()
        return True


def _origin(record: logging.LogRecord) -> object:
    """Of an exception that is logged: what it is, and where it was raised."""
    kind, _, traceback = record.exc_info or (None, None, None)
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return kind, traceback and (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)


@contextmanager
def seldom() -> Generator[None, None, None]:
    """Meanwhile the HTTP server's log, and asyncio's, repeat nothing, and say for which request it is."""
    filters = [Seldom(), WithRequestId()]  # in this order: ids differ
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        for one in filters:
            logger.addFilter(one)
    try:
        yield
    finally:
        for logger in loggers:
            for one in filters:
                logger.removeFilter(one)
