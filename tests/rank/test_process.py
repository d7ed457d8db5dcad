"""From the boot message to the loop: what a rank offers, and what it refuses."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import TINY_CONFIG
from tests.model.helpers import SPEC
from tpworker.errors import ConfigError
from tpworker.ipc.board import Board, Field
from tpworker.ipc.child import board_names
from tpworker.ipc.messages import Allocate, Message, RankLoaded
from tpworker.model.kv_cache import KVCache
from tpworker.model.tp import Shard
from tpworker.rank import process
from tpworker.rank.kept import HostMemory
from tpworker.rank.process import agree_on_cache, in_thread, load_shard, prepare

CPU = torch.device("cpu")
BLOCK_BYTES = KVCache.bytes_per_block(SPEC, Shard.of(SPEC, 0, 1), 16, torch.float32)


class Wire:
    """The scheduler's end: takes the offer, allocates it."""

    def __init__(self, answer: int | None = None) -> None:
        self.offers: list[int] = []
        self.kept: list[bool] = []
        self.answer = answer

    def send(self, message: Message) -> None:
        assert isinstance(message, RankLoaded)
        self.offers.append(message.max_kv_blocks)
        self.kept.append(message.has_kept)

    def receive(self, timeout: float) -> Message:
        return Allocate(0, self.answer or self.offers[-1])


STEP = 48
"""Bytes that a step takes for each of its tokens."""


def agree(wire: Wire, free_bytes: int, kept: HostMemory | None = None, **changes: Any) -> KVCache:
    fields = {
        "num_kv_blocks": 0, "gpu_memory_utilization": 0.5, "max_num_seqs": 4, "max_model_len": 64,
        "block_size": 16, "start_timeout": 1.0, "max_num_batched_tokens": 100, **changes,
    }  # fmt: skip
    boot: Any = SimpleNamespace(generation=0, rank=0, num_ranks=1, settings=SimpleNamespace(**fields))
    weights = SimpleNamespace(mtp=None)
    decoder: Any = SimpleNamespace(
        spec=SPEC,
        shard=Shard.of(SPEC, 0, 1),
        weights=weights,
        step_bytes=lambda num_tokens: STEP * num_tokens,
    )
    free = free_bytes + 100 * STEP  # free_bytes: beyond what a step of 100 tokens takes
    device: Any = SimpleNamespace(torch_device=CPU, free_bytes=lambda num_ranks: free)
    plans: Any = wire
    if kept is not None:
        return agree_on_cache(boot, plans, decoder, torch.float32, device, kept)
    fd = os.memfd_create("tpworker-kept")
    try:
        return agree_on_cache(boot, plans, decoder, torch.float32, device, HostMemory(fd))
    finally:
        os.close(fd)


def test_the_offer_is_what_fits_into_its_share_of_the_free_memory() -> None:
    wire = Wire()
    assert agree(wire, free_bytes=2 * 7 * BLOCK_BYTES).num_blocks == 7
    assert agree(wire, free_bytes=2 * 7 * BLOCK_BYTES - 1).num_blocks == 6
    assert agree(wire, free_bytes=2 * 7 * BLOCK_BYTES, max_num_batched_tokens=101).num_blocks == 6
    assert wire.offers == [7, 6, 6]


def test_no_more_is_offered_than_all_slots_could_use() -> None:
    wire = Wire()
    agree(wire, free_bytes=2**40)
    assert wire.offers == [4 * 4 + 1]


def test_the_number_that_was_asked_for_is_offered_whatever_is_free() -> None:
    wire = Wire()
    agree(wire, free_bytes=0, num_kv_blocks=9)
    assert wire.offers == [9]


def test_what_all_agreed_on_is_allocated() -> None:
    assert agree(Wire(answer=5), free_bytes=2**40).num_blocks == 5


def test_keys_and_values_that_an_earlier_process_left_are_taken_whatever_is_free() -> None:
    fd, wire = os.memfd_create("tpworker-kept"), Wire()
    cache = agree(wire, 2 * 7 * BLOCK_BYTES, HostMemory(fd))
    assert not cache.keys[0].any()
    cache.keys[1][6, 3] = 5.0
    cache.values[0][2] = 7.0
    agree(wire, 0, HostMemory(fd))
    again = agree(wire, 0, HostMemory(fd), num_kv_blocks=7)  # as the runtime asks for after a restart
    assert (wire.offers, wire.kept) == ([7, 7, 7], [False, True, True])
    assert again.keys[1].data_ptr() != cache.keys[1].data_ptr()
    for one, other in zip((*again.keys, *again.values), (*cache.keys, *cache.values), strict=True):
        assert torch.equal(one, other)
    os.close(fd)


@pytest.mark.parametrize("change", [{"block_size": 8}, {"num_kv_blocks": 6}])
def test_a_cache_of_another_layout_is_not_taken(change: dict[str, Any]) -> None:
    fd, wire = os.memfd_create("tpworker-kept"), Wire()
    agree(wire, 2 * 7 * BLOCK_BYTES, HostMemory(fd)).keys[0].fill_(1.0)
    cache = agree(wire, 2 * 4 * BLOCK_BYTES, HostMemory(fd), **change)
    assert wire.kept == [False, False]
    assert not any(tensor.any() for tensor in (*cache.keys, *cache.values))
    os.close(fd)


def test_a_cache_is_made_anew_if_another_number_is_agreed_on() -> None:
    fd = os.memfd_create("tpworker-kept")
    agree(Wire(), 2 * 7 * BLOCK_BYTES, HostMemory(fd)).keys[0].fill_(1.0)
    wire = Wire(answer=5)
    cache = agree(wire, 0, HostMemory(fd))
    assert (wire.offers, wire.kept, cache.num_blocks) == ([7], [True], 5)
    assert not any(tensor.any() for tensor in (*cache.keys, *cache.values))
    assert agree(wire, 0, HostMemory(fd)).num_blocks == 5
    assert (wire.offers[-1], wire.kept[-1]) == (5, True)
    os.close(fd)


@pytest.mark.parametrize("blocks", [0, 1])
def test_no_memory_is_said_with_the_remedy(blocks: int) -> None:
    wire = Wire()
    with pytest.raises(ConfigError, match=r"no memory for the KV cache .* --gpu-memory-utilization"):
        agree(wire, free_bytes=2 * blocks * BLOCK_BYTES)
    assert not wire.offers


def room(free: int, held: int, num_ranks: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board.create(board_names(num_ranks))
    try:
        board.row("tpworker-rank0")[Field.WEIGHTS] = held
        monkeypatch.setattr(process, "available_bytes", lambda: free)
        boot: Any = SimpleNamespace(board_fd=board.fd, rank=num_ranks - 1, num_ranks=num_ranks)
        device: Any = SimpleNamespace(torch_device=CPU)
        process.check_room(boot, device, wanted)
    finally:
        board.close()


def test_weights_without_room_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"take 3\.00 GiB, and 2\.00 GiB are available for each of 2 ranks"):
        room(4 << 30, 0, 2, 3 << 30, monkeypatch)
    room(4 << 30, 0, 2, 2 << 30, monkeypatch)
    room(2 << 30, 2 << 30, 2, 2 << 30, monkeypatch)  # rank 0 has its weights already
    boot: Any = SimpleNamespace(rank=1, num_ranks=2)
    device: Any = SimpleNamespace(torch_device=torch.device("cuda", 1), free_bytes=lambda num_ranks: 5 << 30)
    process.check_room(boot, device, 5 << 30)
    with pytest.raises(ConfigError, match=r"6\.00 GiB, and 5\.00 GiB are free on GPU 1: take more TP ranks"):
        process.check_room(boot, device, 6 << 30)


def test_what_is_done_in_a_thread_comes_back() -> None:
    here = threading.current_thread()
    assert in_thread(threading.current_thread).result(10) is not here
    with pytest.raises(KeyError, match="nobody"):
        in_thread(lambda: {}["nobody"]).result(10)


@pytest.mark.parametrize(
    ("generation", "prepared"),
    [(0, ["WARMING_UP", "prepare 77", "CAPTURING"]), (3, ["WARMING_UP", "prepare_late 77"])],
)
def test_graphs_are_captured_beforehand_at_the_first_start_alone(
    generation: int, prepared: list[str]
) -> None:
    events: list[str] = []

    class Prepared:
        def prepare(self, max_tokens: int, capturing: Callable[[], None]) -> None:
            events.append(f"prepare {max_tokens}")
            capturing()

        def prepare_late(self, max_tokens: int) -> None:
            events.append(f"prepare_late {max_tokens}")

    boot: Any = SimpleNamespace(generation=generation, settings=SimpleNamespace(max_num_batched_tokens=77))
    row: Any = SimpleNamespace(enter=lambda phase: events.append(phase.name))
    runner: Any = Prepared()
    prepare(boot, runner, row)
    assert events == prepared


@pytest.mark.parametrize(
    ("quantization", "kv_cache_dtype", "words"),
    [
        ("fp8", "auto", r"^weights in FP8: A100 \(compute capability 8\.0\).*8\.9 or later does: take a"),
        (None, "fp8", r"^kv_cache_dtype=fp8: A100 \(compute capability 8\.0\).*: leave the option out"),
    ],
)  # fmt: skip
def test_a_gpu_that_knows_no_fp8_is_refused_before_anything_is_loaded(
    quantization: str | None, kv_cache_dtype: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    settings = SimpleNamespace(quantization=quantization, kv_cache_dtype=kv_cache_dtype)
    boot: Any = SimpleNamespace(model=str(tmp_path), settings=settings)
    device: Any = SimpleNamespace(torch_device=torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=words):
        load_shard(boot, device, *[None] * 2)  # type: ignore[list-item]  # it comes to neither
