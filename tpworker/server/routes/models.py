"""/v1/models."""

from __future__ import annotations

import time

from fastapi import FastAPI

from tpworker.server.front import Front
from tpworker.server.shapes import TELLS, Model, Models, documented


def add_models(app: FastAPI, front: Front) -> None:
    """Adds it."""
    created = int(time.time())

    def entry(name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "tpworker",
            "root": front.runtime.served_name,
            "parent": None,
            "max_model_len": front.runtime.max_model_len,
        }

    @app.get("/v1/models", responses=documented(*TELLS, ok=Models))
    async def models() -> dict[str, object]:
        """The one model that is served, under all of its names."""
        return {"object": "list", "data": [entry(name) for name in front.model_names]}

    @app.get("/v1/models/{model:path}", responses=documented(*TELLS, ok=Model))
    async def model(model: str) -> dict[str, object]:
        """The model, if this is one of its names."""
        front.check_model(model)
        return entry(model)
