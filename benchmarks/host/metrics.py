"""What metrics cost: CPU time of one thread, in the process that embeds the runtime and in the others.

token     of a step that is delivered to `batch` requests, for each token: without anybody who listens, with
          what `Metrics` adds to a runtime, and the difference
step, request, span   one step told, one request's end told, one duration written to the status board
scrape    the whole page of a runtime with 8 ranks and no GPU

Steps are made here, and no processes are started. Rounds with metrics and without take turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import cast

from rich.console import Console
from rich.table import Table

from benchmarks.common.cpu import Others
from benchmarks.common.options import positive
from benchmarks.common.report import Summary, machine, save
from tpworker.config import RuntimeConfig
from tpworker.ipc.arrays import pack_int32, pack_int64
from tpworker.ipc.board import Board, Field, Span
from tpworker.ipc.messages import SchedulerLoad, StepOutput, StepTiming
from tpworker.metrics import Metrics
from tpworker.observe.looking import look
from tpworker.observe.snapshot import Snapshot
from tpworker.outputs import Health, Listener, RequestRecord, Stats, StepRecord
from tpworker.runtime.listeners import Listeners
from tpworker.runtime.requests import Requests
from tpworker.runtime.runtime import Runtime
from tpworker.runtime.settings import Speculation
from tpworker.sampling_params import SamplingParams

_RATES = (1000, 60000)
_CALLS = {"step": 1000, "request": 1000, "span": 1000, "scrape": 10}
_RANKS = 8
_MODEL_LEN = 131072


class _Runtime:
    """As much of a runtime as `Metrics` asks for: one that serves, and whose processes are all this one."""

    device, dtype, quantization, served_name, max_model_len = "cpu", "float32", "", "model", _MODEL_LEN
    config = RuntimeConfig(tensor_parallel_size=_RANKS, speculative_method="mtp")
    speculation = Speculation.of(config)
    events = ()

    def __init__(self, board: Board) -> None:
        self._board = board
        self.listeners = Listeners()

    def add_listener(self, listener: Listener) -> None:
        self.listeners.add(listener)

    def health(self) -> Health:
        return Health("ready")

    def stats(self) -> Stats:
        return Stats(9, 8, 1, 70, 100, 5, 4, 3, 2, 1, 0, 0, ())

    def snapshot(self) -> Snapshot:
        return look(self._board)

    def gpus(self) -> tuple[()]:
        return ()


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1, 16, 64, 256], help="default: 1 16 64 256"
    )
    parser.add_argument("--rounds", type=positive, default=20, help="default: 20")
    parser.add_argument("--steps", type=positive, default=400, help="of each round; default: 400")


def run(options: argparse.Namespace) -> int:
    """Measures, prints tables, writes the JSON file."""
    where, others = machine(), Others()
    names = ["scheduler", *(f"rank{rank}" for rank in range(_RANKS))]
    with closing(Board.create(names)) as board:
        for row in board.rows():
            row[Field.PID] = os.getpid()
        runtime = _Runtime(board)
        metrics = Metrics(cast(Runtime, runtime))
        tokens = {
            batch: _tokens(runtime.listeners, batch, options.rounds, options.steps) for batch in options.batch
        }
        calls = _calls(runtime, metrics, board)
        single = {
            name: Summary.of([[_each(call, _CALLS[name])] for _ in range(options.rounds)])
            for name, call in calls.items()
        }
    where["others"] = others.share()
    _print(tokens, single, where["others"])
    measured = {
        "machine": where,
        "token_ns": {
            str(batch): dict(zip(("without", "with"), both, strict=True)) for batch, both in tokens.items()
        },
        "call_ns": single,
    }
    save(options.json, measured)
    return 0


def _print(tokens: dict[int, tuple[Summary, Summary]], single: dict[str, Summary], others: float) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(
        "batch", "without, ns", "with, ns", "difference", *(f"at {rate:,}/s" for rate in _RATES),
        title="CPU time of a token", caption="median (lowest … highest) of the rounds; shares of a core",
    )  # fmt: skip
    for batch, (without, with_metrics) in tokens.items():
        difference = with_metrics.median - without.median
        shares = (f"{100 * difference * rate / 1e9:.2f} %" for rate in _RATES)
        shown = (_shown(summary, 1) for summary in (without, with_metrics))
        table.add_row(str(batch), *shown, f"{difference:.0f}", *shares)
    console.print(table)
    calls = Table("what", "µs", title="CPU time of a call")
    for name, summary in single.items():
        calls.add_row(name, _shown(summary, 1000))
    console.print(calls)
    print(f"other programs took {others:.2f} cores meanwhile")


def _calls(runtime: _Runtime, metrics: Metrics, board: Board) -> dict[str, Callable[[], object]]:
    """By name, what is done once."""
    step = StepRecord(0, 8, 256, 10**9, 10**9 + 5_000, 10**9 + 4_000_000)
    request = RequestRecord(
        "r", 0, "stop", None, 900, 512, 300, 0, 0, 0, 1.0, 1.1, 1.2, 1.3, 4.0, 4.1, SamplingParams()
    )
    row = board.row("rank0")
    return {
        "step": lambda: runtime.listeners.on_step(step),
        "request": lambda: runtime.listeners.on_request_end(request),
        "span": lambda: row.took(Span.BARRIER, 12_345),
        "scrape": metrics.text,
    }


def _shown(summary: Summary, unit: float) -> str:
    median, low, high = (value / unit for value in (summary.median, summary.low, summary.high))
    digits = 0 if unit == 1 else 2
    return f"{median:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def _tokens(listening: Listeners, batch: int, rounds: int, steps: int) -> tuple[Summary, Summary]:
    """ns a token, without metrics and with them."""
    found: tuple[list[list[float]], list[list[float]]] = ([], [])
    for _ in range(rounds):
        for listeners, samples in zip((Listeners(), listening), found, strict=True):
            samples.append([_deliver(Requests(listeners), batch, steps)])
    return Summary.of(found[0]), Summary.of(found[1])


def _deliver(requests: Requests, batch: int, steps: int) -> float:
    """CPU time of a token, ns, behind the first of each request."""
    numbers = [requests.open(str(index)).number for index in range(batch)]
    outputs = [_output(numbers, step) for step in range(steps + 1)]
    requests.deliver(outputs[0])
    began = time.thread_time_ns()
    for output in outputs[1:]:
        requests.deliver(output)
    return (time.thread_time_ns() - began) / (batch * steps)


def _output(numbers: Sequence[int], step: int) -> StepOutput:
    positions, tokens = pack_int32([step] * len(numbers)), pack_int32([7] * len(numbers))
    return StepOutput(
        0, step, pack_int64(numbers), positions, tokens, (), (), 0, len(numbers),
        StepTiming(0, 0, 0), SchedulerLoad(0, 0, 0, 0),
    )  # fmt: skip


def _each(call: Callable[[], object], times: int) -> float:
    """CPU time of a call, ns."""
    began = time.thread_time_ns()
    for _ in range(times):
        call()
    return (time.thread_time_ns() - began) / times
