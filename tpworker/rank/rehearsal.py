"""Kernels compiled side by side, before the steps that launch them. Imports Triton: import it on CUDA only.

The first start on a machine has dozens of kernels to compile. One after the other, each when the first step
comes to it, they took longer than all the rest of a start. So every kind of step is gone through once for its
launches alone:

    this thread    steps, captured and thrown away: nothing runs, and nothing that is ours is launched
    others         a kernel each: compiled, or found in Triton's cache; its launcher made; loaded

Nothing has to be listed for that: what a step launches it launches here, with the same arguments. A kernel
that none of these steps comes to, or that fails here, is compiled when it is needed.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, misc, no-untyped-call"

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import triton

from tpworker.ipc.limits import usable_cores

logger = logging.getLogger(__name__)

_MOST_THREADS = 32  # there are few more kernels, and other ranks compile too


class _Unlaunched:
    """Stands for a kernel that is being compiled, where Triton would launch it."""

    function = packed_metadata = None

    def result(self) -> _Unlaunched:
        return self

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        """Launches nothing."""


class _Rehearsal(triton.AsyncCompileMode):
    """Within it, a kernel that this process has never launched is compiled by the pool, and not launched."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        super().__init__(pool)
        self._kernels: list[tuple[Callable[[Any], None], Future[Any]]] = []

    def submit(self, key: str, compile: Callable[[], Any], keep: Callable[[Any], None], *_: Any) -> Any:
        """Called by Triton; `keep` makes something the kernel of such launches from now on."""
        future = self.executor.submit(_compile_and_load, compile)  # first: if it fails, nothing is kept
        self._kernels.append((keep, future))
        unlaunched = _Unlaunched()
        keep(unlaunched)
        return unlaunched

    def keep(self) -> int:
        """Waits for all kernels; from now on they are launched. Returns how many there are."""
        for keep, future in self._kernels:
            error = future.exception()
            if error is not None:
                logger.warning("a kernel was not compiled ahead: %s", error)
            keep(None if error is not None else future.result())  # None: it has yet to be compiled
        return len(self._kernels)


def _compile_and_load(compile: Callable[[], Any]) -> Any:
    kernel = compile()
    kernel.run  # noqa: B018  # a property, which makes the launcher (in C, on the first start) and loads both
    return kernel


def rehearse(steps: Callable[[], None], adopt_thread: Callable[[], None]) -> int:
    """Compiles what `steps` would launch, and launches nothing that is ours. Returns how many kernels.

    Args:
        steps: must not look at what kernels leave in memory, not even by kernels of torch.
        adopt_thread: of the device; comes first in each thread that compiles.
    """
    collects = gc.isenabled()
    # CPython before 3.11.8 fails to parse in several threads where a collection comes in between (gh-106905).
    gc.disable()
    try:
        with ThreadPoolExecutor(
            min(_MOST_THREADS, usable_cores()), "tpworker-compiler", adopt_thread
        ) as pool:
            rehearsal = _Rehearsal(pool)
            try:
                with rehearsal:
                    steps()
            except Exception as error:
                cause = error.__context__ or error  # a capture that is broken off ends with an error too
                logger.warning("kernels are compiled only when they are needed: %s", cause)
            return rehearsal.keep()
    finally:
        if collects:
            gc.enable()
