"""The prefix cache: what operators, and those who train, ask of it."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query

from tpworker.errors import InvalidRequest
from tpworker.server.front import Front
from tpworker.server.shapes import TELLS, Done, documented

MORE = ("reset_running_requests", "reset_external")


def add_cache(app: FastAPI, front: Front) -> None:
    """Adds the route."""
    runtime = front.runtime

    @app.post("/reset_prefix_cache", responses=documented(400, *TELLS, ok=Done))
    async def reset_prefix_cache(
        reset_running_requests: Annotated[bool, Query()] = False,
        reset_external: Annotated[bool, Query()] = False,
    ) -> dict[str, bool]:
        """Forgets what has been computed: no request that begins to run from now on finds any of it. Those
        that run go on with what is theirs. The answer comes when it is so."""
        for name, is_asked in zip(MORE, (reset_running_requests, reset_external), strict=True):
            if is_asked:
                raise InvalidRequest(
                    f"{name}: not supported: what runs goes on, and nothing is outside", name
                )
        front.admit(None)
        await runtime.reset_prefix_cache()
        return {"success": True}
