"""Snapshots: what is read off a board, and how it goes through JSON."""

from __future__ import annotations

import json
import os
from contextlib import closing
from typing import Any

import pytest

from tests.observe.boards import MIB, busy_board
from tests.observe.fake_nvml import FakeGpu, FakeNvml
from tpworker.ipc.board import NUM_BUCKETS, Board, Field, Phase
from tpworker.ipc.child import board_names
from tpworker.observe.looking import known_gpus, look, model_name, read_gpus, with_usage
from tpworker.observe.nvml import Nvml
from tpworker.observe.snapshot import Gpu, Rank, Snapshot, from_json, to_json


def buckets(counts: tuple[int, ...]) -> dict[int, int]:
    assert len(counts) == NUM_BUCKETS
    return {bucket: count for bucket, count in enumerate(counts) if count}


def test_what_a_board_says() -> None:
    with closing(busy_board()) as board:
        seen = look(board)
    assert (seen.model, seen.device, seen.max_num_seqs, seen.lookahead) == ("tiny", "cpu", 8, 2)
    whole, scheduler, (first, second) = seen.runtime, seen.scheduler, seen.ranks
    assert (whole.state, whole.running, whole.waiting, whole.finished) == ("ready", 5, 3, 12)
    assert (scheduler.running, scheduler.waiting) == (5, 2)
    assert (scheduler.free_blocks, scheduler.total_blocks) == (60, 100)
    assert (scheduler.gaps, scheduler.gap_seconds) == (90, pytest.approx(450e-6))
    assert (scheduler.publishes, scheduler.publish_seconds) == (1, pytest.approx(30e-6))
    assert buckets(scheduler.publish_buckets) == {5: 1}, "up to 32 µs"
    assert (scheduler.compose_seconds, buckets(scheduler.compose_buckets)) == (pytest.approx(7e-6), {3: 1})
    assert (first.phase, first.received, first.admitted, first.completed) == ("ready", 103, 102, 100)
    assert (first.barriers, first.barrier_seconds) == (100, pytest.approx(200e-6))
    assert (second.barriers, second.barrier_seconds) == (100, pytest.approx(400e-6))
    assert [buckets(rank.barrier_buckets) for rank in seen.ranks] == [{1: 100}, {2: 100}]
    assert (first.last_arrivals, second.last_arrivals) == (100, 0)
    old, new = seen.requests
    assert (old.name, old.number, old.state, old.prompt_tokens, old.output_tokens) == (
        "chatcmpl-old", 7, "running", 128, 40,
    )  # fmt: skip
    assert (new.state, new.output_tokens) == ("waiting", 0)
    assert 12 <= old.age_seconds < 60


def test_a_start() -> None:
    with closing(Board.create(board_names(2))) as board:
        first = board.rows()[1]
        first.enter(Phase.LOADING)
        first[Field.PROGRESS_TOTAL], first[Field.PROGRESS_DONE] = 400, 100
        seen = look(board)
    assert seen.runtime.state == "starting"
    assert [(rank.phase, rank.progress) for rank in seen.ranks] == [("loading", 0.25), ("starting", None)]
    assert seen.scheduler.total_blocks == seen.scheduler.publishes == 0


def test_what_processes_have_used_and_gpus_do() -> None:
    library = FakeNvml([FakeGpu("GPU-b"), FakeGpu("GPU-a", used=7 * MIB, utilization=83)])
    with closing(busy_board(gpus=("GPU-a", "GPU-unknown"))) as board, closing(Nvml(library)) as nvml:
        gpus = read_gpus(nvml, known_gpus(nvml, board.about.gpus))
        assert gpus == {
            0: Gpu(
                uuid="GPU-a", name="NVIDIA H200", utilization=83, memory_used=7 * MIB,
                memory_total=141 << 30, temperature=34, power=75.5,
            )
        }  # fmt: skip
        seen = with_usage(look(board), gpus)
    assert seen.runtime.pid == os.getpid()
    assert (seen.runtime.memory_bytes or 0) > MIB
    assert [rank.gpu for rank in seen.ranks] == [gpus[0], None]
    assert seen.ranks[0].memory_bytes is None, "the process of that pid is no rank"


def test_through_json_and_back() -> None:
    with closing(busy_board()) as board:
        seen = with_usage(look(board), {1: Gpu(uuid="GPU-a", power=7.5)})
    assert from_json(json.loads(json.dumps(to_json(seen)))) == seen


def test_of_another_version_what_is_known_counts() -> None:
    seen = from_json({"model": "m", "new": 1, "ranks": [{"rank": 3, "new": [1]}]})
    assert seen == Snapshot(model="m", ranks=(Rank(rank=3),))


@pytest.mark.parametrize(
    "data", [[], None, "x", {"model": 1}, {"ranks": {}}, {"ranks": [1]}, {"runtime": None}, {"clock": True}]
)
def test_something_else_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="not what tpworker tells"):
        from_json(data)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/models/qwen3-8b/", "qwen3-8b"),
        ("/c/models--zai-org--GLM-4.5-Air/snapshots/0123abcd", "zai-org/GLM-4.5-Air"),
        ("", ""),
    ],
)
def test_what_a_model_is_called(folder: str, name: str) -> None:
    assert model_name(folder) == name
