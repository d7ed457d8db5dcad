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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.common.options import choose_stand_ins, positive
from benchmarks.common.report import told_ranks
from benchmarks.steps.gpu_run import Case, measure
from benchmarks.steps.gpu_tables import (
    Columns,
    Row,
    add_shared_options,
    measure_and_tell,
    number,
    print_all,
    quantiles,
)
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
    add_shared_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the JSON files."""
    ranks, num_gpus = options.tensor_parallel_size, count_gpus()
    stand_ins = choose_stand_ins([ranks], num_gpus, options.stand_ins)
    if not stand_ins:
        return 1
    measure_and_tell(options, measured(options, stand_ins[ranks]), print_table)
    return 0


def measured(options: argparse.Namespace, stand_ins: int) -> Iterator[list[Row]]:
    """The rows of one runtime after another."""
    for load in (load for load in LOADS if load.model in options.models):
        output = options.output_len or load.num_output
        graphs: dict[int, list[tuple[float, float]]] = {}
        for lookahead in options.lookahead:
            case = case_of(load, lookahead, options, stand_ins, lookahead == options.lookahead[0])
            yield [row | {"whole_output": output} for row in measure(case, graphs)]


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


def print_table(rows: Sequence[Row]) -> None:
    """Everything that there is to say of these rows."""
    columns: Columns = {
        "TP": told_ranks,
        "requests": lambda row: str(row["batch"]),
        "in / out": lambda row: f"{row['num_prompt']} / {row['num_output']}",
        "ahead": lambda row: str(row["lookahead"]),
        "total, s": lambda row: number(row, "total_s", 2),
        "tokens/s": lambda row: number(row, "tokens_per_s", 1),
        "TPOT": lambda row: number(row, "tpot_ms", 2),
        "gap, µs": lambda row: quantiles(row, "gap", 1),
        "over, µs": lambda row: quantiles(row, "over", 0),
        "spread, µs": lambda row: quantiles(row, "spread", 0),
        "graph": lambda row: number(row, "graph_ms", 2),
        "÷ graph": lambda row: number(row, "tpot_over_graph", 3),
        "later": lambda row: number({"ms": later(row)}, "ms", 2),
        "floor": lambda row: number(row, "floor_ms", 2),
        "touched": lambda row: number(row, "touched", 1),
        "gain": lambda row: number({"gain": gain(row, rows)}, "gain", 3),
        "peer": lambda row: str(PEER.get(shape(row), (None, None))[0] or "–"),
        "goal": lambda row: str(PEER.get(shape(row), (None, None))[1] or "–"),
        "FastDeploy": lambda row: FASTDEPLOY.get(shape(row), "–"),
    }
    title = "Mixtures of experts; ms where nothing is said; 'a / b': median / p99"
    print_all(title, columns, rows, width=205, remarks=cuts(rows))


def shape(row: Row) -> tuple[str, int, int]:
    """Model, TP size and concurrency, by which figures of others are known."""
    return row["model"], row["ranks"], row["batch"]


def cuts(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each output that was not run to its end."""
    outputs = ((row["model"], row["num_output"], row["whole_output"]) for row in rows)
    for model, run, whole in dict.fromkeys(outputs):
        if run < whole:
            yield f"{model}: output cut at {run} tokens of {whole}, TPOT having settled"


def gain(row: Row, rows: Sequence[Row]) -> float | None:
    """TPOT of the same row without overlap by this one's; None for that one."""
    keys = ("model", "ranks", "batch")
    for other in rows:
        if other["lookahead"] == 0 != row["lookahead"] and all(other[key] == row[key] for key in keys):
            return float(other["tpot_ms"] / row["tpot_ms"])
    return None


def later(row: Row) -> float | None:
    """ms of the graph alone at the greatest length at which it was timed, if that is beyond the output."""
    points = row.get("graphs") or [(0.0, 0.0)]
    length, milliseconds = max(tuple(point) for point in points)
    return float(milliseconds) if length > row["num_prompt"] + row["num_output"] else None
