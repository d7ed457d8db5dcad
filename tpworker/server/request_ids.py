"""The id of each request: the client's own X-Request-Id, or one of ours, in the answer and in the log."""

from __future__ import annotations

import logging
import re
import secrets
import uuid
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpworker.server.journal import note_status

HEADER = "X-Request-Id"
_NAME = HEADER.lower().encode()
_FIT = re.compile(rb"[!-~]{1,128}")
"""Ids of clients that are taken: visible ASCII, which breaks neither headers nor lines of a log."""

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""Where a request belongs in a trace (W3C Trace Context): version, trace, its parent in it, flags."""

current: ContextVar[str] = ContextVar("tpworker_request_id", default="")
"""That of the request that this task answers."""
unique: ContextVar[str] = ContextVar("tpworker_unique_id", default="")
"""The same, with something behind it if another request that is being answered has that id, too."""
traceparent: ContextVar[str] = ContextVar("tpworker_traceparent", default="")
"""The header that the request came with, if it is one; '' else."""

_in_use: set[str] = set()  # of all apps of this process: they may share a runtime


def own_header() -> tuple[bytes, bytes]:
    """The header with an id of ours, for what is answered before there is an app."""
    return _NAME, uuid.uuid4().hex.encode()


class RequestIds:
    """ASGI middleware around everything else: each answer has the id of its request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == _NAME), b"")
        request_id = sent if _FIT.fullmatch(sent) else uuid.uuid4().hex.encode()
        name = request_id.decode()
        current.set(name)  # and not back: the server logs what the app has raised
        if name in _in_use:
            name = f"{name}-{secrets.token_hex(4)}"
        unique.set(name)
        _in_use.add(name)
        traceparent.set(_traceparent_in(scope))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                note_status(message["status"])
                message = {**message, "headers": [*message.get("headers", ()), (_NAME, request_id)]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _in_use.discard(name)


def _traceparent_in(scope: Scope) -> str:
    """The header, if there is one of them, and it is right; as the standard has it, a wrong one is none."""
    sent = [value for name, value in scope["headers"] if name == b"traceparent"]
    return sent[0].decode() if len(sent) == 1 and _TRACEPARENT.fullmatch(sent[0]) else ""


class WithRequestId(logging.Filter):
    """Ends the lines that are written for a request with its id."""

    def filter(self, record: logging.LogRecord) -> bool:
        if request_id := current.get():
            record.request_id = request_id
            record.msg = f"{record.getMessage().rstrip()} (request {request_id})"
            record.args = ()
        return True
