"""The body of POST /update_weights_from_disk, as SGLang has it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from tpworker.server.requests.fields import Body
from tpworker.server.requests.unsupported import Neutral


class WeightUpdate(Body):
    """Which weights are to be served."""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)]
    abort_all_requests: bool | None = None
    unsupported: ClassVar[Neutral] = {
        "flush_cache": (True,),
        "load_format": ("auto", "safetensors"),
        "keep_pause": (False,),
    }
    accepted: ClassVar[frozenset[str]] = frozenset(
        {"is_async", "torch_empty_cache", "recapture_cuda_graph", "token_step"}
    )
