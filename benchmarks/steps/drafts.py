"""Decode steps with drafts on GPUs: time per delivered token, with drafts right as often as is asked for.

Public models' shapes (benchmarks/configs) with dummy weights. Of those nothing could be guessed: acceptance
is imposed (imposed.py), after drafts were made as they are served. Experts are chosen uniformly at random.
Requests of 500 tokens in and 200 out, greedy, all at once, lookahead 2. Looked at are the steps in which all
decode and none is admitted. Each model runs twice: without drafts, 'plain', and with them, all rows in turn.

drafts      of a request and step; auto: the scheduler chooses, from 0 to the most
asked       how often a draft is to be right, if all before it were
right       how often they were, and all before them, by position
tokens      of a request and step
step        from a step's end to the next one's; the median, of auto the mean; ms
TPOT        step by tokens: per delivered token, ms
gain        plain TPOT of as many requests by this one
graph       the same step alone, queued back to back, at the middle of the lengths, ms
÷ graph     step by graph
gap         GPU idle time between two steps, from a profiler's trace of other steps, µs, median / p99
imposing    what the benchmark's own kernels take in a step, µs; part of all other figures
floor       what the bytes take that a step must read, weights and KV, at 4.3 TB/s, without the head's, ms
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from benchmarks.common.options import add_stand_ins, choose_stand_ins, positive, shape, share
from benchmarks.common.report import told_ranks
from benchmarks.steps.drafts_run import DraftsCase, Wanted, measure_drafts
from benchmarks.steps.gpu_tables import Columns, Row, measure_and_tell, number, pair, quantiles, table_of
from benchmarks.steps.imposed import AUTO
from tpworker.ipc.drafting import draft_choices
from tpworker.ipc.messages import MAX_DRAFTS
from tpworker.observe.gpus import count_gpus

SHAPES = ("qwen3-8b:1", "ernie-4.5-21b-a3b:1", "glm-4.5-air:2")
METHODS = {"qwen3-8b": "ngram"}
"""By model; of others it is mtp."""
SEVERAL_AT = (1, 4)
"""Batches at which look-ups make more than one draft too."""
SEVERAL = 3
AUTOMATIC = (0.0, 0.9)
"""Acceptances with which the scheduler chooses."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    told = f"model:TP; default: {' '.join(SHAPES)}"
    parser.add_argument("--shapes", type=shape, nargs="+", default=list(SHAPES), help=told)
    parser.add_argument("--method", choices=["ngram", "mtp"], help="default: ngram for Qwen3-8B, else mtp")
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1, 4, 16, 64], help="default: 1 4 16 64"
    )
    parser.add_argument(
        "--drafts", type=num_drafts, nargs="+", metavar="N",
        help=f"of a request and step, up to {MAX_DRAFTS}; default: 1, and {SEVERAL} by ngram at 1 and 4",
    )  # fmt: skip
    parser.add_argument("--acceptance", type=share, nargs="+", default=[0.6, 0.8, 0.9], metavar="SHARE",
                        help="of drafts, imposed; default: 0.6 0.8 0.9")  # fmt: skip
    parser.add_argument(
        "--no-auto", action="store_true", help="leave out the rows whose drafts the scheduler chooses"
    )
    parser.add_argument("--no-trace", action="store_true", help="leave out the traces, and so the gaps")
    parser.add_argument("--input-len", type=positive, default=500, metavar="N", help="default: 500")
    parser.add_argument("--output-len", type=positive, default=200, metavar="N", help="default: 200")
    parser.add_argument("--layers", type=positive, metavar="N", help="of each model; default: all")
    add_stand_ins(parser)
    parser.add_argument("--commit", help="to be noted with the figures; default: what git says")
    parser.set_defaults(timeline=None)


def num_drafts(text: str) -> int:
    """From 1 to MAX_DRAFTS."""
    value = int(text)
    if not 1 <= value <= MAX_DRAFTS:
        raise argparse.ArgumentTypeError(f"{value} drafts; from 1 to {MAX_DRAFTS}")
    return value


def why_not_together(numbers: Sequence[int]) -> str:
    """Of numbers of drafts that are asked for of one runtime; '': its steps may have each of them."""
    choices = draft_choices(max(numbers))
    others = ", ".join(str(number) for number in sorted({*numbers} - {*choices}))
    told = ", ".join(str(choice) for choice in choices[1:])
    return f"where steps have up to {choices[-1]} drafts they have {told}, not {others}" if others else ""


def run(options: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the JSON file."""
    shapes = [(shape.split(":")[0], int(shape.split(":")[1])) for shape in options.shapes]
    stand_ins = choose_stand_ins((ranks for _, ranks in shapes), count_gpus(), options.stand_ins)
    shapes = [(model, ranks) for model, ranks in shapes if ranks in stand_ins]
    if not shapes:
        return 1
    if reason := why_not_together(options.drafts or [1]):
        print(f"drafts: {reason}", file=sys.stderr)
        return 2
    measured = (measure_drafts(case_of(*each, options, stand_ins[each[1]])) for each in shapes)
    measure_and_tell(options, measured, print_table)
    return 0


def case_of(
    model: str, ranks: int, options: argparse.Namespace, stand_ins: int, device: str = "cuda"
) -> DraftsCase:
    """What is run of a model."""
    method = options.method or METHODS.get(model, "mtp")
    rows: list[Wanted] = []
    for batch in options.batch:
        several = [SEVERAL] if method == "ngram" and batch in SEVERAL_AT else []
        rows.append(Wanted(batch, 0, is_traced=not options.no_trace))
        for drafts in options.drafts or [1, *several]:
            rows += [
                Wanted(
                    batch, drafts, acceptance, acceptance == max(options.acceptance) and not options.no_trace
                )
                for acceptance in options.acceptance
            ]
        if not options.no_auto:
            rows += [Wanted(batch, AUTO, acceptance) for acceptance in AUTOMATIC]
    return DraftsCase(
        model,
        ranks,
        method,
        rows,
        num_prompt=options.input_len,
        num_output=options.output_len,
        layers=options.layers or 0,
        device=device,
        stand_ins=stand_ins,
    )


def by_position(row: Row) -> str:
    """How often drafts were right."""
    return " ".join(f"{right:.2f}" for right in row.get("acceptance", ())) or "–"


COLUMNS: Columns = {
    "TP": told_ranks,
    "method": lambda row: row["method"] or "plain",
    "batch": lambda row: str(row["batch"]),
    "drafts": lambda row: str(row["num_drafts"]),
    "asked": lambda row: f"{row['wanted_acceptance']:g}" if row["num_drafts"] else "–",
    "right": by_position,
    "mean drafts": lambda row: number(row, "mean_drafts", 2),
    "tokens": lambda row: number(row, "tokens_a_step", 2),
    "step": lambda row: pair(number(row, "step_ms", 3), number(row, "step_p99_ms", 3)),
    "TPOT": lambda row: number(row, "tpot_ms", 3),
    "gain": lambda row: number(row, "gain", 2),
    "graph": lambda row: number(row, "graph_ms", 3),
    "÷ graph": lambda row: number({"share": over_graph(row)}, "share", 3),
    "gap": lambda row: quantiles(row, "gap", 1),
    "imposing": lambda row: number(row, "imposing_us", 1),
    "kernels": lambda row: number(row, "kernels", 0),
    "floor": lambda row: number(row, "floor_ms", 3),
}


def over_graph(row: Row) -> float | None:
    """A step by its graph alone; None: one of them was not timed."""
    step, graph = row.get("step_ms"), row.get("graph_ms")
    return None if step is None or not graph else float(step / graph)


def print_table(rows: Sequence[Row]) -> None:
    """Everything that there is to say of these rows."""
    console = Console(width=190)
    console.print(table_of("Decode steps with drafts; ms where nothing is said", COLUMNS, rows))
    for row in rows:
        if "trace_failed" in row:
            shape = (
                f"{row['model']} {row['method'] or 'plain'} batch {row['batch']} drafts {row['num_drafts']}"
            )
            print(f"{shape}: no trace: {row['trace_failed']}", file=sys.stderr)
