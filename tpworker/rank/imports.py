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
    "tpworker.rank.rehearsal",
    "tpworker.kernels.split_kernel",
    "tpworker.kernels.few_rows_kernel",
    "tpworker.kernels.ring_kernel",
    "flash_attn_interface",
)
"""What ranks on GPUs import besides, sooner or later; some of it another Triton may not have."""


def import_all(device: str) -> None:
    """Imports what ranks on this kind of device need: 'cpu' or 'cuda'."""
    importlib.import_module("tpworker.rank.process")
    if device == "cuda":
        for module in _ON_CUDA:
            with contextlib.suppress(Exception):  # a rank will say so itself, where it cannot do without
                importlib.import_module(module)
        from tpworker.rank.compilations import hash_compiler, hash_kernels

        hash_compiler()
        hash_kernels()
