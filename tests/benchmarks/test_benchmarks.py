"""The benchmarks run and write what they promise. What they measure is nobody's business here."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.common.report import Summary, machine, quantile
from benchmarks.common.timeline import steady_steps
from benchmarks.serving import schemas
from benchmarks.serving.schema_suite import ALL_KINDS, SUITE, Entry, kinds_of, read_suite
from benchmarks.serving.serve import step_gaps
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


def spelling_model(folder: Path) -> Path:
    """A model without weights, whose tokens are bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG | {"max_position_embeddings": 4096}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 256}')
    return folder


@pytest.mark.parametrize("is_pair", [False, True])
def test_serve(tmp_path: Path, is_pair: bool) -> None:
    """Overlap off and on, or whatever two servers are to be compared."""
    model = spelling_model(tmp_path / "model")
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


SCHEMAS = [
    {"name": "colour", "schema": {"enum": ["red", "green"]}},
    {"name": "list", "schema": {"type": "array", "items": {"type": "string"}, "minItems": 30}},
    {"name": "digit", "schema": {"type": "integer", "minimum": 0, "maximum": 9}},
]


def test_schemas(tmp_path: Path) -> None:
    model, suite = spelling_model(tmp_path / "model"), tmp_path / "suite.json"
    options = ["--model", str(model), "--load-format", "dummy", "--suite", str(suite), "--concurrency", "4"]
    small = ["--outputs", "9", "--compared", "5", "--max-tokens", "20", "--json", str(tmp_path / "out.json")]
    suite.write_text(json.dumps(SCHEMAS))
    done = bench("schemas", *options, *small)
    assert done.returncode == 0, done.stderr
    assert "tokens/s with schemas" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    found = {(output["name"], output["reason"], output["fault"]) for output in written["outputs"]}
    assert found == {("colour", "stop", ""), ("list", "length", ""), ("digit", "stop", "")}
    assert [output["seed"] for output in written["outputs"]] == list(range(9))
    speeds = written["tokens_per_second"]
    assert min(speeds["with"] + speeds["without"]) > 0
    assert len(speeds["with"]) == len(speeds["without"]) == 3


def test_the_kinds_of_schemas() -> None:
    def kinds(**schema: Any) -> set[str]:
        return set(Entry("x", schema).kinds)

    link = {"properties": {"next": {"$ref": "#/$defs/link"}}}
    inner = {"properties": {"a": {"type": "string"}}}
    assert kinds() == kinds(type="object", properties={"a": {}}) == {"others"}
    assert kinds(type=["string", "null"]) == kinds(anyOf=[{}]) == {"unions"}
    assert kinds(properties={"b": inner}) == {"nested objects"}
    assert kinds(items={"minimum": 1}) == {"arrays", "bounds"}
    assert kinds(properties={"a": {"$ref": "#"}}) == {"refs", "recursion"}
    assert kinds(properties={"a": {"$ref": "#/$defs/b"}}, **{"$defs": {"b": {}}}) == {"refs"}
    assert kinds(**{"$ref": "#/$defs/link", "$defs": {"link": link}}) >= {"recursion"}
    entries = read_suite(SUITE)
    assert sum(len(names) for names in kinds_of(entries).values()) >= len(entries)
    assert set(kinds_of(entries)) == set(ALL_KINDS), "the suite lacks a kind"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1}', ""),
        ('{"a": 1', "no JSON: Expecting"),
        ("[" * 100_000, "no JSON: "),
        ('{"a": 11}', "$.a: 11 is greater"),
        ('{"a": 1, "ip": "1.2.3"}', "is not a 'ipv4'"),
    ],
)
def test_invalid_outputs_are_told(text: str, told: str) -> None:
    properties = {"a": {"type": "integer", "maximum": 10}, "ip": {"type": "string", "format": "ipv4"}}
    found = Entry("x", {"type": "object", "properties": properties}).why_invalid(text)
    assert told in found
    assert bool(told) == bool(found)


def test_one_invalid_output_is_the_end_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(fault: str) -> int:
        faults = [""] * 7 + [fault] + [""]
        outputs = [schemas.Output("person", i, "{}", 4, "stop", fault) for i, fault in enumerate(faults)]
        rounds = [schemas.Round(outputs, 2.0)]

        async def measured(*_: object) -> tuple[list[schemas.Round], ...]:
            return rounds, rounds, []

        monkeypatch.setattr(schemas, "_measure", measured)
        return schemas.run(options)

    parser = argparse.ArgumentParser()
    schemas.add_options(parser)
    options = parser.parse_args([], argparse.Namespace(json=None))
    assert found("") == 0
    assert "invalid: " not in capsys.readouterr().out
    assert found("$.age: 151 is greater") == 1
    assert "invalid: person, seed 7: $.age: 151 is greater" in capsys.readouterr().out


def test_a_suite_that_is_none_is_refused(tmp_path: Path) -> None:
    for number, text in enumerate(("{", "[1]", "[]", json.dumps(SCHEMAS[:1] * 2))):
        suite = tmp_path / f"{number}.json"
        suite.write_text(text)
        with pytest.raises(ValueError, match=f"{number}.json"):
            read_suite(suite)
    done = bench("schemas", "--suite", str(tmp_path / "none.json"))
    assert done.returncode == 2
    assert "none.json" in done.stderr


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


def test_metrics(tmp_path: Path) -> None:
    small = ["--rounds", "2", "--batch", "1", "3", "--steps", "5"]
    done = bench("metrics", *small, "--json", str(tmp_path / "metrics.json"))
    assert done.returncode == 0, done.stderr
    assert "CPU time of a token" in done.stdout
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert list(written["token_ns"]) == ["1", "3"]
    assert written["token_ns"]["3"]["with"]["count"] == 2
    assert set(written["call_ns"]) == {"step", "request", "span", "scrape"}


def test_http(tmp_path: Path) -> None:
    small = ["--streams", "2", "--kinds", "chat", "whole", "--rounds", "1", "--seconds", "1"]
    done = bench("http", *small, "--max-tokens", "20", "--json", str(tmp_path / "http.json"))
    assert done.returncode == 0, done.stderr
    assert "CPU time of a token" in done.stdout
    chat, whole = json.loads((tmp_path / "http.json").read_text())["windows"]
    assert (chat["kind"], whole["kind"]) == ("chat", "whole")
    assert chat["events"] > 0.5
    assert whole["events"] == 0
    for window in (chat, whole):
        assert set(window["cpu_us_a_token"]) == {"HTTP", "clients", "scheduler", "rank"}
        assert window["tokens/s"] > 0


def test_step_gaps_are_those_with_work_to_do() -> None:
    def step(number: int, num_decodes: int, started: int, ended: int) -> StepRecord:
        return StepRecord(number, 0, num_decodes, 0, started, ended)

    steps = [
        step(1, 0, 0, 100),
        step(2, 1, 130, 200),
        step(3, 1, 210, 300),
        step(4, 0, 9000, 9100),  # nobody was there to decode: the device was idle, not late
        step(7, 1, 9900, 9950),  # not the next one
    ]
    assert step_gaps(steps) == [10e-9, 30e-9]
    assert step_gaps([]) == []


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="namespaces need root, and ip")
def test_hosts(tmp_path: Path) -> None:
    small = ["--ranks", "2", "--rounds", "1", "--steps", "20", "--json", str(tmp_path / "hosts.json")]
    done = bench("hosts", *small)
    if "Operation not permitted" in done.stderr:
        pytest.skip("this container may make no network namespaces")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "hosts.json").read_text())["microseconds"]["2"]
    kinds = ["plan: ipc", "plan: tcp", "plan: tcp + CURVE", "barrier: one host", "barrier: two hosts"]
    assert {kind: one["count"] for kind, one in measured.items()} == dict.fromkeys(kinds, 20)
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "tpworker-" not in names
