"""What `bench gpu` and `bench table` share: options, the JSON files, and how rows of decode steps are told.

A row is what gpu_run.py measures of a batch; a table has a line for each, and a column for each figure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.options import add_stand_ins
from benchmarks.common.report import machine, save, told_ranks
from benchmarks.steps.gpu_trace import KINDS, OTHER

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]
"""By title, what a column says of a row."""


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Those of both benchmarks."""
    parser.add_argument("--lookahead", type=int, nargs="+", default=[2, 0], help="default: 2 0")
    add_stand_ins(parser)
    parser.add_argument("--timeline", metavar="FILE", help="write some traced steps of each row, to be drawn")
    parser.add_argument("--commit", help="to be noted with the figures; default: what git says")


def measure_and_tell(
    options: argparse.Namespace, measured: Iterable[Sequence[Row]], print_tables: Callable[[list[Row]], None]
) -> None:
    """Measures, writes the JSON files after each part, prints the tables at the end.

    Args:
        measured: rows, part by part; what is not asked for yet is not measured yet.
    """
    where = machine(options.commit)
    print(json.dumps(where), file=sys.stderr, flush=True)
    rows: list[Row] = []
    try:
        for part in measured:
            rows += part
            write(options, where, rows)
    finally:  # what was measured is told, whatever comes to an end too early
        print_tables(rows)


def write(options: argparse.Namespace, where: dict[str, Any], rows: Sequence[Row]) -> None:
    """The JSON files; steps to be drawn go into one of their own."""
    without = [{key: value for key, value in row.items() if key != "timeline"} for row in rows]
    save(options.json, {"machine": where, "rows": without})
    if options.timeline:
        keys = ("model", "ranks", "num_running", "lookahead", "batch", "tpot_ms")
        drawn = [{key: row.get(key) for key in keys} | row["timeline"] for row in rows if row.get("timeline")]
        Path(options.timeline).write_text(json.dumps({"machine": where, "rows": drawn}) + "\n")


# ------------------------------------------------------------------------------------------- cells


def number(row: Row, key: str, digits: int) -> str:
    """A cell."""
    value = row.get(key)
    return "–" if value is None else f"{value:.{digits}f}"


def pair(first: str, second: str) -> str:
    """Two cells in one."""
    return first if (first, second) == ("–", "–") else f"{first} / {second}"


def quantiles(row: Row, key: str, digits: int) -> str:
    """Median and p99, µs."""
    return pair(number(row, f"{key}_p50_us", digits), number(row, f"{key}_p99_us", digits))


def kind_us(row: Row, kind: str) -> str:
    """What the kernels of a kind take in a step, µs."""
    return number(row.get("kinds_us", {}), kind, 0)


# ------------------------------------------------------------------------------------------ tables

SHAPE: Columns = {
    "TP": told_ranks,
    "batch": lambda row: str(row["batch"]),
    "ahead": lambda row: str(row["lookahead"]),
}
OF_KERNELS: Columns = {
    **SHAPE,
    **{kind: partial(kind_us, kind=kind) for kind in (*KINDS, OTHER)},
    "own": lambda row: number(row, "all_reduce_own_us", 0),
    "skew": lambda row: quantiles(row, "skew", 1),
}
"""Where the time of a step's kernels goes."""


def print_all(
    title: str, columns: Columns, rows: Sequence[Row], width: int, remarks: Iterable[str] = ()
) -> None:
    """Everything that there is to say of these rows.

    Args:
        title, columns: of the first table; its first column is the model.
        width: of the page, in characters.
        remarks: lines below the first table.
    """
    console = Console(width=width)
    console.print(table_of(title, columns, rows))
    for remark in remarks:
        console.print(remark)
    console.print(table_of("What the kernels of a step are for, µs", OF_KERNELS, rows))
    print_failures(rows, console)


def table_of(title: str, columns: Columns, rows: Sequence[Row]) -> Table:
    """A line a row; the first column is the model."""
    table = Table("model", title=title)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["model"], *(told(row) for told in columns.values()))
    return table


def print_failures(rows: Sequence[Row], console: Console) -> None:
    """Rows of which nothing could be traced, and why."""
    for row in rows:
        if "trace_failed" in row:
            shape = f"{row['model']} TP {told_ranks(row)} batch {row['batch']} lookahead {row['lookahead']}"
            console.print(f"{shape}: no trace: {row['trace_failed']}")
