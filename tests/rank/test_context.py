"""A context that is made before torch is there. The driver is a fake: what it is asked, in which order."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tpworker.rank import context


def driver(calls: list[tuple[str, int]], fails: str = "") -> Any:
    def function(name: str, what: int) -> Any:
        def call(*arguments: Any) -> int:
            value = arguments[what]
            calls.append((name, getattr(value, "value", value)))
            if name == "cuDeviceGet":
                arguments[0]._obj.value = 40 + arguments[1]
            return 100 if name == fails else 0

        return call

    what = {"cuInit": 0, "cuDeviceGet": 1, "cuDevicePrimaryCtxRetain": 1}
    return SimpleNamespace(**{name: function(name, number) for name, number in what.items()})


def test_the_primary_context_of_the_ranks_gpu_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver(calls))
    context.open_early(3).join()
    assert calls == [("cuInit", 0), ("cuDeviceGet", 3), ("cuDevicePrimaryCtxRetain", 43)]


@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_what_goes_wrong_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver(calls, fails))
    assert not context._retain(0)
    assert calls[-1][0] == fails, "nothing more is asked"


def test_without_a_driver_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_LIBRARY", "libcuda-of-no-machine.so.1")
    context.open_early(0).join()
    assert not context._retain(0)


def test_it_imports_no_torch() -> None:
    program = "import sys, tpworker.rank.context; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_gpus_of_another_launchers_ranks_are_shown_in_rank_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    context.show_gpus(())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    context.show_gpus(("GPU-b", "GPU-a"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
