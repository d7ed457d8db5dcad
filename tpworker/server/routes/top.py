"""What `tpworker top` shows of a server."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import FastAPI

from tpworker.errors import RuntimeStopped
from tpworker.observe.looking import gpu_of, with_usage
from tpworker.observe.snapshot import Snapshot, to_json
from tpworker.runtime.loading import in_daemon_thread
from tpworker.server.front import Front
from tpworker.server.shapes import GUARDED, documented


def add_top(app: FastAPI, front: Front) -> None:
    """Adds the route."""
    runtime = front.runtime

    @app.get("/top", responses=documented(*GUARDED, ok=Snapshot))
    async def top() -> dict[str, Any]:
        """What the processes, the scheduler and the oldest requests do at this instant: for `tpworker top`,
        and for scripts. Counters begin at 0 with each restart, those under `runtime` with the server."""
        snapshot = runtime.snapshot()
        with suppress(RuntimeStopped):  # it looks for the model still
            snapshot = dataclasses.replace(snapshot, model=front.model_names[0])
        # Asking the driver and the kernel takes milliseconds, which no stream shall wait for.
        return await in_daemon_thread(partial(_used, snapshot))

    def _used(snapshot: Snapshot) -> dict[str, Any]:
        gpus = {state.rank: gpu_of(state.gpu, state.reading) for state in runtime.gpus()}
        return to_json(with_usage(snapshot, gpus))
