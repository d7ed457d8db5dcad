"""A first start: all kernels of a runner are compiled before its first step, by other threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from tests.gpu.runners import TINY, cuda_runners
from tests.model.helpers import tiny_model
from tpworker.rank.cuda import CudaDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of sizes that no other test has: what Triton has compiled stays in this process."""
    sizes = {"vocab_size": 677, "hidden_size": 576, "intermediate_size": 832}
    config = Qwen3Config(**TINY, **sizes, num_hidden_layers=4, num_attention_heads=6)
    tiny_model(tmp_path, config, torch.bfloat16)
    return tmp_path


def test_no_step_waits_for_the_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[tuple[str, str]] = []

    def note(*, src: Any, **_: Any) -> None:
        compiled.append((src.name, threading.current_thread().name))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "kernels"))
    monkeypatch.setattr(triton.knobs.compilation, "listener", note)
    device = CudaDevice(0)
    (runner,) = cuda_runners(folder, device)
    cache = runner._cache
    with torch.inference_mode():
        for keys in cache.keys:
            keys.fill_(1.0)
    torch.cuda.synchronize()
    device.compile_ahead(lambda: runner.steps.rehearse(64))
    assert all((keys == 1.0).all() for keys in cache.keys), "a kernel ran"
    assert len({name for name, _ in compiled}) > 5
    runner.prepare(64)
    here = [name for name, thread in compiled if not thread.startswith("tpworker-compiler")]
    assert here == []
