"""The admission barrier beside gloo's: 2, 4 and 8 processes on this machine, the two in turns.

release       from the last rank's coming to the last rank's leaving, all coming as fast as they can
back to back  from one barrier to the next
wake          the same as release, but the last rank comes 5 ms late and the others sleep
CPU           a rank's CPU time for one barrier, back to back

All times in µs. 'rounds' is the lowest and the highest median of a round: how far it can be trusted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.collectives.barrier_rank import Job
from benchmarks.common.options import positive
from benchmarks.common.report import Summary, machine, save
from tpworker.ipc.barrier import Barrier, default_spin

ROOT = Path(__file__).resolve().parents[2]
MEASURES = ("release", "back to back", "wake", "CPU")


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4, 8], help="default: 2 4 8")
    parser.add_argument("--rounds", type=positive, default=30, help="of each kind, in turns; default: 30")
    parser.add_argument("--steps", type=positive, default=200, help="barriers in a round; default: 200")
    parser.add_argument("--late-steps", type=int, default=10, help="those with a late rank; default: 10")
    parser.add_argument(
        "--spin", type=float, metavar="MICROSECONDS", help="of ours; default: what a rank would take"
    )
    parser.add_argument("--pin", action="store_true", help="each rank's main thread to one core, in turn")
    parser.add_argument("--no-gloo", action="store_true", help="ours alone (torch is not imported)")


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table, writes the JSON file."""
    kinds = ("ours",) if options.no_gloo else ("ours", "gloo")
    where, results = machine(), {}
    for num_ranks in options.ranks:
        rounds = _measure(num_ranks, kinds, options)
        results[num_ranks] = {kind: {m: Summary.of(rounds[kind][m]) for m in MEASURES} for kind in kinds}
        print(f"{num_ranks} ranks measured", file=sys.stderr)
    _print(results, kinds, options, where)
    save(options.json, {"machine": where, "options": vars(options), "microseconds": results})
    return 0


def _measure(num_ranks: int, kinds: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Starts the ranks; gives samples by kind, measure and round."""
    barrier = Barrier.create(num_ranks)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        try:
            for rank in range(num_ranks):
                job = Job(
                    fd=barrier.fd,
                    num_ranks=num_ranks,
                    rank=rank,
                    kinds=kinds,
                    rounds=options.rounds,
                    steps=options.steps,
                    late_steps=options.late_steps,
                    pin=options.pin,
                    spin=None if options.spin is None else options.spin * 1e-6,
                    store=f"{folder}/gloo",
                )
                command = [sys.executable, "-m", "benchmarks.collectives.barrier_rank", job.to_json()]
                ranks.append(
                    subprocess.Popen(command, cwd=ROOT, pass_fds=[barrier.fd], stdout=subprocess.PIPE)
                )
            answers = [json.loads(rank.communicate()[0] or "null") for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
            barrier.close()
    if None in answers:
        raise SystemExit(f"rank {answers.index(None)} failed")
    return {kind: samples([answer[kind] for answer in answers]) for kind in kinds}


def samples(answers: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """By measure and round, from what every rank noted of one kind."""
    num_rounds, num_steps = len(answers[0]["back"]), len(answers[0]["back"][0]["came"])

    def release(phase: str, i: int) -> list[float]:
        came = zip(*(answer[phase][i]["came"] for answer in answers), strict=True)
        left = zip(*(answer[phase][i]["left"] for answer in answers), strict=True)
        return [(max(out) - max(into)) / 1e3 for into, out in zip(came, left, strict=True)]

    def back_to_back(i: int) -> list[float]:
        left = answers[0]["back"][i]["left"]
        return [(after - before) / 1e3 for before, after in pairwise(left)]

    def cpu(i: int) -> list[float]:
        return [answer["back"][i]["cpu"] / 1e3 / num_steps for answer in answers]

    rounds = range(num_rounds)
    return {
        "release": [release("back", i) for i in rounds],
        "back to back": [back_to_back(i) for i in rounds],
        "wake": [release("late", i) for i in rounds],
        "CPU": [cpu(i) for i in rounds],
    }


def _print(
    results: dict[int, dict[str, dict[str, Summary]]],
    kinds: tuple[str, ...],
    options: argparse.Namespace,
    where: dict[str, Any],
) -> None:
    table = Table(
        "ranks", "µs", *(f"{kind} {column}" for kind in kinds for column in ("median", "p99", "rounds"))
    )
    if len(kinds) > 1:
        table.add_column("gloo ÷ ours")
    for column in table.columns[2:]:
        column.justify = "right"
    for num_ranks, by_kind in results.items():
        for measure in MEASURES:
            summaries = [by_kind[kind][measure] for kind in kinds]
            cells = [
                cell
                for s in summaries
                for cell in (f"{s.median:.2f}", f"{s.p99:.1f}", f"{s.low:.2f} … {s.high:.2f}")
            ]
            if len(kinds) > 1:
                cells.append(f"{summaries[1].median / summaries[0].median:.0f}")
            table.add_row(str(num_ranks), measure, *cells, end_section=measure == MEASURES[-1])
    spins = {n: default_spin(n) * 1e6 if options.spin is None else options.spin for n in results}
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f} before; Linux {where['kernel']}, "
        f"Python {where['python']}, torch {where['torch']}\n"
        f"ours spins for up to {', '.join(f'{spin:g} µs ({n} ranks)' for n, spin in spins.items())}; "
        f"{options.rounds} rounds in turns, {options.steps} barriers each ({options.late_steps} with a late "
        f"rank), {'pinned' if options.pin else 'not pinned'}\n{where['command']}",
        highlight=False,
    )
