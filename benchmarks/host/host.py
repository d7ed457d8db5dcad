"""What a step costs the host: the runtime without HTTP and without a model.

Scheduler, ranks and runtime are the real processes. Only the ranks' device is fake: every step takes 1 ms on
a clock of its own (tpworker/testing/fake_process.py). Requests are token ids, and decode steadily while it is
measured. Rounds of all lookaheads and batch sizes take turns.

CPU time  the median of the rounds; of the other ranks, each. 'all' is every process together, and 'rounds'
          its lowest and highest. 'runtime' is this process, which consumes every output too
period    from a step's start to the next one's. As long as a step itself: the device never waited
gap       time before a step in which the device had nothing to do

Ranks that outnumber the cores take turns on them, so of them period and gap say little and are left out.
A measurement is repeated when other programs took more than a tenth of a core; --retries times in all.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.cpu import Others
from benchmarks.common.options import positive
from benchmarks.common.report import machine, quantile, save
from benchmarks.host.host_load import PARTS, Driven, Window

GOAL_PERIOD = 1.05
GOAL_IDLE = 2.0
GOAL_BATCH = 64
GOAL_RANKS = 2
GOAL_LOOKAHEAD = 2
IDLE_AFTER = 2.0
DISTURBED = 0.1
"""Cores that other programs may take during a measurement, before it is repeated."""

_FULL: dict[str, Any] = {
    "ranks": [1, 2, 4, 8],
    "batch": [1, 16, 64, 256],
    "contexts": [100, 8000],
    "rounds": 5,
    "seconds": 0.5,
    "idle_seconds": 5.0,
    "retries": 60,
}
_QUICK: dict[str, Any] = {
    "ranks": [1, 2],
    "batch": [1, 64],
    "contexts": [100, 2000],
    "rounds": 1,
    "seconds": 0.5,
    "idle_seconds": 2.0,
    "retries": 0,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""

    def add(name: str, what: str, **kind: Any) -> None:
        default = _FULL[name.removeprefix("--").replace("-", "_")]
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(name, help=f"{what}; default: {shown}", **kind)

    add("--ranks", "TP sizes", type=positive, nargs="+")
    add("--batch", "requests that decode at a time", type=positive, nargs="+")
    add("--contexts", "lengths of prompts to compare", type=positive, nargs="+")
    add("--rounds", "measurements of each kind, in turns", type=positive)
    add("--seconds", "of each measurement", type=float)
    add("--idle-seconds", "for which the idle runtime is watched", type=float)
    add("--retries", "measurements that may be repeated for being disturbed, in all", type=int)
    parser.add_argument("--lookahead", type=int, nargs="+", default=[0, 2], help="default: 0 2")
    parser.add_argument("--step-ms", type=float, default=1.0, help="what a step takes; default: 1")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter, where nothing is given")


@dataclass(slots=True)
class Cell:
    """What was measured of one kind of load, in several rounds."""

    ranks: int
    lookahead: int
    batch: int
    context: int
    rounds: list[Window]

    def cpu(self, part: str) -> float:
        """Median of the rounds, µs a step; of the other ranks: each."""
        return quantile([window.cpu.get(part, 0.0) for window in self.rounds], 0.5)

    def all_cpu(self) -> list[float]:
        """All processes together, by round, lowest first."""
        return sorted(
            sum(cost * (self.ranks - 1 if part == "other ranks" else 1) for part, cost in window.cpu.items())
            for window in self.rounds
        )

    def period(self, share: float) -> float:
        """A quantile over all rounds, ms."""
        return quantile([period for window in self.rounds for period in window.periods], share)

    def gap(self, share: float) -> float:
        """A quantile over all rounds, µs."""
        return quantile([gap for window in self.rounds for gap in window.gaps], share)

    def to_json(self) -> dict[str, Any]:
        """Numbers by round; of periods and gaps the quantiles."""
        shares = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        return {
            "ranks": self.ranks,
            "lookahead": self.lookahead,
            "batch": self.batch,
            "context": self.context,
            "all_cpu_us": self.all_cpu(),
            "rounds": [
                {
                    "steps": window.steps,
                    "others": window.others,
                    "cpu_us": window.cpu,
                    "queued_us": window.queued,
                    "sleeps": window.sleeps,
                    "period_ms": {name: quantile(window.periods, share) for name, share in shares.items()},
                    "gap_us": {name: quantile(window.gaps, share) for name, share in shares.items()},
                }
                for window in self.rounds
            ],
        }


def run(options: argparse.Namespace) -> int:
    """Measures, prints tables, writes the JSON file."""
    for name, value in (_QUICK if options.quick else _FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    where, others = machine(), Others()
    steady, contexts, idle = asyncio.run(_measure(options))
    where["others"] = others.share()
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_cpu_table(steady))
    console.print(_pace_table([cell for cell in steady if cell.ranks <= where["cores"]]))
    console.print(_context_table(contexts))
    _say(console, steady, idle, options, where)
    save(
        options.json,
        {
            "machine": where,
            "options": vars(options),
            "steady": [cell.to_json() for cell in steady],
            "contexts": [cell.to_json() for cell in contexts],
            "idle_percent_of_a_core": idle,
        },
    )
    return 0


# ---------------------------------------------------------------------------------------- measuring


async def _measure(options: argparse.Namespace) -> tuple[list[Cell], list[Cell], dict[str, float]]:
    steady = []
    retries = iter(range(options.retries))
    for ranks in options.ranks:
        async with _runtimes(ranks, options.lookahead, options) as runtimes:
            steady += await _rounds(runtimes, ranks, options.batch, [min(options.contexts)], options, retries)
        print(f"{ranks} ranks measured", file=sys.stderr)
    async with _runtimes(GOAL_RANKS, [GOAL_LOOKAHEAD], options) as runtimes:
        contexts = await _rounds(runtimes, GOAL_RANKS, [GOAL_BATCH], options.contexts, options, retries)
        await asyncio.sleep(IDLE_AFTER)
        idle = await runtimes[GOAL_LOOKAHEAD].idle(options.idle_seconds)
    return steady, contexts, idle


@asynccontextmanager
async def _runtimes(
    ranks: int, lookaheads: Sequence[int], options: argparse.Namespace
) -> AsyncIterator[dict[int, Driven]]:
    """A runtime for each lookahead; those that are not used sleep."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runtimes = {}
        for lookahead in lookaheads:
            driven = Driven.start(
                folder,
                options.step_ms / 1000,
                tensor_parallel_size=ranks,
                lookahead=lookahead,
                max_num_seqs=max([*options.batch, GOAL_BATCH]),
                max_num_batched_tokens=8192,
            )
            runtimes[lookahead] = await stack.enter_async_context(driven)
        yield runtimes


async def _rounds(
    runtimes: dict[int, Driven],
    ranks: int,
    batches: Sequence[int],
    contexts: Sequence[int],
    options: argparse.Namespace,
    retries: Iterator[int],
) -> list[Cell]:
    cells = [
        Cell(ranks, lookahead, batch, context, [])
        for lookahead in runtimes
        for batch in batches
        for context in contexts
    ]
    for _ in range(options.rounds):
        for cell in sorted(cells, key=lambda cell: (cell.batch, cell.context)):  # lookaheads in turns
            window = await _undisturbed(runtimes[cell.lookahead], cell, options.seconds, retries)
            cell.rounds.append(window)
    return cells


async def _undisturbed(driven: Driven, cell: Cell, seconds: float, retries: Iterator[int]) -> Window:
    """A measurement beside which little else went on, or the least disturbed of those that were allowed."""
    best = await driven.decode(cell.batch, cell.context, seconds)
    while best.others > DISTURBED and next(retries, None) is not None:
        again = await driven.decode(cell.batch, cell.context, seconds)
        best = min(best, again, key=lambda window: window.others)
    return best


# ----------------------------------------------------------------------------------------- printing


def _cpu_table(cells: Sequence[Cell]) -> Table:
    table = Table("ranks", "lookahead", "batch", title="CPU time of a step in steady decode, µs")
    _add_columns(table, *PARTS, "all", "rounds", "all ÷ smallest batch")
    for cell in cells:
        smallest = next(c for c in cells if (c.ranks, c.lookahead) == (cell.ranks, cell.lookahead))
        growth = f"{_median(cell) / _median(smallest):.1f}"
        table.add_row(*_names(cell), *_cpu_columns(cell), growth, end_section=cell.batch == cells[-1].batch)
    return table


def _pace_table(cells: Sequence[Cell]) -> Table:
    table = Table("ranks", "lookahead", "batch", title="How steps follow each other")
    _add_columns(table, "period median, ms", "p90", "p99", "gap median, µs", "p90", "p99")
    for cell in cells:
        periods = (f"{cell.period(share):.3f}" for share in (0.5, 0.9, 0.99))
        gaps = (f"{cell.gap(share):.0f}" for share in (0.5, 0.9, 0.99))
        table.add_row(*_names(cell), *periods, *gaps, end_section=cell.batch == cells[-1].batch)
    return table


def _context_table(cells: Sequence[Cell]) -> Table:
    kind = f"batch {GOAL_BATCH}, {GOAL_RANKS} ranks, lookahead {GOAL_LOOKAHEAD}"
    title = f"CPU time of a step at short and long contexts, µs: {kind}"
    table = Table("context", title=title)
    _add_columns(table, *PARTS, "all", "rounds", "period median, ms", "p99")
    for cell in cells:
        steps = sum(window.steps for window in cell.rounds) // len(cell.rounds)
        pace = (f"{cell.period(share):.3f}" for share in (0.5, 0.99))
        table.add_row(f"{cell.context} … {cell.context + steps}", *_cpu_columns(cell), *pace)
    return table


def _add_columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right")


def _names(cell: Cell) -> tuple[str, str, str]:
    return str(cell.ranks), str(cell.lookahead), str(cell.batch)


def _cpu_columns(cell: Cell) -> list[str]:
    parts = [f"{cell.cpu(part):.0f}" if part in cell.rounds[0].cpu else "–" for part in PARTS]
    together = cell.all_cpu()
    return [*parts, f"{_median(cell):.0f}", f"{together[0]:.0f} … {together[-1]:.0f}"]


def _median(cell: Cell) -> float:
    return quantile(cell.all_cpu(), 0.5)


def _say(
    console: Console,
    steady: Sequence[Cell],
    idle: dict[str, float],
    options: argparse.Namespace,
    where: dict[str, Any],
) -> None:
    for cell in steady:
        if (cell.ranks, cell.lookahead, cell.batch) == (GOAL_RANKS, GOAL_LOOKAHEAD, GOAL_BATCH):
            console.print(
                f"Batch {GOAL_BATCH}, {GOAL_RANKS} ranks, lookahead {GOAL_LOOKAHEAD}: median period "
                f"{cell.period(0.5):.3f} ms (goal for steps of 1 ms: at most {GOAL_PERIOD:g})",
                highlight=False,
            )
    parts = ", ".join(f"{part} {percent:.2f}" for part, percent in idle.items())
    windows = [window for cell in steady for window in cell.rounds]
    disturbed = sum(window.others > DISTURBED for window in windows)
    console.print(
        f"Idle, {GOAL_RANKS} ranks, {options.idle_seconds:g} s long from {IDLE_AFTER:g} s after the last "
        f"request: {sum(idle.values()):.2f} % of a core (goal: under {GOAL_IDLE:g}; {parts})\n"
        f"{where['cpu']}, {where['cores']} cores; Linux {where['kernel']}, Python {where['python']}, torch "
        f"{where['torch']}; other programs took {where['others']:.2f} cores, and more than {DISTURBED:g} in "
        f"{disturbed} of {len(windows)} measurements\n"
        f"{options.rounds} rounds in turns, {options.seconds:g} s each, steps of {options.step_ms:g} ms, "
        f"context {min(options.contexts)} where nothing is said\n{where['command']}",
        highlight=False,
    )
