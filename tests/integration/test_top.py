"""`tpworker bench` measures a real server while `tpworker top` looks at it, and a rank is lost on the way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.benchmarks.test_benchmarks import spelling_model
from tests.conftest import eventually
from tests.integration.conftest import Server
from tpworker import cli
from tpworker.observe.attach import running
from tpworker.observe.snapshot import Snapshot
from tpworker.top.rates import History, Rates
from tpworker.top.sources import Absent, BoardSource, Source, UrlSource

STATES = ["running"] * 4 + ["waiting"] * 2

pytestmark = pytest.mark.timeout(240)


def until(source: Source, condition: Callable[[Snapshot], bool]) -> Snapshot:
    """The first snapshot that fulfils a condition; meanwhile there may be none."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(Absent):
            if condition(seen := source.read()):
                return seen
        time.sleep(0.02)
    raise AssertionError("it does not come to that")


def is_busy(seen: Snapshot) -> bool:
    """Whether all requests are told of, in their list and in the counts, which are two reads."""
    states = sorted(one.state for one in seen.requests)
    return states == STATES and (seen.scheduler.running, seen.scheduler.waiting) == (4, 2)


def test_a_server_is_measured_and_looked_at(start_server: Callable[..., Server], tmp_path: Path) -> None:
    model, file = spelling_model(tmp_path / "model"), tmp_path / "bench.json"
    small = "--max-num-seqs", "4", "--max-model-len", "1024"
    server = start_server("--model", str(model), "--load-format", "dummy", "--device", "cpu", *small)
    pids = {name: process.pid for name, process in server.children().items()}
    words = (
        "--concurrency 6 --num-requests 8 --warmup 2 --prompt-len 40 --output-len 300 --ignore-eos "
        f"--json {file}"
    ).split()
    by_url = UrlSource(server.url)
    with closing(BoardSource(pids["tpworker-rank1"])) as by_pid, ThreadPoolExecutor() as threads:
        assert by_pid.pid == server.process.pid, "it looks at a rank's descriptors, not at the runtime's"
        assert server.process.pid in [pid for pid, _ in running()]
        idle = until(by_pid, lambda seen: seen.runtime.state == "ready")
        assert (idle.model, idle.runtime.restarts, idle.requests) == ("model", 0, ())
        assert [rank.phase for rank in idle.ranks] == ["ready", "ready"]
        assert [process.pid for process in (idle.scheduler, *idle.ranks)] == [
            pids["tpworker-scheduler"], pids["tpworker-rank0"], pids["tpworker-rank1"],
        ]  # fmt: skip
        assert all(process.memory_bytes for process in (idle.runtime, idle.scheduler, *idle.ranks))
        history = History()
        history.add(idle)
        measuring = threads.submit(cli.main, ["bench", server.url, *words])
        busy = until(by_pid, is_busy)
        assert busy.scheduler.free_blocks < busy.scheduler.total_blocks
        enough = busy.scheduler.output_tokens + 200  # of few steps shares are no shares
        later = until(by_url, lambda seen: seen.scheduler.output_tokens > enough)
        rates: Rates = history.add(later)
        assert (rates.steps or 0) > 0
        assert (rates.output_tokens or 0) > 0
        assert rates.gap_seconds is not None
        assert rates.skew_seconds is not None
        assert 0.5 < sum(rank.last_share or 0 for rank in rates.ranks) < 1.5  # not read at one instant
        os.kill(pids["tpworker-rank1"], 9)
        for source in (by_pid, by_url):
            again = until(source, lambda seen: seen.runtime.resumed > 0 and seen.runtime.state == "ready")
            assert (again.runtime.restarts, again.generation) == (1, 1)
            assert again.ranks[1].pid != pids["tpworker-rank1"]
        assert measuring.result(120) == 0
        eventually(lambda: by_pid.read().runtime.finished == 1 + 2 + 8)  # one to find out what it takes
        done = until(by_pid, lambda seen: not seen.requests)
        assert (done.scheduler.running, done.scheduler.waiting, done.runtime.running) == (0, 0, 0)
        assert done.scheduler.free_blocks == done.scheduler.total_blocks
    (level,) = json.loads(file.read_text())["levels"]
    assert (level["num_requests"], level["errors"]) == (8, {})
    assert (level["num_prompt"], level["num_output"]) == (8 * 40, 8 * 300)
