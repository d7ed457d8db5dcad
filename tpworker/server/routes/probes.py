"""What load balancers, Prometheus and operators ask."""

from __future__ import annotations

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse, Response

from tpworker.metrics import Metrics
from tpworker.outputs import UP
from tpworker.runtime.loading import in_daemon_thread
from tpworker.server.errors import LATER, SOON
from tpworker.server.front import Front
from tpworker.server.shapes import Documented, Load, Probe, Version, documented
from tpworker.version import version


def add_probes(app: FastAPI, front: Front, metrics: Metrics) -> None:
    """Adds them."""
    runtime = front.runtime

    probes: Documented = documented(500, ok=Probe)
    probes[503] = {"model": Probe, "description": "No."}

    @app.get("/health", responses=probes)
    async def health() -> Response:
        """200 while the server lives, also while it loads, recovers, drains or sleeps; 503 when it cannot
        recover."""
        return probe({"starting", *UP})

    @app.get("/ready", responses=probes)
    async def ready() -> Response:
        """200 while requests are worked on as they come, else 503. Those that come while it recovers, or
        gets other weights, are taken, and wait: another server would be quicker."""
        return probe({"ready"})

    @app.get("/ping", responses=probes)
    @app.post("/ping", responses=probes)
    async def ping() -> Response:
        """As /health, under the name that SageMaker asks for."""
        return await health()

    @app.get("/version", responses=documented(500, ok=Version))
    async def version_page() -> dict[str, str]:
        """Of tpworker."""
        return {"version": version()}

    @app.get("/load", responses=documented(500, ok=Load))
    async def load() -> dict[str, int]:
        """How many requests are open."""
        return {"server_load": runtime.stats().open}

    @app.get("/metrics", response_class=PlainTextResponse, responses=documented(500))
    async def metrics_page() -> Response:
        """For Prometheus."""
        page = await in_daemon_thread(metrics.text)  # milliseconds, which no stream shall wait for
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    def probe(good: set[str]) -> Response:
        health = runtime.health()
        body = {"status": health.state} | ({"error": health.summary} if health.error else {})
        if health.state in good:
            return JSONResponse(body)
        return JSONResponse(body, 503, SOON if health.state in ("recovering", "updating") else LATER)
