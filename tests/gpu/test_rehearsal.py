"""A first start: all kernels of a runner are compiled before its first step, by other threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from tests.model.helpers import tiny_model
from tpworker.checkpoint.weights import load_weights
from tpworker.model.decoder import Decoder
from tpworker.model.families import read_spec
from tpworker.model.kv_cache import KVCache
from tpworker.model.tp import Shard
from tpworker.rank.collectives import SoleRank
from tpworker.rank.cuda import CudaDevice
from tpworker.rank.runner import Runner
from tpworker.rank.slots import SlotTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of sizes that no other test has: what Triton has compiled stays in this process."""
    config = Qwen3Config(
        vocab_size=677,
        hidden_size=576,
        intermediate_size=832,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
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
    spec = read_spec(folder)
    shard = Shard.of(spec, 0, 1)
    with torch.inference_mode():
        weights = load_weights(folder, spec, shard, torch.bfloat16, device.torch_device)
        decoder = Decoder(spec, weights, shard, SoleRank(), 512)
        cache = KVCache(spec, shard, 12 * 32 + 1, 16, torch.bfloat16, device.torch_device)
        runner = Runner(decoder, cache, SlotTable(12, 32, device.torch_device), device, SoleRank(), 4)
        for keys in cache.keys:
            keys.fill_(1.0)
    torch.cuda.synchronize()
    device.compile_ahead(lambda: runner._rehearse(64))
    assert all((keys == 1.0).all() for keys in cache.keys), "a kernel ran"
    assert len({name for name, _ in compiled}) > 5
    runner.prepare(64)
    here = [name for name, thread in compiled if not thread.startswith("tpworker-compiler")]
    assert here == []
