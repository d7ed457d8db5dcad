"""Serving a real model over HTTP, overlap off and on, in turns; or with any other options (--pair).

Two servers (`tpworker serve`) that differ in nothing else stand side by side, and rest while the other one
has its turn (on a GPU, let the first leave memory to the second: --gpu-memory-utilization 0.45). Prompts are
random token ids of one length, new ones in every round and the same for both, and every answer has exactly
--output-len tokens.

TTFT      from sending a request to its first text, the wait for a free slot among others included
TPOT      mean time between two tokens of a request after that
step      from a step's start to its end on rank 0's device; steps with prompts in them are longer
step gap  time before a decode step in which rank 0's device had nothing to do

A figure is the median of the rounds, with the lowest and the highest; a quantile is taken in each round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.common.cpu import Others, Usage
from benchmarks.common.options import positive
from benchmarks.common.report import machine, quantile, save
from benchmarks.common.timeline import draw, steady_steps
from tpworker.bench.connection import Address
from tpworker.bench.lengths import Lengths
from tpworker.bench.load import Level, Measured, run_level
from tpworker.bench.plan import Plan
from tpworker.bench.records import Record
from tpworker.outputs import StepRecord, step_gap

ROOT = Path(__file__).resolve().parents[2]
IDLE_AFTER = 2.0
GOAL_IDLE = 2.0
_STOP_SECONDS = 60.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""

    def number(name: str, default: int, what: str) -> None:
        parser.add_argument(
            name, type=positive, default=default, metavar="N", help=f"{what}; default: {default}"
        )

    parser.add_argument("--model", help="a folder or a hub name; default: SmolLM2-135M-Instruct")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto", help="default: auto")
    number("--tensor-parallel-size", 2, "TP ranks")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    number("--lookahead", 2, "with overlap on")
    parser.add_argument(
        "--pair",
        nargs=2,
        metavar=("NAME=OPTIONS", "NAME=OPTIONS"),
        help="the two servers, and what options of `tpworker serve` each has beside those above; "
        "default: overlap off, and on",
    )
    number("--concurrency", 8, "requests at a time")
    number("--num-requests", 16, "in a round")
    number("--input-len", 128, "tokens of a prompt")
    number("--output-len", 64, "tokens of an answer")
    number("--rounds", 5, "of each, in turns")
    parser.add_argument(
        "--idle-seconds", type=float, default=5.0, help="to watch the idle servers; default: 5"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw some steps of each to FILE (PNG, SVG …)")
    parser.add_argument("--quick", action="store_true", help="one small round, whatever else is said")


@dataclass(slots=True)
class Server:
    """A server process, and what was measured of it."""

    name: str
    process: subprocess.Popen[str]
    url: str
    vocab_size: int
    steps_file: Path
    rounds: list[Measured] = field(default_factory=list)
    steps: list[list[StepRecord]] = field(default_factory=list)
    """By round; of those alone that the runtime still remembers whole."""
    start: float = 0.0
    """Seconds until it was ready."""
    idle: float = 0.0
    """Percent of a core, all its processes together."""

    def take_steps(self) -> None:
        """Reads what the server has written in its end, and sorts it into the rounds."""
        records = [StepRecord(*values) for values in json.loads(self.steps_file.read_text())]
        remembered = [done for done in self.rounds if records[0].launched_ns <= 1e9 * done.began]
        if not remembered:
            raise SystemExit(f"a round has more steps than the {len(records)} that a runtime remembers")
        for done in remembered:
            began, ended = 1e9 * done.began, 1e9 * done.ended
            self.steps.append([step for step in records if began <= step.launched_ns <= ended])


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table, writes the JSON file and the picture."""
    if options.quick:
        options.rounds, options.num_requests, options.concurrency = 1, 4, 4
        options.input_len, options.output_len, options.idle_seconds = 32, 16, 2.0
    where, others = machine(), Others()
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            _server(name, Path(folder) / f"steps-{number}.json", options, own)
            for number, (name, own) in enumerate(_pair(options))
        )
        with first as one, second as other:
            servers = [one, other]
            _take_turns(servers, options)
            _watch_idle(servers, options.idle_seconds)
        for server in servers:  # they have ended now, and have written down their steps
            server.take_steps()
    where["others"] = others.share()
    _print(servers, options, where)
    save(options.json, {"machine": where, "options": vars(options), **{s.name: _to_json(s) for s in servers}})
    if options.picture:
        what = f"{_model(options)}, {_ranks(options)} on {where['cores']} cores"
        title = f"{what}, {options.concurrency} requests decode, {options.input_len} tokens in"
        draw(Path(options.picture), title, {_headline(s): steady_steps(s.steps[-1]) for s in servers})
    return 0


def _pair(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Names of the two servers, and what options each has for itself."""
    if options.pair is None:
        overlap = [f"--lookahead={options.lookahead}"]
        return [("overlap off", ["--no-enable-overlap-schedule"]), ("overlap on", overlap)]
    named = [each.partition("=") for each in options.pair]
    return [(name, shlex.split(own)) for name, _, own in named]


# ---------------------------------------------------------------------------------------- measuring


@contextmanager
def _server(name: str, steps_file: Path, options: argparse.Namespace, own: Sequence[str]) -> Iterator[Server]:
    """Starts a server; stops it in the end, in good order."""
    arguments = [
        *("--port=0", f"--device={options.device}", f"--load-format={options.load_format}"),
        f"--tensor-parallel-size={options.tensor_parallel_size}",
        *([] if options.model is None else [f"--model={options.model}"]),
        *own,
    ]
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.serving.serve_process", str(steps_file), "serve", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        if not told:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        ready = json.loads(told)
        seconds = time.monotonic() - began
        print(f"{name}: ready after {seconds:.1f} s", file=sys.stderr)
        url = f"http://127.0.0.1:{ready['port']}"
        yield Server(name, process, url, ready["vocab_size"], steps_file, start=seconds)
        process.send_signal(signal.SIGTERM)
        if process.wait(_STOP_SECONDS):
            raise SystemExit(f"the server ended with status {process.returncode}")
    finally:
        process.kill()
        process.wait()


def _take_turns(servers: Sequence[Server], options: argparse.Namespace) -> None:
    def send(server: Server, seed: int, number: int, output_len: int) -> Measured:
        plan = Plan(
            model="", is_chat=False, seed=seed, prompt_len=Lengths(options.input_len, options.input_len),
            output_len=Lengths(output_len, output_len), ignore_eos=True, token_ids=(0, server.vocab_size),
        )  # fmt: skip
        level = Level(number=0, concurrency=options.concurrency, num_requests=number)
        done = asyncio.run(run_level(Address.of(server.url), None, plan, level))
        for record in done.records:
            if record.error is not None or record.num_output != output_len:
                came = record.error or f"{record.num_output} tokens came instead of {output_len}"
                raise SystemExit(f"{server.name}: {came}")
        return done

    for server in servers:
        send(server, 0, options.concurrency, 4)  # to warm up
    for i in range(options.rounds):
        for server in servers if i % 2 else reversed(servers):
            server.rounds.append(send(server, 1 + i, options.num_requests, options.output_len))
        print(f"round {i + 1} of {options.rounds} done", file=sys.stderr)


def _watch_idle(servers: Sequence[Server], seconds: float) -> None:
    time.sleep(IDLE_AFTER)

    def cpu(server: Server) -> float:
        root = psutil.Process(server.process.pid)
        return sum(Usage.of(process.pid).cpu for process in [root, *root.children(recursive=True)])

    before = [cpu(server) for server in servers]
    time.sleep(seconds)
    for server, then in zip(servers, before, strict=True):
        server.idle = 100 * (cpu(server) - then) / seconds


# ----------------------------------------------------------------------------------------- printing


def _measures(server: Server) -> dict[str, list[float]]:
    """By name, a figure for each round."""

    def of_requests(value: Callable[[Record], float | None], share: float) -> list[float]:
        values = [[value(record) or 0.0 for record in done.records] for done in server.rounds]
        return [1e3 * quantile(each, share) for each in values]

    def of_steps(share: float) -> list[float]:
        lengths = [
            [(step.ended_ns - step.started_ns) / 1e6 for step in steps if not step.num_prefill_tokens]
            for steps in server.steps
        ]
        return [quantile(each, share) for each in lengths]

    gaps = [step_gaps(steps) for steps in server.steps]
    return {
        "total time, s": [done.ended - done.began for done in server.rounds],
        "output tokens/s": [
            sum(record.num_output for record in done.records) / (done.ended - done.began)
            for done in server.rounds
        ],
        "TTFT p50, ms": of_requests(lambda record: record.ttft, 0.5),
        "TTFT p99, ms": of_requests(lambda record: record.ttft, 0.99),
        "TPOT p50, ms": of_requests(lambda record: record.tpot, 0.5),
        "TPOT p99, ms": of_requests(lambda record: record.tpot, 0.99),
        "step p50, ms (decode)": of_steps(0.5),
        "step gap p50, µs": [1e6 * quantile(each, 0.5) for each in gaps],
        "step gap p99, µs": [1e6 * quantile(each, 0.99) for each in gaps],
    }


def step_gaps(steps: Sequence[StepRecord]) -> list[float]:
    """Those of steps that follow each other, in seconds, sorted."""
    gaps = (
        step_gap(after.num_decodes, after.started_ns, before.ended_ns)
        for before, after in pairwise(steps)
        if after.step == before.step + 1
    )
    return sorted(gap / 1e9 for gap in gaps if gap is not None)


def _print(servers: Sequence[Server], options: argparse.Namespace, where: dict[str, Any]) -> None:
    names = [server.name for server in servers]
    table = Table("", title=" and ".join(names), caption="median of the rounds (lowest … highest)")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("second ÷ first", justify="right")
    measures = [_measures(server) for server in servers]
    for name in measures[0]:
        first, second = (quantile(each[name], 0.5) for each in measures)
        cells = (f"{quantile(e[name], 0.5):.4g} ({min(e[name]):.4g} … {max(e[name]):.4g})" for e in measures)
        table.add_row(name, *cells, f"{second / first:.2f}" if first else "–")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    idle = ", ".join(f"{server.name}: {server.idle:.2f} %" for server in servers)
    starts = " and ".join(f"{server.start:.1f}" for server in servers)
    console.print(
        f"{_model(options)}, {_ranks(options)}, ready after {starts} s; "
        f"{options.num_requests} requests a round, {options.concurrency} at a time, "
        f"{options.input_len} tokens in, {options.output_len} out; {options.rounds} rounds in turns\n"
        f"Idle, {options.idle_seconds:g} s long from {IDLE_AFTER:g} s after the last request, of a core, "
        f"HTTP included: {idle} (goal: under {GOAL_IDLE:g})\n"
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f} before, other programs took "
        f"{where['others']:.2f} cores meanwhile; Linux {where['kernel']}, Python {where['python']}, torch "
        f"{where['torch']}\n{where['command']}",
        highlight=False,
    )


def _to_json(server: Server) -> dict[str, Any]:
    rounds = _measures(server)
    return {"rounds": rounds, "start_seconds": server.start, "idle_percent_of_a_core": server.idle}


def _model(options: argparse.Namespace) -> str:
    return str(options.model or "SmolLM2-135M-Instruct")


def _ranks(options: argparse.Namespace) -> str:
    kind = "CPU ranks" if options.device == "cpu" else "GPUs"
    return f"{options.tensor_parallel_size} {kind}"


def _headline(server: Server) -> str:
    gaps = _measures(server)["step gap p50, µs"]
    return f"{server.name}: the device waits {quantile(gaps, 0.5):.0f} µs before a step (median, red)"
