"""Kinds of load one after the other, against any OpenAI-compatible server; and two servers beside each other.

    scripts/bench rows http://127.0.0.1:8000 --pid 4711 --json ours.json     the same of the other: other.json
    scripts/bench rows --compare ours.json other.json                        no server is asked

Each row is `tpworker bench` with the options that the table below has: lengths of prompts and outputs, and
how many requests at a time. Prompts are random token ids, so no weights are needed, and outputs have exactly
that length. CPU is that of the server's processes, in cores, where --pid says who began them.

What is compared is told as a ratio, the first file's figure to the second's: above 1 is better for tokens a
second, below 1 for the rest. For *poisson* both must have been asked for as many requests a second: give
the second server the --rate that the first run has told.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.common.options import positive
from benchmarks.common.report import machine, save


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of load."""

    what: str
    options: tuple[str, ...]
    concurrency: tuple[int, ...]


def _lengths(prompt: int, output: int, *more: str) -> tuple[str, ...]:
    return ("--prompt-len", str(prompt), "--output-len", str(output), *more)


KINDS = {
    "1024": Kind("1024 in, 256 out", _lengths(1024, 256), (1, 16, 64, 256)),
    "8000": Kind("8000 in, 16 out", _lengths(8000, 16), (8,)),
    "16000": Kind("16000 in, 200 out", _lengths(16000, 200), (8,)),
    "prefix": Kind("2000 shared + 100 in, 128 out", _lengths(100, 128, "--shared-prefix", "2000"), (32,)),
    "8192": Kind("8192 in, 1024 out", _lengths(8192, 1024), (8, 32, 64)),
    "turns": Kind(
        "8 turns, 500 more each (400 in, 100 out)",
        _lengths(400, 100, "--turns", "8", "--endpoint", "chat"),
        (32,),
    ),
    "poisson": Kind("1024 in, 256 out, as chance has it", _lengths(1024, 256), ()),
}
"""By name; *poisson* comes at a rate."""

FIGURES = ("tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "ITL p50", "ITL p99", "CPU")
"""Of a row: output tokens a second, ms, cores."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    parser.add_argument("url", nargs="?", help="of the server")
    parser.add_argument(
        "--compare", nargs=2, metavar=("FILE", "FILE"), help="what --json has written, of two servers"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    parser.add_argument("--concurrency", nargs="+", type=positive, metavar="N", help="of these alone")
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="requests a second of *poisson*; default: 70%% of what 256 at a time of 1024 have brought",
    )
    parser.add_argument(
        "--num-requests", type=positive, metavar="N", help="of each row; default: 4 times those at a time"
    )
    parser.add_argument("--pid", type=positive, help="of the server's first process, for its CPU")
    parser.add_argument("--processes", type=positive, default=1, metavar="N", help="of the client")
    parser.add_argument("--model", help="the name that the server wants to be asked for")


def run(options: argparse.Namespace) -> int:
    """Measures, or compares; prints tables, and writes the JSON file."""
    console = Console(width=150, highlight=False)
    if options.compare:
        ours, others = (json.loads(Path(file).read_text())["rows"] for file in options.compare)
        show_compared(ours, others, console)
        return 0
    if options.url is None:
        print("rows: a URL, or --compare with two files", file=sys.stderr)
        return 2
    rows: dict[str, dict[str, Any]] = {}
    failed = 0
    for name in options.kinds:
        for level in _levels(KINDS[name], options, rows):
            row = measure(name, level, options)
            if row is None:
                failed += 1
                continue
            rows[row["row"]] = row
            save(options.json, {"machine": machine(), "rows": rows})
    show(rows, console)
    return 1 if failed or not rows else 0


def _levels(kind: Kind, options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Options of each level of a kind."""
    if kind.concurrency:
        wanted = [n for n in kind.concurrency if options.concurrency is None or n in options.concurrency]
        return [["--concurrency", str(number)] for number in wanted]
    rate = options.rate
    if rate is None:
        of_many = rows.get("1024 @ 256")
        if of_many is None:
            print("poisson: left out, it needs --rate, or the row of 256 at a time", file=sys.stderr)
            return []
        rate = 0.7 * of_many["requests/s"]
    return [["--rate", f"{rate:.2f}"]]


def measure(name: str, level: list[str], options: argparse.Namespace) -> dict[str, Any] | None:
    """One row; None: it could not be measured, and why has been printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "tpworker", "bench", options.url, *KINDS[name].options, *level]
        command += ["--ignore-eos", "--processes", str(options.processes), "--json", str(file)]
        if options.num_requests:
            command += ["--num-requests", str(options.num_requests)]
        if options.model:
            command += ["--model", options.model]
        before, began = cpu_seconds(options.pid), time.monotonic()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, text=True)
        after, ended = cpu_seconds(options.pid), time.monotonic()
        if done.returncode:
            print(f"{name} {' '.join(level)}: exit status {done.returncode}", file=sys.stderr)
            return None
        found = json.loads(file.read_text())["levels"][0]
    which = f"@ {level[1]}" if level[0] == "--concurrency" else f"{level[1]}/s"

    def ms(of: str, quantile: str) -> float:
        return 1000 * found[of][quantile] if found[of] else math.nan

    return {
        "row": f"{name} {which}",
        "what": KINDS[name].what,
        "requests": found["num_requests"],
        "failed": sum(found["errors"].values()),
        "requests/s": found["requests_per_second"],
        "client": found["client_trouble"],
        "tokens/s": found["output_per_second"],
        "TTFT p50": ms("ttft", "p50"),
        "TTFT p99": ms("ttft", "p99"),
        "TPOT p50": ms("tpot", "p50"),
        "ITL p50": ms("itl", "p50"),
        "ITL p99": ms("itl", "p99"),
        "CPU": (after - before) / (ended - began) if options.pid else math.nan,
    }


def cpu_seconds(pid: int | None) -> float:
    """Of a process and all that come from it; 0 if there is none."""
    if pid is None:
        return 0.0
    root = psutil.Process(pid)
    seconds = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            seconds += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return seconds


def show(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """One server's rows."""
    table = Table(title="ms, and output tokens a second; CPU in cores")
    for column in ("row", *FIGURES, "failed", "the client"):
        table.add_column(column, justify="right")
    for row in rows.values():
        failed = f"{row['failed']} of {row['requests']}" if row["failed"] else ""
        table.add_row(row["row"], *(_told(row[name]) for name in FIGURES), failed, row["client"][:40])
    console.print(table)


def show_compared(
    ours: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]], console: Console
) -> None:
    """Ratios of the rows that both have; *poisson* by its kind, as rates differ in their last digits."""
    table = Table(title="the first ÷ the second (the first's figure)")
    for column in ("row", *FIGURES):
        table.add_column(column, justify="right")
    for name, row in ours.items():
        other = others.get(name)
        if name.startswith("poisson"):
            other = next((one for key, one in others.items() if key.startswith("poisson")), None)
        if other is not None:
            told = (f"{row[figure] / other[figure]:.2f} ({_told(row[figure])})" for figure in FIGURES)
            table.add_row(name, *told)
    console.print(table)


def _told(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
