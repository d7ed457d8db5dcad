"""tpworker: a multi-process tensor-parallel worker runtime for LLM decoding.

    from tpworker import Runtime, SamplingParams

    async with Runtime(model, tensor_parallel_size=4) as runtime:
        async for output in runtime.generate("Once upon a time", SamplingParams(max_tokens=50)):
            print(output.text, end="")

Everything a user needs is importable from here. It is imported on first use, so that `import tpworker` is
quick; none of it imports torch, transformers, or what the HTTP server needs.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 11):  # noqa: UP036  # whoever has an older one shall be told, not find out
    _found = ".".join(map(str, sys.version_info[:3]))
    raise ImportError(
        f"tpworker needs Python 3.11 or later, and this is {_found}: run it with a newer one",
        name="tpworker",  # so that `python -m tpworker` says it in one line
    )

if TYPE_CHECKING:
    from tpworker.config import RuntimeConfig
    from tpworker.errors import (
        ConfigError,
        InvalidRequest,
        ModelError,
        PromptTooLong,
        QueueFull,
        RequestError,
        RequestFailed,
        RuntimeFailed,
        RuntimeSleeping,
        RuntimeStopped,
        TpworkerError,
    )
    from tpworker.kv_events_config import KvEventsConfig
    from tpworker.outputs import (
        Completion,
        Health,
        Listener,
        RequestOutput,
        RequestRecord,
        RuntimeEvent,
        Stats,
        StepRecord,
        TokenLogprobs,
        TraceSummary,
    )
    from tpworker.runtime.runtime import Runtime
    from tpworker.runtime.sync import SyncRuntime
    from tpworker.sampling_params import SamplingParams
    from tpworker.structured_outputs import StructuredOutputs, Thinking

__all__ = [
    "Completion",
    "ConfigError",
    "Health",
    "InvalidRequest",
    "KvEventsConfig",
    "Listener",
    "ModelError",
    "PromptTooLong",
    "QueueFull",
    "RequestError",
    "RequestFailed",
    "RequestOutput",
    "RequestRecord",
    "Runtime",
    "RuntimeConfig",
    "RuntimeEvent",
    "RuntimeFailed",
    "RuntimeSleeping",
    "RuntimeStopped",
    "SamplingParams",
    "Stats",
    "StepRecord",
    "StructuredOutputs",
    "SyncRuntime",
    "Thinking",
    "TokenLogprobs",
    "TpworkerError",
    "TraceSummary",
]

_MODULES = {
    "tpworker.config": ["RuntimeConfig"],
    "tpworker.sampling_params": ["SamplingParams"],
    "tpworker.kv_events_config": ["KvEventsConfig"],
    "tpworker.structured_outputs": ["StructuredOutputs", "Thinking"],
    "tpworker.outputs": [
        "Completion",
        "Health",
        "Listener",
        "RequestOutput",
        "RequestRecord",
        "RuntimeEvent",
        "Stats",
        "StepRecord",
        "TokenLogprobs",
        "TraceSummary",
    ],
    "tpworker.runtime.runtime": ["Runtime"],
    "tpworker.runtime.sync": ["SyncRuntime"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from tpworker.version import version

        return version()
    if name not in __all__:
        raise AttributeError(f"module 'tpworker' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF.get(name, "tpworker.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
