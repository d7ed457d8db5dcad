"""The log's line for each request, when it has ended; and for whatever else is asked for, if that is wanted.

    tpworker.requests   INFO    one line for each request to do something; WARNING: it failed
    tpworker.access     DEBUG   probes, /metrics, pages, lists: what would fill a log, and tells nothing

A line for each request is what operators look for, so whatever was answered, or had the model work, has one,
always: how many there can be of those, the model bounds. What costs a client nothing (to be refused, to leave
before anything has come) it could use to fill the log. So of each kind MAX_LINES have a line within PERIOD_S,
and how many more there were is told in one, when that time is over. A kind is a status and an error's code,
both ours: a flood of one kind hides no other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from tpworker.logs import Fields
from tpworker.outputs import Listener, RequestRecord
from tpworker.server import journal, request_ids
from tpworker.server.gate import PROBES, is_guarded, route_path
from tpworker.server.journal import Entry

requests = logging.getLogger("tpworker.requests")
access = logging.getLogger("tpworker.access")

PERIOD_S = 10.0
MAX_LINES = 10
"""Of one kind within PERIOD_S, of what costs a client nothing."""
_MAX_PATH_CHARS = 200
_READS = frozenset(["GET", "HEAD", "OPTIONS"])


class RequestLog(Listener):
    """ASGI middleware around everything else, and a listener of the runtime that has the numbers."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}  # by the runtime's ids

    def around(self, app: ASGIApp) -> ASGIApp:
        """The app, whose requests are logged."""

        async def logged(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            entry = Entry()
            journal.current.set(entry)  # this task is the request's own
            try:
                await app(scope, receive, send)
            except Exception:
                entry.status = entry.status or 500
                raise
            finally:
                for runtime_id in entry.runtime_ids:
                    self._entries.pop(runtime_id, None)
                _tell(scope, entry)

        return logged

    def follow(self, entry: Entry) -> None:
        """From now on what the runtime says of a request's choices is written to its entry."""
        for runtime_id in entry.runtime_ids:
            self._entries[runtime_id] = entry

    def on_request_end(self, record: RequestRecord) -> None:
        """For the runtime."""
        if (entry := self._entries.get(record.request_id)) is not None:
            entry.records.append(record)


def shown_prompt(prompt: str | Sequence[int], decode: Any, max_chars: int) -> str:
    """The begin of a prompt, for the log.

    Args:
        prompt: a text, or token ids.
        decode: makes a text of ids; None: there is no tokenizer.
        max_chars: of what is shown.
    """
    if not isinstance(prompt, str):
        ids = list(prompt[:max_chars])  # a token has a character at least, or next to none has
        prompt = json.dumps(ids) if decode is None else decode(ids, skip_special_tokens=False)
    return prompt[:max_chars]


def _tell(scope: Scope, entry: Entry) -> None:
    """Writes the line of a request that has ended."""
    path, method = route_path(scope), scope["method"]
    is_request = path not in PROBES and (method not in _READS or (entry.status >= 400 and is_guarded(path)))
    logger, level = (requests, logging.INFO) if is_request else (access, logging.DEBUG)
    outcome = entry.outcome_now()
    if is_request and outcome == "failed":
        level = logging.WARNING
    if not logger.isEnabledFor(level):
        return
    is_free = is_request and outcome != "ok" and not entry.has_output
    if is_free and not _flood.lets_through(entry, level):
        return
    client = scope.get("client")
    head = {"method": method, "endpoint": path[:_MAX_PATH_CHARS], "status": entry.status or None}
    told = {
        "request_id": request_ids.current.get(),
        "client": f"{client[0]}:{client[1]}" if client else None,
        **entry.fields(),
        "trace_id": request_ids.traceparent.get()[3:35] or None,
        "prompt": entry.prompt,
    }
    fields = {name: value for name, value in told.items() if value is not None}
    make_record = logging.getLogRecordFactory()  # not by `log`, which looks for its caller on the stack
    record = make_record(logger.name, level, __file__, 0, Fields(list(head.values()), fields), (), None)
    vars(record).update(head | fields)
    logger.handle(record)


class _Flood:
    """Bounds the lines of what costs clients nothing; one for the process, as the logger is."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, str], int] = {}  # how many there were of each in this period
        self._levels: dict[tuple[int, str], int] = {}
        self._ends_at = 0.0

    def lets_through(self, entry: Entry, level: int) -> bool:
        """Whether one more has a line of its own."""
        now = time.monotonic()
        if now >= self._ends_at:
            self.end_period()
            self._ends_at = now + PERIOD_S
            asyncio.get_running_loop().call_later(PERIOD_S, self._look)
        kind = entry.status, entry.error or entry.outcome_now()
        count = self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._levels[kind] = level
        return count <= MAX_LINES

    def _look(self) -> None:
        if time.monotonic() >= self._ends_at:  # else another loop's requests have begun a new period
            self.end_period()

    def end_period(self) -> None:
        """Tells of those that had no line."""
        kinds, self._kinds = self._kinds, {}
        for (status, code), count in kinds.items():
            if (num_more := count - MAX_LINES) > 0:
                requests.log(
                    self._levels[status, code],
                    "%d more requests within %g s ended so: %s %s",
                    num_more,
                    PERIOD_S,
                    status or "-",
                    code,
                    extra={"status": status or None, "error": code, "more_requests": num_more},
                )


_flood = _Flood()


def tell_rest() -> None:
    """Nothing is served any more: tells of those that had no line yet."""
    _flood.end_period()
