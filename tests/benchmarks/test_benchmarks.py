"""The benchmarks run and write what they promise. What they measure is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.common.report import Summary, machine, quantile
from benchmarks.common.timeline import steady_steps
from tests.conftest import TINY_CONFIG
from tests.observe.fake_nvml import FakeGpu, FakeNvml
from tpworker.outputs import StepRecord

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_quantiles_are_samples() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert quantile(list(range(1, 101)), 0.99) == 99
    assert quantile([5.0], 0.99) == 5.0
    assert Summary.of([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]]) == Summary(4.0, 9.0, 2.0, 5.0, 6)


def test_the_gpus_of_a_machine_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml([FakeGpu("GPU-1"), FakeGpu("GPU-2", name="NVIDIA H100", nvlinks=())])
    monkeypatch.setitem(sys.modules, "pynvml", library)
    noted = machine("abc")
    assert noted["gpus"] == ["NVIDIA H200", "NVIDIA H100"]
    assert noted["nvlinks"] == [18, 0]
    assert noted["driver"]
    assert noted["commit"] == "abc"
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=False))
    assert "gpus" not in machine()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("host --batch 0", "at least 1"),
        ("barrier --ranks 0", "at least 1"),
        ("barrier --json /nonexistent/x.json", "cannot be written"),
        ("gpu --shapes qwen3-8b", "qwen3-8b:2"),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_measured(command: str, told: str) -> None:
    done = bench(*command.split())
    assert done.returncode == 2
    assert told in done.stderr


def test_barrier(tmp_path: Path) -> None:
    small = ["--ranks", "1", "3", "--rounds", "2", "--steps", "20", "--late-steps", "3", "--no-gloo"]
    done = bench("barrier", *small, "--json", str(tmp_path / "barrier.json"))
    assert done.returncode == 0, done.stderr
    assert "back to back" in done.stdout
    written = json.loads((tmp_path / "barrier.json").read_text())
    assert written["machine"]["cores"] > 0
    assert list(written["microseconds"]) == ["1", "3"]
    assert written["microseconds"]["3"]["ours"]["release"]["count"] == 40


def test_host(tmp_path: Path) -> None:
    small = ["--ranks", "1", "--batch", "1", "3", "--lookahead", "0", "1", "--contexts", "20", "200"]
    short = ["--rounds", "1", "--seconds", "0.2", "--idle-seconds", "0.2", "--step-ms", "2"]
    done = bench("host", *small, *short, "--json", str(tmp_path / "host.json"))
    assert done.returncode == 0, done.stderr
    assert "Batch" not in done.stdout, "what was not measured must not be told"
    written = json.loads((tmp_path / "host.json").read_text())
    kinds = [(cell["ranks"], cell["lookahead"], cell["batch"]) for cell in written["steady"]]
    assert kinds == [(1, 0, 1), (1, 0, 3), (1, 1, 1), (1, 1, 3)]
    for cell in (*written["steady"], *written["contexts"]):
        (measured,) = cell["rounds"]
        assert measured["steps"] > 0
        assert set(measured["cpu_us"]) >= {"scheduler", "rank 0", "runtime"}
        assert all(cost > 0 for cost in measured["cpu_us"].values())
        assert measured["period_ms"]["median"] >= 2.0, "a device's step cannot take less than it takes"
        assert measured["gap_us"]["p10"] >= 0
    assert [cell["context"] for cell in written["contexts"]] == [20, 200]
    assert written["idle_percent_of_a_core"].keys() == {"scheduler", "rank 0", "other ranks", "runtime"}


@pytest.mark.parametrize("is_pair", [False, True])
def test_serve(tmp_path: Path, is_pair: bool) -> None:
    """Overlap off and on, or whatever two servers are to be compared."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY_CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    options = [
        "--model",
        str(model),
        "--load-format",
        "dummy",
        "--tensor-parallel-size",
        "1",
        "--rounds",
        "2",
    ]
    small = ["--concurrency", "2", "--num-requests", "3", "--input-len", "8", "--output-len", "12"]
    files = ["--json", str(tmp_path / "serve.json"), "--picture", str(tmp_path / "steps.png")]
    names = ("few slots", "as it is") if is_pair else ("overlap off", "overlap on")
    pair = ["--pair", "few slots=--max-num-seqs 2 --block-size 8", "as it is="] if is_pair else []
    done = bench("serve", *options, *small, "--idle-seconds", "0.2", *files, *pair)
    assert done.returncode == 0, done.stderr
    assert names[0] in done.stdout
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "serve.json").read_text())
    for name in names:
        assert written[name]["start_seconds"] > 0
        rounds = written[name]["rounds"]
        assert all(len(figures) == 2 for figures in rounds.values())
        assert min(rounds["total time, s"]) > 0
        assert min(rounds["step gap p50, µs"]) >= 0


def test_the_steps_drawn_are_plain_decodes_of_one_batch() -> None:
    kinds = [(5, 0), (0, 3), (0, 3), (2, 3), (0, 4), (0, 4), (0, 4), (0, 4), (0, 2)]
    steps = [StepRecord(i, prefill, decodes, 0, 0, 0) for i, (prefill, decodes) in enumerate(kinds)]
    assert [step.step for step in steady_steps(steps, 2)] == [5, 6]
    assert [step.step for step in steady_steps(steps, 8)] == [4, 5, 6, 7]


def test_an_unknown_benchmark_is_refused_with_those_there_are() -> None:
    done = bench("nothing")
    assert done.returncode == 2
    assert "invalid choice: 'nothing' (choose from" in done.stderr
    assert "barrier" in done.stderr
