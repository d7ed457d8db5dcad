"""What SGLang's router asks of a server: the model's name, how large the group is, how busy."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from tpworker.server.front import Front
from tpworker.server.shapes import TELLS, LoadOfRank, ModelInfo, ServerInfo, documented
from tpworker.version import version


def add_sglang(app: FastAPI, front: Front) -> None:
    """Adds the routes, each under the name that it had before, too."""
    runtime = front.runtime

    @app.get("/model_info", responses=documented(*TELLS, ok=ModelInfo))
    @app.get("/get_model_info", responses=documented(*TELLS, ok=ModelInfo), include_in_schema=False)
    async def model_info() -> dict[str, Any]:
        """Where the model lies, and of what kind it is."""
        folder = str(runtime.model_folder)
        return {
            "model_path": folder,
            "tokenizer_path": folder,
            "is_generation": True,
            "preferred_sampling_params": None,
            "model_type": runtime.spec.model_type,
            "architectures": [runtime.spec.architecture],
        }

    @app.get("/server_info", responses=documented(*TELLS, ok=ServerInfo))
    @app.get("/get_server_info", responses=documented(*TELLS, ok=ServerInfo), include_in_schema=False)
    async def server_info() -> dict[str, Any]:
        """What is served, by how many ranks, and how much of it at once."""
        folder = str(runtime.model_folder)
        return {
            "model_path": folder,
            "tokenizer_path": folder,
            "served_model_name": front.model_names[0],
            "tp_size": runtime.config.tensor_parallel_size,
            "dp_size": 1,
            "context_length": runtime.max_model_len,
            "max_running_requests": runtime.max_num_seqs,
            "max_total_num_tokens": runtime.stats().total_blocks * runtime.config.block_size,
            "device": runtime.device,
            "dtype": runtime.dtype,
            "quantization": runtime.quantization or None,
            "version": version(),
        }

    @app.get("/get_load", responses=documented(*TELLS, ok=list[LoadOfRank]))
    async def load() -> list[dict[str, int]]:
        """How many requests there are, and how many tokens their KV blocks can hold: of one group."""
        stats = runtime.stats()
        used = stats.total_blocks - stats.free_blocks
        return [
            {
                "dp_rank": 0,
                "num_reqs": stats.running + stats.waiting,
                "num_waiting_reqs": stats.waiting,
                "num_tokens": used * runtime.config.block_size,
            }
        ]
