"""What a request is in traces: a span on the runtime's timeline, and the trace that its client has begun."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpworker.server import request_ids
from tpworker.server.gate import is_guarded, route_path

if TYPE_CHECKING:
    from tpworker.runtime.runtime import Runtime


class HttpSpans:
    """ASGI middleware: each request that the gate guards is a span in the group 'HTTP', while a timeline is
    written.

    Args:
        app: what answers.
        runtime: whose timeline it is.
    """

    def __init__(self, app: ASGIApp, *, runtime: Runtime) -> None:
        self._app = app
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._runtime.is_tracing or not is_guarded(route_path(scope)):
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic_ns(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            told = {"request": request_ids.current.get(), "status": status or "none: it has left"}
            name = f"{scope['method']} {route_path(scope)}"
            self._runtime.trace_span("HTTP", name, begun, time.monotonic_ns(), told)


class TraceContext:
    """ASGI middleware: what answers a request belongs to the trace that its headers name (`traceparent` and
    `tracestate`, W3C Trace Context). Needs the extra `otlp`.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._context = context
        self._extract = TraceContextTextMapPropagator().extract

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        token = self._context.attach(self._extract(headers))
        try:
            await self._app(scope, receive, send)
        finally:
            self._context.detach(token)
