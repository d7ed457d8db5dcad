"""Sleep, wake-up and other weights, under the names that vLLM and SGLang have.

They are there only if the server was started with --enable-sleep-mode, --enable-weight-updates: whoever may
send requests may not put the server to sleep for all others, nor have it read folders of its machine, unless
who runs it has said so.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query

from tpworker.errors import ConfigError, InvalidRequest, ModelError, RuntimeStopped
from tpworker.server.front import Front
from tpworker.server.requests.weights import WeightUpdate
from tpworker.server.shapes import GUARDED, Done, IsSleeping, Updated, documented


def add_sleeping(app: FastAPI, front: Front) -> None:
    """Adds the routes of --enable-sleep-mode."""
    runtime = front.runtime

    @app.post("/sleep", responses=documented(*GUARDED, ok=Done))
    async def sleep(
        level: Annotated[int, Query()] = 1, mode: Annotated[Literal["keep", "abort"], Query()] = "keep"
    ) -> dict[str, bool]:
        """Ends the processes and gives back the memory of weights and KV cache; weights are read from their
        files again. Open requests wait until the server is woken up (`mode=keep`), or end (`abort`); new ones
        are refused with 503 and the code `sleeping`."""
        await runtime.sleep(level, abort=mode == "abort")
        return {"success": True}

    @app.post("/wake_up", responses=documented(*GUARDED, ok=Done))
    async def wake_up(tags: Annotated[list[str] | None, Query()] = None) -> dict[str, bool]:
        """Starts the processes again, when both tags, `weights` and `kv_cache`, have been named, or without a
        tag. Requests are taken when it answers."""
        try:
            await runtime.wake_up(tags or None)
        except (ConfigError, ModelError) as error:
            raise RuntimeStopped(f"the server sleeps on: {error}") from error
        return {"success": True}

    @app.get("/is_sleeping", responses=documented(*GUARDED, ok=IsSleeping))
    async def is_sleeping() -> dict[str, bool]:
        """Whether it does."""
        return {"is_sleeping": runtime.is_sleeping}


def add_weight_updates(app: FastAPI, front: Front) -> None:
    """Adds the route of --enable-weight-updates."""
    runtime = front.runtime

    @app.post("/update_weights_from_disk", responses=documented(*GUARDED, ok=Updated))
    async def update_weights_from_disk(body: WeightUpdate) -> dict[str, Any]:
        """Serves the weights of another checkpoint of the same model, in a folder of the server's machine.
        Requests wait meanwhile, and go on with these weights; nothing of the old ones is left. If the folder
        is not good, the old weights serve on."""
        num_open = runtime.stats().open
        try:
            number = await runtime.update_weights(body.model_path, abort=body.abort_all_requests is True)
        except (ConfigError, ModelError) as error:
            raise InvalidRequest(str(error), "model_path") from error
        message = f"the weights of {body.model_path} are served; their number is {number}"
        return {"success": True, "message": message, "num_paused_requests": num_open}
