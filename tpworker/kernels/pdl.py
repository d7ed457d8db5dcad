"""Programmatic dependent launch: a kernel begins while the one before it in the stream still runs.

On Hopper and later a kernel launched so may start as soon as every program of the kernel before it has called
`start_next` or ended. What it does then must not depend on that kernel: it asks for weights. `wait` returns
when the kernel before has ended as a whole and its writes can be seen. Between short kernels this hides
launches, and the memory is busy where only latency would pass.

What keeps it right, whatever the kernels around are:

- Every program of a kernel launched so calls `wait` before it reads what another kernel has written and
  before it writes anything, and at least one program does call it. So when a kernel has ended, all before it
  have, and `wait` waits for all of them. What was written before the kernel before may be read at once where
  all programs of that one wait before they call `start_next`.
- What was written before a kernel that is launched plainly may be read at once by all after it.
- Kernels of others are launched plainly: they start when all before them has ended. Should one let ours start
  early, then `wait` waits for its end.

Stream capture keeps the relation: it becomes a programmatic edge of the CUDA graph.

Imports Triton: import it on CUDA only.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

ENABLED = True
"""False launches everything plainly."""


def options() -> dict[str, Any]:
    """What a kernel with a parameter PDL is launched with, besides its own arguments."""
    if ENABLED and is_supported():
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def is_supported() -> bool:
    """Whether this machine's GPUs can. (Triton's interpreter cannot.)"""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@triton.jit
def start_next(PDL: tl.constexpr):
    """The kernel after this one may start, once all programs of this one have said so."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until all kernels before this one have ended; then what they wrote can be read, and memory written."""
    if PDL:
        tl.extra.cuda.gdc_wait()
