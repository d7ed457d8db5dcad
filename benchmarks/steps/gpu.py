"""Decode steps on GPUs: time per output token, and what of it is not the GPU's own work.

Public models' shapes (benchmarks/configs) with dummy weights; every size of group that the GPUs here allow,
each with lookahead 2 and 0. With --stand-ins larger groups too: '4 (on 2)' is TP 4 of which two ranks run
(stand_ins.py). Requests of 500 tokens in and 300 out, greedy, all at once; what is measured is all the steps
in which all of them decode and none is admitted. Takes some 30 s for each shape and lookahead.

TPOT      from a step's end to the next one's, by one CUDA event a step, no profiler; median and p99, ms
graph     the same steps' graphs alone, queued back to back, at the same lengths: the median, ms
÷ graph   the median, over the steps, of TPOT by graph
over      TPOT less graph, step by step, µs: the step gap in production, and what else makes a step longer
spread    the same of the graphs alone, timed one by one: what of 'over' is a graph's own variation, µs
gap       GPU idle time between the last kernel of a step and the first of the next, from a profiler's trace
          of some hundred other steps, µs; the profiler adds about 2
inside    the other GPU idle time in a step, between its kernels, from the same trace, µs
kernels   in a step
floor     what the bytes take that a step must read, weights and KV, at 4.3 TB/s, ms
peer      vLLM 0.26.0's TPOT on this kind of machine, with its defaults

A second table says, from the traces, what the kernels of a step are for, µs: matrix products, attention,
norms (with rotation, KV writes and activations), experts, all-reduces, sampling. Of the all-reduces, 'own' is
what that rank takes for each that comes last to it; the rest is waiting. 'skew': how long the first rank
waits for the last in a step's first all-reduce.

A request of 2000 tokens comes while others decode, as many as the largest batch less one: 'admitted', what
the steps that hold a chunk of it take, mean and longest, and the time to its first token, ms. The runtime has
as many slots, and a step as many tokens, as it has on GPUs by default, or as --slots and --step-tokens say.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.options import add_stand_ins, choose_stand_ins, positive, shape
from benchmarks.common.report import machine, save, told_ranks
from benchmarks.steps.gpu_run import DEFAULTS, Case, measure
from benchmarks.steps.gpu_trace import KINDS, OTHER
from tpworker.observe.gpus import count_gpus

PEER: dict[tuple[str, int], dict[int, tuple[float, float]]] = {
    ("qwen3-0.6b", 1): {1: (1.75, 0.8), 16: (1.94, 1.0), 64: (3.23, 2.1), 256: (7.35, 6.0)},
    ("qwen3-8b", 1): {1: (5.22, 4.4), 16: (5.62, 4.8), 64: (7.08, 6.1)},
    ("qwen3-8b", 2): {1: (3.70, 2.8), 16: (4.05, 3.0), 64: (4.79, 3.8)},
    ("qwen3-8b", 4): {1: (2.84, 2.0), 16: (3.15, 2.2), 64: (3.87, 2.8)},
}
"""By model and TP size, by batch: the peer's TPOT and the goal, ms."""

TRACE_STEPS = {True: 150, False: 40}
"""With overlap, and without, where gaps are a hundred times as long."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    shapes = [f"{model}:{ranks}" for model, ranks in PEER]
    told = f"model:TP; default, as far as GPUs go: {' '.join(shapes)}"
    parser.add_argument("--shapes", type=shape, nargs="+", default=shapes, help=told)
    parser.add_argument(
        "--batch", type=positive, nargs="+", help="default: those that have a figure of the peer"
    )
    parser.add_argument("--lookahead", type=int, nargs="+", default=[2, 0], help="default: 2 0")
    parser.add_argument(
        "--together", action="store_true", help="shapes of one GPU at a time, each on its own"
    )
    for flag, default in (
        ("--slots", DEFAULTS.max_num_seqs),
        ("--step-tokens", DEFAULTS.max_num_batched_tokens),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"default: {default}")
    add_stand_ins(parser)
    parser.add_argument("--timeline", metavar="FILE", help="write some traced steps of each row, to be drawn")
    parser.add_argument("--commit", help="to be noted with the figures; default: what git says")


def run(options: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the JSON files."""
    num_gpus = count_gpus()
    shapes = [(shape.split(":")[0], int(shape.split(":")[1])) for shape in options.shapes]
    stand_ins = choose_stand_ins((ranks for _, ranks in shapes), num_gpus, options.stand_ins)
    shapes = [(model, ranks) for model, ranks in shapes if ranks in stand_ins]
    if not shapes:
        return 1
    where = machine(options.commit)
    print(json.dumps(where), file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    try:
        alone = shapes
        if options.together:
            alone = [shape for shape in shapes if shape[1] > 1]
            rows += together([model for model, ranks in shapes if ranks == 1], options, num_gpus)
            write(options, where, rows)
        for model, ranks in alone:
            batches = options.batch or list(PEER.get((model, ranks), {1: ()}))
            graphs: dict[int, list[tuple[float, float]]] = {}
            for lookahead in options.lookahead:
                overlap = lookahead > 0
                case = Case(model, ranks, lookahead, batches, trace_steps=TRACE_STEPS[overlap], admit=overlap,
                            replays=lookahead == options.lookahead[0],
                            stand_ins=stand_ins[ranks], slots=options.slots,
                            step_tokens=options.step_tokens)  # fmt: skip
                rows += measure(case, graphs)
                write(options, where, rows)
    finally:  # what was measured is told, whatever comes to an end too early
        print_tables(rows)
    return 0


def together(models: Sequence[str], options: argparse.Namespace, num_gpus: int) -> list[dict[str, Any]]:
    """The rows of several models at TP 1, each on a GPU of its own, by processes of their own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(gpu) for gpu in range(num_gpus))
    gpus = visible.split(",")
    rows: list[dict[str, Any]] = []
    same = ["--lookahead", *(str(lookahead) for lookahead in options.lookahead)]
    same += ["--slots", str(options.slots), "--step-tokens", str(options.step_tokens)]
    same += ["--batch", *(str(batch) for batch in options.batch)] if options.batch else []
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, len(models), len(gpus)):
            processes = []
            for gpu, model in zip(gpus, models[first:], strict=False):
                files = ["--json", f"{folder}/{model}.rows", "--timeline", f"{folder}/{model}.steps"]
                command = [sys.executable, "-m", "benchmarks", "gpu", "--shapes", f"{model}:1", *same, *files]
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
                output = subprocess.DEVNULL  # its tables; what it measures it says on stderr too
                processes.append(subprocess.Popen(command, env=environment, stdout=output))
            for process in processes:
                if process.wait():  # it has told why; the others' figures are as good
                    print(f"{process.args}: status {process.returncode}", file=sys.stderr, flush=True)
        for model in models:
            if not Path(f"{folder}/{model}.steps").exists():
                continue
            measured = json.loads(Path(f"{folder}/{model}.rows").read_text())["rows"]
            steps = json.loads(Path(f"{folder}/{model}.steps").read_text())["rows"]
            drawn = {(row["lookahead"], row["batch"]): {"steps": row["steps"]} for row in steps}
            rows += [row | {"timeline": drawn.get((row["lookahead"], row["batch"]))} for row in measured]
    return rows


def write(options: argparse.Namespace, where: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """The JSON files; steps to be drawn go into one of their own."""
    without = [{key: value for key, value in row.items() if key != "timeline"} for row in rows]
    save(options.json, {"machine": where, "rows": without})
    if options.timeline:
        keys = ("model", "ranks", "num_running", "lookahead", "batch", "tpot_ms")
        drawn = [{key: row.get(key) for key in keys} | row["timeline"] for row in rows if row.get("timeline")]
        Path(options.timeline).write_text(json.dumps({"machine": where, "rows": drawn}) + "\n")


def number(row: dict[str, Any], key: str, digits: int) -> str:
    """A cell."""
    value = row.get(key)
    return "–" if value is None else f"{value:.{digits}f}"


def pair(first: str, second: str) -> str:
    """Two cells in one."""
    return first if (first, second) == ("–", "–") else f"{first} / {second}"


def quantiles(row: dict[str, Any], key: str, digits: int) -> str:
    """Median and p99, µs."""
    return pair(number(row, f"{key}_p50_us", digits), number(row, f"{key}_p99_us", digits))


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Everything that there is to say of these rows."""
    names = ("TP", "batch", "ahead", "TPOT", "graph", "÷ graph", "over", "spread", "gap", "inside", "kernels",
             "floor", "admitted", "TTFT", "peer", "goal")  # fmt: skip
    table = Table("model", title="Decode steps; 'a / b': median / p99")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        peer, goal = PEER.get((row["model"], row["ranks"]), {}).get(row["batch"], ("–", "–"))
        table.add_row(
            row["model"],
            told_ranks(row),
            *(str(row[key]) for key in ("batch", "lookahead")),
            pair(number(row, "tpot_ms", 3), number(row, "tpot_p99_ms", 3)),
            number(row, "graph_ms", 3),
            number(row, "tpot_over_graph", 3),
            quantiles(row, "over", 0),
            quantiles(row, "spread", 0),
            quantiles(row, "gap", 1),
            number(row, "idle_inside_us", 0),
            number(row, "kernels", 0),
            number(row, "floor_ms", 3),
            pair(number(row, "admitted_mean_ms", 1), number(row, "admitted_max_ms", 1)),
            number(row, "admitted_ttft_ms", 1),
            str(peer),
            str(goal),
        )
    console = Console(width=195)
    console.print(table)
    print_kinds(rows, console)
    print_failures(rows, console)


def print_kinds(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Where the time of a step's kernels goes."""
    kinds = (*KINDS, OTHER)
    table = Table("model", title="What the kernels of a step are for, µs")
    for name in ("TP", "batch", "ahead", *kinds, "own", "skew"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [number(row.get("kinds_us", {}), kind, 0) for kind in kinds]
        shape = [told_ranks(row), *(str(row[key]) for key in ("batch", "lookahead"))]
        own, skew = number(row, "all_reduce_own_us", 0), quantiles(row, "skew", 1)
        table.add_row(row["model"], *shape, *cells, own, skew)
    console.print(table)


def print_failures(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Rows of which nothing could be traced, and why."""
    for row in rows:
        if "trace_failed" in row:
            shape = f"{row['model']} TP {told_ranks(row)} batch {row['batch']} lookahead {row['lookahead']}"
            console.print(f"{shape}: no trace: {row['trace_failed']}")
