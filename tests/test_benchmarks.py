"""The benchmarks run and write what they promise. What they measure is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Summary, quantile

ROOT = Path(__file__).resolve().parents[1]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_quantiles_are_samples() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert quantile(list(range(1, 101)), 0.99) == 99
    assert quantile([5.0], 0.99) == 5.0
    assert Summary.of([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]]) == Summary(4.0, 9.0, 2.0, 5.0, 6)


def test_barrier(tmp_path: Path) -> None:
    small = ["--ranks", "1", "3", "--rounds", "2", "--steps", "20", "--late-steps", "3", "--no-gloo"]
    done = bench("barrier", *small, "--json", str(tmp_path / "barrier.json"))
    assert done.returncode == 0, done.stderr
    assert "back to back" in done.stdout
    written = json.loads((tmp_path / "barrier.json").read_text())
    assert written["machine"]["cores"] > 0
    assert list(written["microseconds"]) == ["1", "3"]
    assert written["microseconds"]["3"]["ours"]["release"]["count"] == 40


def test_an_unknown_benchmark_is_refused_with_those_there_are() -> None:
    done = bench("nothing")
    assert done.returncode == 2
    assert "invalid choice: 'nothing' (choose from" in done.stderr
    assert "barrier" in done.stderr
