"""What GPUs do together: sums, choices and meetings of 2, 4 and 8 ranks, as far as there are GPUs.

sums      from a part of a sum on every rank to the normed residual stream, several ways, in turns; µs of one
          in a CUDA graph of 16, the slower rank's
layers    the same behind the product that makes the part: 4096 x 4096 weights, split over ranks, not in cache
lookups   rows of an embedding of 151936 x 4096, split over the ranks
choices   the best token of all ranks, from each rank's best
barriers  the admission barrier, on the host, beside NCCL's and a wait for the device: see 'bench barrier'
skew      a step comes to its barrier: from the first rank to the last, and how often each rank is the last;
          with NCCL, each step waits for the device, as programs without an admission barrier do

'rounds' is the lowest and the highest median of a round: how far a median can be trusted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.collectives.barrier import MEASURES, samples
from benchmarks.common.options import positive
from benchmarks.common.report import Summary, machine, quantile, save
from tpworker.ipc.barrier import Barrier
from tpworker.observe.gpus import count_gpus

TITLES = {
    "sums": "sum, residual and norm",
    "layers": "a product, and the sum of its results",
    "lookups": "rows of a split embedding",
    "choices": "choice among ranks",
}
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a rank is told."""

    store_fd: int
    barrier_fd: int
    size: int
    rank: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    rounds: int
    replays: int
    steps: int

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4, 8], help="default: 2 4 8")
    rows = [1, 4, 16, 64, 128, 256, 512, 1024, 2048]
    parser.add_argument(
        "--rows", type=positive, nargs="+", default=rows, help=f"default: {' '.join(map(str, rows))}"
    )
    parser.add_argument(
        "--columns", type=positive, nargs="+", default=[2560, 4096], help="default: 2560 4096"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="of each way, in turns; default: 5")
    parser.add_argument("--replays", type=positive, default=40, help="of 16 calls, in a round; default: 40")
    parser.add_argument("--steps", type=positive, default=200, help="barriers in a round; default: 200")
    parser.add_argument("--timeout", type=float, default=300, help="of one number of ranks; default: 300 s")


def run(options: argparse.Namespace) -> int:
    """Measures, prints tables, writes the JSON file."""
    num_gpus = count_gpus()
    sizes = [size for size in options.ranks if size <= num_gpus]
    if not sizes:
        print(f"{num_gpus} GPUs are not enough for {min(options.ranks)} ranks", file=sys.stderr)
        return 1
    results = {}
    for size in sizes:
        answers = _measure(size, options)
        results[size] = {
            **{what: {key: _summaries(answers, what, key) for key in answers[0][what]} for what in TITLES},
            "barriers": {
                name: {
                    measure: Summary.of(rounds)
                    for measure, rounds in samples([answer["barriers"][name] for answer in answers]).items()
                }
                for name in answers[0]["barriers"]
            },
            "skew": {name: _skew([answer["came"][name] for answer in answers]) for name in ("ours", "NCCL")},
        }
        save(options.json, {"machine": machine(), "options": vars(options), "microseconds": results})
        _print(size, results[size])
    return 0


def _measure(size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank answers; all are ended, whatever happens: one whose peer is gone would spin for ever."""
    barrier = Barrier.create(size)
    store = os.memfd_create("store")
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            job = Job(
                store_fd=store,
                barrier_fd=barrier.fd,
                size=size,
                rank=rank,
                rows=tuple(options.rows),
                columns=tuple(options.columns),
                rounds=options.rounds,
                replays=options.replays,
                steps=options.steps,
            )
            command = [sys.executable, "-m", "benchmarks.collectives.collectives_rank", job.to_json()]
            ranks.append(
                subprocess.Popen(command, cwd=ROOT, pass_fds=[store, barrier.fd], stdout=subprocess.PIPE)
            )
        answers = [json.loads(rank.communicate(timeout=options.timeout)[0] or "null") for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        barrier.close()
        os.close(store)
    if None in answers:
        raise SystemExit(f"rank {answers.index(None)} failed")
    return answers


def _summaries(answers: list[dict[str, Any]], what: str, key: str) -> dict[str, Summary]:
    """By way; of each replay the slowest rank's time."""
    return {
        way: Summary.of(
            [
                [max(times) for times in zip(*(answer[what][key][way][i] for answer in answers), strict=True)]
                for i in range(len(rounds))
            ]
        )
        for way, rounds in answers[0][what][key].items()
    }


def _skew(came: list[list[int]]) -> dict[str, Any]:
    """From every rank's times: µs between the first and the last, and each rank's share of being last."""
    steps = list(zip(*came, strict=True))[10:]
    spreads = [(max(times) - min(times)) / 1e3 for times in steps]
    last = Counter(times.index(max(times)) for times in steps)
    return {
        "p50": quantile(spreads, 0.5),
        "p99": quantile(spreads, 0.99),
        "last": [last[rank] / len(steps) for rank in range(len(came))],
    }


def _print(size: int, result: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    for what, title in TITLES.items():
        ways = list(dict.fromkeys(way for by_way in result[what].values() for way in by_way))
        table = Table("rows", *ways, title=f"{size} ranks: {title}, µs median / p99 (rounds)")
        for key, by_way in result[what].items():
            cells = [
                f"{s.median:.1f} / {s.p99:.1f}\n({s.low:.1f} … {s.high:.1f})"
                if (s := by_way.get(way))
                else "–"
                for way in ways
            ]
            table.add_row(key, *cells)
        console.print(table)
    table = Table("µs", "ours", "NCCL + synchronise", title=f"{size} ranks: barriers, median / p99")
    for measure in MEASURES:
        summaries = [result["barriers"][name][measure] for name in ("ours", "NCCL")]
        table.add_row(measure, *(f"{s.median:.1f} / {s.p99:.1f}" for s in summaries))
    skews = [result["skew"][name] for name in ("ours", "NCCL")]
    table.add_row("skew of steps", *(f"{s['p50']:.1f} / {s['p99']:.1f}" for s in skews))
    table.add_row("last to come", *(" ".join(f"{share:.0%}" for share in s["last"]) for s in skews))
    console.print(table)


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    return f"{summary.median:.1f} / {summary.p99:.1f}\n({summary.low:.1f} … {summary.high:.1f})"
