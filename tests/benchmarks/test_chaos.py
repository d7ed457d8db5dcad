"""The soak, short, on a real server; and its judge, which must see what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="the openai package is not installed: scripts/setup --dev has it")

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.judge import Quiet, Verdict, leaks, pauses, wrong_answers
from benchmarks.chaos.load import Answer, Case

RIGHT = Answer({0: "text"}, {0: "length"}, (3, 4), [-0.5])
CASE = Case("one", {})
METRICS = {"free_kv_blocks": 9.0, "kv_blocks": 9.0, "open_requests": 0.0, "running_requests": 0.0}
QUIET = Quiet(
    40, 3, 12, 1 << 30, ("rank0", "scheduler"),
    {f"tpworker_{name}": value for name, value in {**METRICS, "waiting_requests": 0.0}.items()},
)  # fmt: skip


def test_a_short_soak(tmp_path: Path) -> None:
    """Ranks, the scheduler and what they are forked from are lost; every answer is the right one."""
    command = [sys.executable, "-m", "benchmarks", "chaos", "--json", str(tmp_path / "verdict.json")]
    command += ["--seconds", "25", "--faults-every", "3", "--kinds", "kill", "slow", "--seed", "4"]
    done = subprocess.run(
        [*command, "--clients", "4", "--tokens", "24"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads((tmp_path / "verdict.json").read_text())["verdict"]
    assert sum(count for name, count in verdict["faults"].items() if name.startswith("kill")) >= 3
    assert verdict["restarts"] >= 2
    assert verdict["num_answers"] > 0


@pytest.mark.parametrize(
    "answer",
    [
        replace(RIGHT, texts={0: "text text"}),
        replace(RIGHT, texts={0: "tex"}),
        replace(RIGHT, ends={}),
        replace(RIGHT, usage=None),
        replace(RIGHT, usage=(3, 5)),
        replace(RIGHT, logprobs=[-0.5, -0.5]),
        replace(RIGHT, logprobs=[-0.6]),
        replace(RIGHT, error="APIError: gone"),
    ],
)
def test_a_wrong_answer_is_seen(answer: Answer) -> None:
    assert wrong_answers([(CASE, True, RIGHT), (CASE, True, answer)], {CASE: RIGHT})
    assert not wrong_answers([(CASE, True, RIGHT)], {CASE: RIGHT})


@pytest.mark.parametrize(
    "after",
    [
        replace(QUIET, descriptors=60),
        replace(QUIET, memfds=4),
        replace(QUIET, threads=30),
        replace(QUIET, bytes=2 << 30),
        replace(QUIET, processes=("rank0",)),
        replace(QUIET, metrics={**QUIET.metrics, "tpworker_free_kv_blocks": 8.0}),
        replace(QUIET, metrics={**QUIET.metrics, "tpworker_waiting_requests": 1.0}),
    ],
)
def test_a_leak_is_seen(after: Quiet) -> None:
    assert leaks(QUIET, after)
    assert not leaks(QUIET, QUIET)


def test_a_pause_is_from_the_fault_to_the_next_chunk() -> None:
    streamed = replace(RIGHT, chunks=[1.0, 2.0, 7.0, 8.0])
    faults = [Fault("kill", "rank", 2.5), Fault("kill", "rank", 9.0)]
    assert pauses([(CASE, True, streamed), (CASE, False, streamed)], faults) == [4.5]


def test_a_verdict_is_good_only_if_nothing_was_lost() -> None:
    good = Verdict(1.0, {}, 0, 5, 0, [], [], [0.5], 0, [], 0)
    assert good.is_good
    assert good.as_json()["pauses"] == {"p50": 0.5, "p99": 0.5, "p100": 0.5}
    for field, value in {"wrong": ["x"], "leaks": ["x"], "left_behind": ["x"], "status": 1}.items():
        assert not replace(good, **{field: value}).is_good
