"""Timelines, on and off while the server runs, under the names that vLLM has.

They are there only if the server was started with --trace: whoever may send requests may not have files
written on the server's disk, unless who runs it has said so, and where. So the server alone names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from tpworker.errors import ConfigError
from tpworker.server.errors import ApiError
from tpworker.server.front import Front
from tpworker.server.shapes import Trace, TraceBegun, documented


def add_profile(app: FastAPI, front: Front, path: Path) -> None:
    """Adds them.

    Args:
        app: of the server.
        front: of the app.
        path: of the first timeline, which begins with the server.
    """
    runtime, paths = front.runtime, later(path)

    @app.post("/start_profile", responses=documented(401, 409, 500, ok=TraceBegun))
    async def start_profile() -> Response:
        """Begins a timeline, in a file of its own beside the one of --trace: trace-2.json, trace-3.json …"""
        if runtime.is_tracing:
            return _refused("a timeline is being written already: POST /stop_profile ends it")
        file = next(paths)
        try:
            runtime.start_trace(file)
        except ConfigError as error:
            return _refused(str(error))
        return JSONResponse({"file": file.name})

    @app.post("/stop_profile", responses=documented(401, 409, 500, ok=Trace))
    async def stop_profile() -> Response:
        """Ends the timeline, and says what has become of it; of one that was full, too."""
        summary = await runtime.stop_trace()
        if summary is None:
            return _refused("no timeline has been written: POST /start_profile begins one")
        return JSONResponse({**summary._asdict(), "path": Path(summary.path).name})


def later(path: Path) -> Iterator[Path]:
    """The files behind the first one."""
    return (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))


def _refused(message: str) -> Response:
    return ApiError(409, message, code="profile").as_response()
