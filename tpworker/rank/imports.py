"""What a rank imports, all at once: in its standby, so that a rank that is forked from it has everything.

Nothing of it may start a thread or look for a GPU: CUDA cannot be used in a process that was forked from one
that has. `tests/runtime/test_standby.py` and `tests/gpu/test_standby.py` see to it.
"""

from __future__ import annotations

import contextlib
import importlib

_ON_CUDA = (
    "tpworker.kernels.cuda_operations",
    "tpworker.kernels.symmetric_kernels",
    "tpworker.rank.cuda",
    "tpworker.rank.cuda_collectives",
    "tpworker.rank.compilations",
    "tpworker.rank.kept_device",
)
"""What ranks on GPUs import besides, sooner or later."""


def import_all(device: str) -> None:
    """Imports what ranks on this kind of device need: 'cpu' or 'cuda'."""
    importlib.import_module("tpworker.rank.process")
    if device == "cuda":
        with contextlib.suppress(ImportError):  # a rank will say so itself, where it cannot do without
            for module in _ON_CUDA:
                importlib.import_module(module)
            importlib.import_module("tpworker.rank.compilations").hash_compiler()
