"""GLM-4.5-Air and ERNIE-4.5-21B-A3B, overlap off and on: the table that this project came from.

FastDeploy's pull request 6259 measured them (GPU and number of prompts are not given there). Here: dummy
weights in bfloat16, uniformly random routing (routing.py), greedy, all requests at once, one wave of them.

total     from sending the requests to the last token of all, s; of the output as far as it is run
tokens/s  of one request, its prompt's time included
TPOT      median step in which all decode and none is admitted, ms; columns as of `bench gpu`
touched   experts of a layer that a step's tokens go to, shared ones included
later     the graph alone at the middle length of the whole output, where that is cut: what TPOT grows to, ms
gain      TPOT without overlap by TPOT with it

Step by step, experts touched differ, and with them what a step takes: 'over' and 'spread' hold that too.

Takes 45 s for each lookahead of GLM-4.5-Air and 25 s of ERNIE at TP 2, half of it until the runtime is ready.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.options import add_stand_ins, choose_stand_ins, positive
from benchmarks.common.report import machine, told_ranks
from benchmarks.steps.gpu import number, print_failures, print_kinds, quantiles, write
from benchmarks.steps.gpu_run import Case, measure
from tpworker.observe.gpus import count_gpus


@dataclass(frozen=True, slots=True)
class Load:
    """What one model is asked for."""

    model: str
    batches: tuple[int, ...]
    num_prompt: int
    num_output: int


LOADS = (Load("glm-4.5-air", (4, 64), 500, 10_000), Load("ernie-4.5-21b-a3b", (64,), 2000, 500))
PEER: dict[tuple[str, int, int], tuple[float | None, float]] = {
    ("glm-4.5-air", 4, 4): (7.34, 5.0),
    ("glm-4.5-air", 4, 64): (18.4, 14.5),
    ("ernie-4.5-21b-a3b", 4, 64): (6.24, 4.2),
    ("glm-4.5-air", 8, 4): (None, 4.5),
}
"""By model, TP size and concurrency: vLLM 0.26.0's TPOT on H200 and the goal, ms."""
FASTDEPLOY = {("glm-4.5-air", 8, 4): "11.36 → 10.11", ("ernie-4.5-21b-a3b", 4, 64): "12.75 → 11.21"}
"""Its TPOT before and with overlap, ms."""

TRACE_STEPS = {True: 100, False: 30}


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    models = [load.model for load in LOADS]
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="default: both")
    parser.add_argument("--tensor-parallel-size", type=positive, default=4, metavar="N", help="default: 4")
    parser.add_argument("--lookahead", type=int, nargs="+", default=[2, 0], help="default: 2 0")
    parser.add_argument(
        "--concurrency", type=positive, nargs="+", help="requests; default: 4 and 64 of GLM, 64 of ERNIE"
    )
    parser.add_argument(
        "--input-len", type=positive, metavar="N", help="default: 500 for GLM, 2000 for ERNIE"
    )
    parser.add_argument(
        "--output-len", type=positive, metavar="N", help="default: 10000 for GLM, 500 for ERNIE"
    )
    parser.add_argument(
        "--cut", type=positive, default=300, metavar="N", help="run no more of the output; default: 300"
    )
    add_stand_ins(parser)
    parser.add_argument("--timeline", metavar="FILE", help="write some traced steps of each row, to be drawn")
    parser.add_argument("--commit", help="to be noted with the figures; default: what git says")


def run(options: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the JSON files."""
    ranks, num_gpus = options.tensor_parallel_size, count_gpus()
    stand_ins = choose_stand_ins([ranks], num_gpus, options.stand_ins)
    if not stand_ins:
        return 1
    where = machine(options.commit)
    print(json.dumps(where), file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    try:
        for load in (load for load in LOADS if load.model in options.models):
            graphs: dict[int, list[tuple[float, float]]] = {}
            for lookahead in options.lookahead:
                replays = lookahead == options.lookahead[0]
                case = case_of(load, lookahead, options, stand_ins[ranks], replays)
                output = options.output_len or load.num_output
                rows += [row | {"whole_output": output} for row in measure(case, graphs)]
                write(options, where, rows)
    finally:  # what was measured is told, whatever comes to an end too early
        print_table(rows)
    return 0


def case_of(load: Load, lookahead: int, options: argparse.Namespace, stand_ins: int, replays: bool) -> Case:
    """What is run of a load."""
    num_prompt = options.input_len or load.num_prompt
    num_output = options.output_len or load.num_output
    is_cut = num_output > options.cut
    return Case(
        load.model,
        options.tensor_parallel_size,
        lookahead,
        options.concurrency or load.batches,
        num_prompt=num_prompt,
        num_output=min(num_output, options.cut),
        trace_steps=TRACE_STEPS[lookahead > 0],
        admit=False,
        replays=replays,
        lengths=[num_prompt + num_output // 2] if is_cut and replays else [],
        stand_ins=stand_ins,
    )


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Everything that there is to say of these rows."""
    names = ("TP", "requests", "in / out", "ahead", "total, s", "tokens/s", "TPOT", "gap, µs", "over, µs",
             "spread, µs", "graph", "÷ graph", "later", "floor", "touched", "gain", "peer", "goal",
             "FastDeploy")  # fmt: skip
    table = Table("model", title="Mixtures of experts; ms where nothing is said; 'a / b': median / p99")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shape = (row["model"], row["ranks"], row["batch"])
        peer, goal = PEER.get(shape, (None, None))
        table.add_row(
            row["model"],
            told_ranks(row),
            str(row["batch"]),
            f"{row['num_prompt']} / {row['num_output']}",
            str(row["lookahead"]),
            number(row, "total_s", 2),
            number(row, "tokens_per_s", 1),
            number(row, "tpot_ms", 2),
            quantiles(row, "gap", 1),
            quantiles(row, "over", 0),
            quantiles(row, "spread", 0),
            number(row, "graph_ms", 2),
            number(row, "tpot_over_graph", 3),
            number({"ms": later(row)}, "ms", 2),
            number(row, "floor_ms", 2),
            number(row, "touched", 1),
            number({"gain": gain(row, rows)}, "gain", 3),
            str(peer or "–"),
            str(goal or "–"),
            FASTDEPLOY.get(shape, "–"),
        )
    console = Console(width=205)
    console.print(table)
    for cut in dict.fromkeys((row["model"], row["num_output"], row["whole_output"]) for row in rows):
        if cut[1] < cut[2]:
            console.print(f"{cut[0]}: output cut at {cut[1]} tokens of {cut[2]}, TPOT having settled")
    print_kinds(rows, console)
    print_failures(rows, console)


def gain(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """TPOT of the same row without overlap by this one's; None for that one."""
    keys = ("model", "ranks", "batch")
    for other in rows:
        if other["lookahead"] == 0 != row["lookahead"] and all(other[key] == row[key] for key in keys):
            return float(other["tpot_ms"] / row["tpot_ms"])
    return None


def later(row: dict[str, Any]) -> float | None:
    """ms of the graph alone at the greatest length at which it was timed, if that is beyond the output."""
    points = row.get("graphs") or [(0.0, 0.0)]
    length, milliseconds = max(tuple(point) for point in points)
    return float(milliseconds) if length > row["num_prompt"] + row["num_output"] else None
