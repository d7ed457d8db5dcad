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
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.options import choose_stand_ins, positive, shape
from benchmarks.steps.gpu_run import DEFAULTS, SAMPLINGS, Case, measure
from benchmarks.steps.gpu_tables import (
    SHAPE,
    Columns,
    Row,
    add_shared_options,
    measure_and_tell,
    number,
    pair,
    print_all,
    quantiles,
)
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
    parser.add_argument(
        "--together", action="store_true", help="shapes of one GPU at a time, each on its own"
    )
    for flag, default in (
        ("--slots", DEFAULTS.max_num_seqs),
        ("--step-tokens", DEFAULTS.max_num_batched_tokens),
    ):
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"default: {default}")
    parser.add_argument(
        "--sampling", choices=list(SAMPLINGS), default="greedy",
        help="what requests ask for; graphs alone are greedy ones in any case; default: greedy",
    )  # fmt: skip
    add_shared_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the JSON files."""
    num_gpus = count_gpus()
    shapes = [(shape.split(":")[0], int(shape.split(":")[1])) for shape in options.shapes]
    stand_ins = choose_stand_ins((ranks for _, ranks in shapes), num_gpus, options.stand_ins)
    shapes = [(model, ranks) for model, ranks in shapes if ranks in stand_ins]
    if not shapes:
        return 1
    measure_and_tell(options, measured(options, shapes, stand_ins, num_gpus), print_tables)
    return 0


def measured(
    options: argparse.Namespace, shapes: list[tuple[str, int]], stand_ins: dict[int, int], num_gpus: int
) -> Iterator[list[Row]]:
    """The rows of one runtime after another, or those of several GPUs together."""
    if options.together:
        yield together([model for model, ranks in shapes if ranks == 1], options, num_gpus)
        shapes = [(model, ranks) for model, ranks in shapes if ranks > 1]
    for model, ranks in shapes:
        batches = options.batch or list(PEER.get((model, ranks), {1: ()}))
        graphs: dict[int, list[tuple[float, float]]] = {}
        for lookahead in options.lookahead:
            overlap = lookahead > 0
            case = Case(model, ranks, lookahead, batches, trace_steps=TRACE_STEPS[overlap], admit=overlap,
                        replays=lookahead == options.lookahead[0],
                        stand_ins=stand_ins[ranks], slots=options.slots,
                        step_tokens=options.step_tokens, sampling=options.sampling)  # fmt: skip
            yield measure(case, graphs)


def together(models: Sequence[str], options: argparse.Namespace, num_gpus: int) -> list[Row]:
    """The rows of several models at TP 1, each on a GPU of its own, by processes of their own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(gpu) for gpu in range(num_gpus))
    gpus = visible.split(",")
    rows: list[Row] = []
    same = ["--lookahead", *(str(lookahead) for lookahead in options.lookahead)]
    same += ["--slots", str(options.slots), "--step-tokens", str(options.step_tokens)]
    same += ["--sampling", options.sampling]
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


COLUMNS: Columns = {
    **SHAPE,
    "TPOT": lambda row: pair(number(row, "tpot_ms", 3), number(row, "tpot_p99_ms", 3)),
    "graph": lambda row: number(row, "graph_ms", 3),
    "÷ graph": lambda row: number(row, "tpot_over_graph", 3),
    "over": lambda row: quantiles(row, "over", 0),
    "spread": lambda row: quantiles(row, "spread", 0),
    "gap": lambda row: quantiles(row, "gap", 1),
    "inside": lambda row: number(row, "idle_inside_us", 0),
    "kernels": lambda row: number(row, "kernels", 0),
    "floor": lambda row: number(row, "floor_ms", 3),
    "admitted": lambda row: pair(number(row, "admitted_mean_ms", 1), number(row, "admitted_max_ms", 1)),
    "TTFT": lambda row: number(row, "admitted_ttft_ms", 1),
    "peer": lambda row: str(yardsticks(row)[0]),
    "goal": lambda row: str(yardsticks(row)[1]),
}


def yardsticks(row: Row) -> tuple[float | str, float | str]:
    """The peer's TPOT and the goal, where there are any, ms."""
    return PEER.get((row["model"], row["ranks"]), {}).get(row["batch"], ("–", "–"))


def print_tables(rows: Sequence[Row]) -> None:
    """Everything that there is to say of these rows."""
    print_all("Decode steps; 'a / b': median / p99", COLUMNS, rows, width=195)
