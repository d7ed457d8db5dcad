"""The OpenAI-compatible HTTP app around a runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from tpworker.metrics import Metrics
from tpworker.server import ignored, request_ids
from tpworker.server.document import complete
from tpworker.server.front import Front
from tpworker.server.gate import Gate
from tpworker.server.handlers import add_handlers
from tpworker.server.options import FrontOptions
from tpworker.server.request_ids import RequestIds
from tpworker.server.request_log import RequestLog
from tpworker.server.routes.cache import add_cache
from tpworker.server.routes.generation import add_generation
from tpworker.server.routes.models import add_models
from tpworker.server.routes.probes import add_probes
from tpworker.server.routes.profile import add_profile
from tpworker.server.routes.responses import add_responses
from tpworker.server.routes.sglang import add_sglang
from tpworker.server.routes.sleeping import add_sleeping, add_weight_updates
from tpworker.server.routes.text import add_text
from tpworker.server.routes.top import add_top
from tpworker.server.timing import FrontMetrics
from tpworker.server.tracing import HttpSpans, TraceContext
from tpworker.version import version

if TYPE_CHECKING:
    from tpworker.runtime.runtime import Runtime


class _App(FastAPI):
    """An app that knows each request by an id, its failures included, which starlette answers outside of all
    other middleware."""

    def __init__(self, *, log: RequestLog, under: str, **options: Any) -> None:
        """
        Args:
            log: tells of each request.
            under: the path under which clients see it, if that is none that a server above it tells.
        """
        super().__init__(**options)
        self._log = log
        self._under = under

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._under:
            scope["root_path"] = self._under
        await self._log.around(RequestIds(super().__call__))(scope, receive, send)


def create_app(runtime: Runtime, options: FrontOptions | None = None) -> FastAPI:
    """The app that serves a runtime. It neither starts nor stops it: whoever made it does.

    Until the runtime is ready, requests are answered with 503; /health and /ready tell the two apart.

    Args:
        runtime: may be starting still.
        options: see there.
    """
    options = options or FrontOptions()
    names = options.served_model_names
    metrics = Metrics(runtime, names[0] if names else None)
    counted = FrontMetrics()
    metrics.registry.register(counted)
    log = RequestLog()
    runtime.add_listener(log)
    front = Front(runtime, options, counted, log)
    app = _App(
        title="tpworker",
        version=version(),
        description="OpenAI-compatible API of a tensor-parallel runtime.",
        redirect_slashes=False,  # to where the Host header says: anywhere
        log=log,
        under=options.root_path,
    )
    app.add_middleware(
        Gate,
        count=counted.count,
        api_key=options.api_key,
        max_model_len=front.max_model_len,
    )
    if options.allowed_origins:  # around the gate: browsers ask without the key, and read its refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", ignored.HEADER, request_ids.HEADER],
        )
    if options.trace is not None:
        app.add_middleware(HttpSpans, runtime=runtime)
        add_profile(app, front, options.trace)
    if options.has_trace_context:
        app.add_middleware(TraceContext)
    add_handlers(app)
    add_generation(app, front)
    add_responses(app, front)
    add_models(app, front)
    add_text(app, front)
    add_cache(app, front)
    if options.enable_sleep_mode:
        add_sleeping(app, front)
    if options.enable_weight_updates:
        add_weight_updates(app, front)
    add_top(app, front)
    add_sglang(app, front)
    add_probes(app, front, metrics)
    complete(app, runtime, has_key=options.api_key is not None)
    return app
