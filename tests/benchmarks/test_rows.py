"""`scripts/bench rows`: which load is put on a server, what is written, what two servers' files say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime


def rows_of(file: Path) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = json.loads(file.read_text())["rows"]
    return rows


def test_each_kind_of_load_is_a_row_and_poisson_takes_its_rate_from_many_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    file = tmp_path / "ours.json"
    with LiveServer(FakeRuntime(reply=lambda prompt: 300 * "a", longest=20_000)) as server:
        arguments = ["rows", server.url, "--num-requests", "3", "--json", str(file)]
        assert benchmarks.main([*arguments, "--kinds", "1024", "poisson", "--concurrency", "256"]) == 0
    many, chance = rows_of(file).values()
    assert many["row"] == "1024 @ 256"
    assert (many["requests"], many["failed"]) == (3, 0)
    assert many["tokens/s"] == pytest.approx(256 * many["requests/s"])
    assert chance["row"] == f"poisson {0.7 * many['requests/s']:.2f}/s"
    assert "1024 @ 256" in capsys.readouterr().out


def test_without_that_row_poisson_needs_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["rows", "http://127.0.0.1:9", "--kinds", "poisson"]) == 1
    assert "--rate" in capsys.readouterr().err


def test_a_row_that_cannot_be_measured_is_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["rows", "http://127.0.0.1:9", "--kinds", "8000"]) == 1
    assert "8000 --concurrency 8: exit status 1" in capfd.readouterr().err


def test_two_servers_are_compared_by_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {
        "TTFT p50": 10.0,
        "TTFT p99": 20.0,
        "TPOT p50": 4.0,
        "ITL p50": 4.0,
        "ITL p99": 8.0,
        "CPU": 1.0,
    }
    for name, speed, rate in (("ours", 200.0, "16.91"), ("other", 160.0, "16.90")):
        rows = {
            "1024 @ 1": figures | {"tokens/s": speed},
            f"poisson {rate}/s": figures | {"tokens/s": 2 * speed},
            f"of {name} alone": figures | {"tokens/s": 1.0},
        }
        (tmp_path / name).write_text(json.dumps({"rows": rows}))
    assert benchmarks.main(["rows", "--compare", str(tmp_path / "ours"), str(tmp_path / "other")]) == 0
    told = capsys.readouterr().out
    assert told.count("1.25") == 2
    assert "alone" not in told
