"""A Hopper GPU that is not there, for which Triton compiles; nothing is launched."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="Triton is not installed, or there is a GPU: tests/gpu runs the kernels themselves",
)


class Launcher:
    """Stands for what Triton launches kernels with."""

    launched: tuple[str, ...] = ()

    def __init__(self, source: Any, metadata: Any) -> None:
        self._name = source.name

    def __call__(self, *_: Any) -> None:
        Launcher.launched += (self._name,)


class Driver:
    """A GPU of compute capability 9.0, as Triton sees it."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 232448},
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds such a GPU; what it would launch is noted in `Launcher.launched`."""
    triton: Any = importlib.import_module("triton")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(Launcher, "launched", ())
