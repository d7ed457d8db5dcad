"""The id of each request: the client's own X-Request-Id, or one of ours, in the answer and in the log."""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
_NAME = HEADER.lower().encode()
_FIT = re.compile(rb"[!-~]{1,128}")
"""Ids of clients that are taken: visible ASCII, which breaks neither headers nor lines of a log."""

current: ContextVar[str] = ContextVar("tpworker_request_id", default="")
"""That of the request that this task answers."""


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
        current.set(request_id.decode())  # and not back: the server logs what the app has raised

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (_NAME, request_id)]}
            await send(message)

        await self._app(scope, receive, send_with_id)


class WithRequestId(logging.Filter):
    """Ends the lines that are written for a request with its id."""

    def filter(self, record: logging.LogRecord) -> bool:
        if request_id := current.get():
            record.msg = f"{record.getMessage().rstrip()} (request {request_id})"
            record.args = ()
        return True
