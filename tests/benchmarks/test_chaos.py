"""The soak, short, on a real server; and its judge, which must see what is wrong."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="the openai package is not installed: scripts/setup --dev has it")

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.judge import NEAR, Verdict, difference, pauses, wrong_answers
from benchmarks.chaos.load import Answer, Case
from benchmarks.chaos.log import Recovery, recoveries, without_reason
from benchmarks.chaos.quiet import Quiet, leaks, shared_memory

RIGHT = Answer({0: "text"}, {0: "length"}, (3, 2), {0: [("te", -0.5), ("xt", -1.0)]})
CASE = Case("one", {"temperature": 0, "extra_body": {"ignore_eos": True}})
ENDS_ITSELF = Case("stop", {"temperature": 0, "extra_body": {}})
METRICS = {"free_kv_blocks": 9.0, "kv_blocks": 9.0, "open_requests": 0.0, "running_requests": 0.0}
QUIET = Quiet(
    {"server": 40, "rank-standby": 9}, (3, 4096), 12, 1 << 30, ("rank0", "scheduler"),
    {f"tpworker_{name}": value for name, value in {**METRICS, "waiting_requests": 0.0}.items()},
)  # fmt: skip
GPU = "tpworker_gpu_memory_used_bytes"


def test_a_short_soak(tmp_path: Path) -> None:
    """Ranks, the scheduler and what they are forked from are lost; every answer is the right one."""
    command = [sys.executable, "-m", "benchmarks", "chaos", "--json", str(tmp_path / "verdict.json")]
    command += ["--seconds", "15", "--faults-every", "2", "--kinds", "kill", "slow", "--seed", "4"]
    done = subprocess.run(
        [*command, "--clients", "4", "--tokens", "24"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads((tmp_path / "verdict.json").read_text())["verdict"]
    kinds = {name.split()[0] for name in verdict["faults"]}
    assert kinds == {"kill", "slow"}
    assert sum(count for name, count in verdict["faults"].items() if name.startswith("kill")) >= 3
    assert verdict["recoveries"]["count"] >= 1
    assert verdict["num_answers"] > 0


@pytest.mark.parametrize(
    "answer",
    [
        replace(RIGHT, texts={0: "text text"}),
        replace(RIGHT, texts={0: "tex"}),
        replace(RIGHT, ends={}),
        replace(RIGHT, ends={0: "stop"}),
        replace(RIGHT, ends={0: "length", 1: "length"}),
        replace(RIGHT, usage=None),
        replace(RIGHT, usage=(3, 5)),
        replace(RIGHT, tokens={}),
        replace(RIGHT, tokens={0: [("te", -0.5)]}),
        replace(RIGHT, tokens={0: [("te", -0.5), ("xt", -1.3)]}),
        replace(RIGHT, error="APIError: gone"),
    ],
)
@pytest.mark.parametrize("is_exact", [True, False])
def test_a_wrong_answer_is_seen(answer: Answer, is_exact: bool) -> None:
    answers = [(CASE, True, RIGHT), (CASE, True, answer)]
    assert [len(wrong_answers(answers, {CASE: RIGHT}, is_exact)[0])] == [1]
    assert wrong_answers(answers[:1], {CASE: RIGHT}, is_exact) == ([], 0)


def test_an_answer_is_near_where_two_tokens_are_about_as_likely() -> None:
    other = replace(RIGHT, texts={0: "test"}, tokens={0: [("te", -0.51), ("st", -1.05)]})
    assert difference(CASE, other, RIGHT, is_exact=False) == NEAR
    assert wrong_answers([(CASE, True, other)], {CASE: RIGHT}, is_exact=False) == ([], 1)
    assert "logprob" in difference(CASE, other, RIGHT, is_exact=True)
    unlikely = replace(other, tokens={0: [("te", -0.51), ("st", -3.0)]})
    assert "instead of 'xt'" in difference(CASE, unlikely, RIGHT, is_exact=False)
    sampled = Case("seeded", {"temperature": 1, "extra_body": {"ignore_eos": True}})
    assert difference(sampled, unlikely, RIGHT, is_exact=False) == NEAR
    elsewhere = replace(
        other, tokens={0: [("te", -0.8), ("st", -1.0)]}
    )  # what stood before it was read wrongly
    assert "logprob of 'te'" in difference(sampled, elsewhere, RIGHT, is_exact=False)


def test_another_text_may_end_otherwise_but_where_the_length_is_fixed() -> None:
    other = replace(RIGHT, texts={0: "te."}, ends={0: "stop"}, tokens={0: [("te", -0.5), (".", -1.0)]})
    assert difference(ENDS_ITSELF, other, RIGHT, is_exact=False) == NEAR
    assert "ends" in difference(CASE, other, RIGHT, is_exact=False)
    assert "no usage" in difference(ENDS_ITSELF, replace(other, usage=None), RIGHT, is_exact=False)


@pytest.mark.parametrize(
    "after",
    [
        replace(QUIET, descriptors={**QUIET.descriptors, "server": 60}),
        replace(QUIET, descriptors={**QUIET.descriptors, "rank-standby": 60}),
        replace(QUIET, memory=(4, 4096)),
        replace(QUIET, memory=(3, 8192)),
        replace(QUIET, threads=30),
        replace(QUIET, bytes=2 << 30),
        replace(QUIET, processes=("rank0",)),
        replace(QUIET, metrics={**QUIET.metrics, GPU: float(1 << 30)}),
        replace(QUIET, metrics={**QUIET.metrics, "tpworker_free_kv_blocks": 8.0}),
        replace(QUIET, metrics={**QUIET.metrics, "tpworker_waiting_requests": 1.0}),
    ],
)
def test_a_leak_is_seen(after: Quiet) -> None:
    assert leaks(QUIET, after)
    assert not leaks(QUIET, QUIET)


def test_shared_memory_is_counted_once_whether_open_or_mapped() -> None:
    before = shared_memory([os.getpid()])
    piece = os.memfd_create("tpworker-of-a-test")
    os.ftruncate(piece, 3 * mmap.PAGESIZE)
    mapped = mmap.mmap(piece, 3 * mmap.PAGESIZE)  # which has a descriptor of its own
    try:
        assert shared_memory([os.getpid(), os.getpid()]) == (before[0] + 1, before[1] + 3 * mmap.PAGESIZE)
        os.close(piece)
        assert shared_memory([os.getpid()])[0] == before[0] + 1
    finally:
        mapped.close()
    assert shared_memory([os.getpid()]) == before


def test_recoveries_are_read_from_a_log() -> None:
    ended = datetime.fromtimestamp(time.time() - 5)
    log = (
        f"{ended:%Y-%m-%d %H:%M:%S},250 tpworker ERROR tpworker-rank1 was killed by SIGKILL\n"
        f"{ended:%Y-%m-%d %H:%M:%S},250 tpworker WARNING recovered in 1.25 s: 7 requests go on, 9 KV blocks\n"
    )
    [recovery] = recoveries(log)
    assert (recovery.seconds, recovery.num_requests) == (1.25, 7)
    noticed = ended.replace(microsecond=0).timestamp() - 1  # .25 - 1.25
    assert recovery.noticed + time.time() - time.monotonic() == pytest.approx(noticed, abs=0.2)


@pytest.mark.parametrize(
    ("noticed", "num_without"),
    [
        ([10.1], 0),
        ([9.0], 1),  # nothing had happened yet
        ([10.1, 12.0], 1),  # a slow process is none
        ([10.1, 20.4], 0),
        ([20.4], 0),  # two faults, which were found together
        ([20.4, 30.0], 1),
    ],
)
def test_a_recovery_without_a_reason_is_seen(noticed: list[float], num_without: int) -> None:
    faults = [Fault("kill", "rank", 10.0), Fault("slow", "rank", 11.5), Fault("stop", "rank", 16.0)]
    assert len(without_reason([Recovery(at, 1.0, 5) for at in noticed], faults)) == num_without


def test_a_pause_is_from_the_fault_to_the_next_chunk() -> None:
    streamed = replace(RIGHT, chunks=[1.0, 2.0, 7.0, 8.0])
    faults = [Fault("kill", "rank", 2.5), Fault("kill", "rank", 9.0)]
    assert pauses([(CASE, True, streamed), (CASE, False, streamed)], faults) == [4.5]


def test_a_verdict_is_good_only_if_nothing_was_lost() -> None:
    good = Verdict(1.0, {}, 0, 5, 0, [], 1, [], {"kill": [0.5], "stop": []}, 0, status=0)
    assert good.is_good
    pauses_of = {"kill": {"count": 1, "p50": 0.5, "p99": 0.5, "p100": 0.5}, "stop": {"count": 0}}
    assert good.as_json()["pauses"] == pauses_of
    for field, value in {
        "wrong": ["x"],
        "leaks": ["x"],
        "odd": ["x"],
        "left_behind": ["x"],
        "status": 1,
    }.items():
        assert not replace(good, **{field: value}).is_good


def test_a_recovery_is_timed_and_outputs_are_those_without_it(tmp_path: Path, model_folder: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "recovery", "--model", str(model_folder)]
    small = ["--load-format", "dummy", "--dtype", "float32", "--requests", "2", "--prompt", "20"]
    short = ["--output", "400", "--after", "0.1", "--victims", "rank0", "scheduler"]
    written = tmp_path / "recovery.json"
    done = subprocess.run(
        [*command, *small, *short, "--json", str(written)], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(written.read_text())["rows"]
    assert [row["victim"] for row in rows] == ["rank0", "scheduler"]
    for row in rows:
        assert row["num_equal"] == row["num_requests"] == 2
        assert row["noticed"] > 0
        assert row["recovered"] > 0
