"""Collectives of CUDA ranks, one process a GPU: their kernels against references, and under stress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tpworker.observe.gpus import count_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus() < 2, reason="2 GPUs are needed"),
]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 100
"""20 where the GPUs are free. Where they are shared, a rank often waits for a peer that is not running."""
CHECKS = ("sums", "nothing", "lookups", "winners", "replays", "replays, early starts")


def run_ranks(size: int, *checks: str) -> list[dict[str, Any]]:
    """What each rank found. A rank whose peer died would spin for ever: all are killed in the end."""
    fd = os.memfd_create("store")
    processes = []
    try:
        for rank in range(size):
            job = json.dumps({"checks": checks, "store_fd": fd, "rank": rank, "size": size})
            command = [sys.executable, "-m", "tests.children.collectives_rank", job]
            processes.append(subprocess.Popen(command, cwd=ROOT, pass_fds=[fd], stdout=subprocess.PIPE))
        answers = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        os.close(fd)
    assert [process.returncode for process in processes] == [0] * size
    return [json.loads(answer) for answer in answers]


@pytest.fixture(scope="module", params=[2, 4, 8])
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Of each rank, all checks: starting the ranks takes longer than the checks."""
    if count_gpus() < request.param:
        pytest.skip(f"{request.param} GPUs are needed")
    return run_ranks(request.param, *CHECKS)


def test_sums_with_and_without_the_norm(found: list[dict[str, Any]]) -> None:
    for rank in found:
        result = rank["sums"]
        assert result["cases"] == 48
        assert result["not alike"] == []
        assert result["inexact"] == []
        assert result["error"] < 5e-3
        assert result["unlike NCCL"] == []


def test_no_rows_at_all(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["nothing"] == {"shapes": [[0, 1024], [0, 1024], [0]]}


def test_rows_of_a_table_that_is_split(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["lookups"] == {"cases": 24, "wrong": []}


def test_the_best_token_of_all_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["winners"] == {"cases": 21, "wrong": [], "not alike": []}


@pytest.mark.parametrize("how", ["", ", early starts"])
def test_thousands_of_replays_with_ranks_that_dawdle(found: list[dict[str, Any]], how: str) -> None:
    for rank in found:
        assert rank[f"replays{how}"]["steps"] > 3000
        assert rank[f"replays{how}"]["wrong"] == 0
