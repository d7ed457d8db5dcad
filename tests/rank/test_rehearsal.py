"""Kernels are compiled ahead, and launched only afterwards."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.absent_gpu import Launcher, needs_triton, pretend

SECONDS = 20


class Mode:
    """Triton's `AsyncCompileMode`, as far as `rehearsal` relies on it."""

    active: Mode | None = None

    def __init__(self, executor: Any) -> None:
        self.executor = executor

    def __enter__(self) -> Mode:
        Mode.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Mode.active = None


class Kernel:
    """Launched as Triton launches: what has not been compiled is, or is given to the mode that is active."""

    def __init__(self, compile: Callable[[], None] = lambda: None) -> None:
        self.launches = 0
        self.compiled_by: list[str] = []
        self.run_when_loaded = lambda *_: None
        self._compile = compile
        self._kept: Any = None

    def __call__(self) -> None:
        kernel = self._kept
        if kernel is None:
            if Mode.active is None:
                kernel = self._kept = self._compile_now()
            else:
                kernel = Mode.active.submit(f"key of {id(self)}", self._compile_now, self._keep)  # type: ignore[attr-defined]
        if hasattr(kernel, "result"):
            kernel = kernel.result()
        metadata = kernel.launch_metadata((1,), 0, "argument")
        kernel.run(1, 1, 1, 0, kernel.function, kernel.packed_metadata, metadata, None, None, "argument")

    def _keep(self, kernel: Any) -> None:
        self._kept = kernel

    def _compile_now(self) -> Any:
        self._compile()
        self.compiled_by.append(threading.current_thread().name)
        return SimpleNamespace(
            launch_metadata=lambda *_: None, function=1, packed_metadata=2, run=self._launch
        )

    def _launch(self, *_: Any) -> None:
        self.launches += 1


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, on a stand-in for Triton."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(AsyncCompileMode=Mode))
    monkeypatch.delitem(sys.modules, "tpworker.rank.rehearsal", raising=False)
    yield importlib.import_module("tpworker.rank.rehearsal")
    del sys.modules["tpworker.rank.rehearsal"]


def test_each_kernel_is_compiled_once_by_another_thread_and_launched_only_afterwards(
    rehearsal: ModuleType,
) -> None:
    kernels = [Kernel() for _ in range(5)]
    adopted: list[str] = []

    def steps() -> None:
        for _ in range(3):
            for kernel in kernels:
                kernel()

    assert rehearsal.rehearse(steps, lambda: adopted.append(threading.current_thread().name)) == 5
    assert [kernel.launches for kernel in kernels] == [0] * 5
    steps()
    assert [kernel.launches for kernel in kernels] == [3] * 5
    compilers = [thread for kernel in kernels for thread in kernel.compiled_by]
    assert len(compilers) == 5
    assert threading.current_thread().name not in compilers
    assert set(compilers) <= set(adopted), "a thread used the device that had not adopted it"


def test_kernels_are_compiled_at_the_same_time(
    rehearsal: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "usable_cores", lambda: 3)
    together = threading.Barrier(3, timeout=SECONDS)
    kernels = [Kernel(lambda: together.wait() and None) for _ in range(3)]
    rehearsal.rehearse(lambda: [kernel() for kernel in kernels], lambda: None)
    assert [len(kernel.compiled_by) for kernel in kernels] == [1, 1, 1]


def test_what_fails_is_compiled_when_it_is_needed(
    rehearsal: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    fails = [True]

    def compile() -> None:
        if fails:
            raise RuntimeError("no space left")

    good, bad = Kernel(), Kernel(compile)

    def steps() -> None:
        good()
        bad()
        raise ValueError("this step cannot be captured")

    rehearsal.rehearse(steps, lambda: None)
    assert "this step cannot be captured" in caplog.text
    assert "no space left" in caplog.text
    with pytest.raises(RuntimeError, match="no space left"):
        bad()
    fails.clear()
    bad()
    good()
    assert (good.launches, bad.launches) == (1, 1)
    assert len(good.compiled_by) == 1


def test_no_kernel_is_lost_when_threads_cannot_be_had(
    rehearsal: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = [Kernel() for _ in range(20)]

    def steps() -> None:
        for kernel in kernels:
            kernel()
            time.sleep(0.01)  # so that the pool is known to be broken before the last of them

    def adopt() -> None:
        raise RuntimeError("the device is gone")

    rehearsal.rehearse(steps, adopt)
    assert "kernels are compiled only when they are needed" in caplog.text
    for kernel in kernels:
        kernel()
    assert [kernel.launches for kernel in kernels] == [1] * len(kernels)


# --------------------------------------------------------------------------------------- with Triton


@needs_triton
def test_triton_compiles_what_the_steps_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU that is not there: kernels of ours, with tensors on the CPU."""
    triton: Any = importlib.import_module("triton")
    from tpworker.kernels import triton_kernels
    from tpworker.rank.rehearsal import rehearse

    hits: list[bool] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pretend(monkeypatch)
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit)
    )

    def steps() -> None:
        for size in (64, 128):
            x = torch.ones(3, size)
            triton_kernels.add_norm(x, None, x[0], 1e-6)
            triton_kernels.silu_mul(x)
            triton_kernels.silu_mul(x[:2])

    assert rehearse(steps, lambda: None) == 4
    assert hits == [False] * 4
    assert Launcher.launched == ()
    steps()
    assert len(hits) == 4, "some kernel was not compiled ahead"
    assert sorted(Launcher.launched) == ["_add_norm"] * 2 + ["_silu_mul"] * 4
