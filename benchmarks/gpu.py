"""Decode steps on GPUs: time per output token, and what of it is not the GPU's own work.

Public models' shapes (benchmarks/configs) with dummy weights; every size of group that the GPUs here allow.
Requests of 500 tokens in and 300 out, greedy, all at once; measured is the steady part, in which all decode.

TPOT      from a step's end to the next one's, by CUDA events, ms
replay    the same step's graph alone, queued back to back, at the middle context length: the floor
admitted  a request of 2000 tokens comes while others decode, as many as the largest batch less one: the
          longest of the steps that hold a chunk of it, and the time to its first token. Steps have up to 575
          tokens (512 of the prompt beside 63 that decode), or 2048 with more than 64 requests
gap       GPU idle time between the last kernel of a step and the first of the next, from a profiler's trace
idle      the other GPU idle time in a step, between its kernels, from the same trace
peer      vLLM 0.26.0's TPOT on this kind of machine, with its defaults
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import machine, quantile, save
from tpworker import Runtime, SamplingParams
from tpworker.outputs import StepRecord
from tpworker.settings import count_gpus

CONFIGS = Path(__file__).resolve().parent / "configs"
PEER: dict[tuple[str, int], dict[int, tuple[float, float]]] = {
    ("qwen3-0.6b", 1): {1: (1.75, 0.8), 16: (1.94, 1.0), 64: (3.23, 2.1), 256: (7.35, 6.0)},
    ("qwen3-8b", 1): {1: (5.22, 4.4), 16: (5.62, 4.8), 64: (7.08, 6.1)},
    ("qwen3-8b", 2): {1: (3.70, 2.8), 16: (4.05, 3.0), 64: (4.79, 3.8)},
    ("qwen3-8b", 4): {1: (2.84, 2.0), 16: (3.15, 2.2), 64: (3.87, 2.8)},
}
"""By model and TP size, by batch: the peer's TPOT and the goal, ms."""

_PROMPT, _OUTPUT = 500, 300
_LONG_PROMPT = 2000
_STEP_TOKENS = 575
_MANY_TOKENS = 2048  # or the first requests would end before the last ones begin
_SETTLED = 5  # steps of a batch that are not looked at first
_UNTRACED = 50  # steps until ranks begin to trace (gpu_rank.TRACE_FROM), which slows them down


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    shapes = [f"{model}:{ranks}" for model, ranks in PEER]
    told = f"model:TP; default, as far as GPUs go: {' '.join(shapes)}"
    parser.add_argument("--shapes", nargs="+", default=shapes, help=told)
    parser.add_argument("--batch", type=int, nargs="+", help="default: those that have a figure of the peer")
    parser.add_argument("--lookahead", type=int, nargs="+", default=[2, 0], help="default: 2 0")


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table, writes the JSON file."""
    num_gpus = count_gpus()
    shapes = [(shape.split(":")[0], int(shape.split(":")[1])) for shape in options.shapes]
    shapes = [(model, ranks) for model, ranks in shapes if ranks <= num_gpus]
    if not shapes:
        print(f"{num_gpus} GPUs are not enough for any of these shapes", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    for model, ranks in shapes:
        batches = options.batch or list(PEER.get((model, ranks), {1: ()}))
        for lookahead in options.lookahead:
            rows += measure(model, ranks, lookahead, batches)
            save(options.json, {"machine": machine(), "rows": rows})
    Console(width=170).print(_table(rows))
    return 0


def measure(model: str, ranks: int, lookahead: int, batches: list[int]) -> list[dict[str, Any]]:
    """A runtime of its own; each batch in turn."""
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((CONFIGS / model / "config.json").read_text())
        report = Path(folder) / "report"
        config["tpworker_benchmark_report"] = str(report)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        started = time.monotonic()
        rows = asyncio.run(_serve(Path(folder), ranks, lookahead, batches))
        measured = json.loads(Path(f"{report}.rank0").read_text())
        for row in rows:
            size = min(int(size) for size in measured["replay_ms"] if int(size) >= row["batch"])
            row.update(model=model, ranks=ranks, lookahead=lookahead)
            row["replay_ms"] = measured["replay_ms"][str(size)]
            row.update(measured["traces"].get(str(row["batch"]), {}))
            print(json.dumps(row), file=sys.stderr, flush=True)
        print(f"{model} TP {ranks}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return rows


async def _serve(folder: Path, ranks: int, lookahead: int, batches: list[int]) -> list[dict[str, Any]]:
    rows = []
    started = time.monotonic()
    async with Runtime(
        folder,
        device="cuda",
        tensor_parallel_size=ranks,
        lookahead=lookahead,
        load_format="dummy",
        max_model_len=2304,
        max_num_seqs=max(batches),
        max_num_batched_tokens=_STEP_TOKENS if max(batches) <= 64 else _MANY_TOKENS,
        prefix_caching=False,
        rank_module="benchmarks.gpu_rank",
    ) as runtime:
        ready = time.monotonic() - started
        admitted = await _admit(runtime, max(batches) - 1) if max(batches) > 1 else {}
        for batch in batches:
            steps = await _decode(runtime, batch)
            periods = [
                (step.ended_ns - before.ended_ns) / 1e6
                for before, step in pairwise(steps)
                if step.step == before.step + 1
            ]
            rows.append(
                {
                    "batch": batch,
                    **(admitted if batch == max(batches) else {}),
                    "ready_s": ready,
                    "steps": len(periods),
                    "tpot_ms": quantile(periods, 0.5),
                    "tpot_p99_ms": quantile(periods, 0.99),
                    "tpot_mean_ms": sum(periods) / len(periods),
                }
            )
    return rows


async def _admit(runtime: Runtime, batch: int) -> dict[str, float]:
    """A long prompt among requests that decode: milliseconds."""
    draw = random.Random(0)

    async def consume(num_prompt: int, num_output: int, out: list[int]) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True, detokenize=False)
        async for output in runtime.generate(draw.choices(range(1000), k=num_prompt), sampling):
            out.append(len(output.token_ids))

    others = [asyncio.create_task(consume(_PROMPT, _OUTPUT, [])) for _ in range(batch)]
    while not (records := runtime.stats().recent_steps) or records[-1].num_decodes < batch:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    earlier, asked = runtime.stats().steps, time.monotonic()
    await consume(_LONG_PROMPT, 1, [])
    ttft = time.monotonic() - asked
    stats = runtime.stats()
    records = stats.recent_steps[-(stats.steps - earlier) :]
    periods = [
        (step.ended_ns - before.ended_ns) / 1e6
        for before, step in pairwise(records)
        if step.num_prefill_tokens and step.num_decodes
    ]
    await asyncio.gather(*others)
    return {"admitted_tpot_ms": max(periods), "admitted_ttft_ms": 1000 * ttft, "admitted_steps": len(periods)}


async def _decode(runtime: Runtime, batch: int) -> list[StepRecord]:
    """The steps in which all requests decoded, and nothing else."""
    draw = random.Random(batch)
    sampling = SamplingParams(temperature=0.0, max_tokens=_OUTPUT, ignore_eos=True, detokenize=False)

    async def consume() -> None:
        async for _ in runtime.generate(draw.choices(range(1000), k=_PROMPT), sampling):
            pass

    earlier = runtime.stats().steps
    await asyncio.gather(*(consume() for _ in range(batch)))
    stats = runtime.stats()
    records = stats.recent_steps[-(stats.steps - earlier) :]
    steady = [step for step in records if step.num_decodes == batch and not step.num_prefill_tokens]
    return steady[_SETTLED:_UNTRACED] + steady[-60:-5]


def _table(rows: list[dict[str, Any]]) -> Table:
    names = ("TP", "batch", "lookahead", "TPOT", "p99", "replay", "TPOT ÷ replay", "gap p50, µs", "gap p99",
             "idle", "kernels", "admitted", "TTFT", "peer", "goal")  # fmt: skip
    table = Table("model", title="Decode steps, ms where nothing is said")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        peer, goal = PEER.get((row["model"], row["ranks"]), {}).get(row["batch"], ("–", "–"))
        table.add_row(
            row["model"],
            *(str(row[key]) for key in ("ranks", "batch", "lookahead")),
            *(f"{row[key]:.3f}" for key in ("tpot_ms", "tpot_p99_ms", "replay_ms")),
            f"{row['tpot_ms'] / row['replay_ms']:.3f}",
            *(f"{row.get(key, float('nan')):.1f}" for key in ("gap_p50_us", "gap_p99_us", "idle_inside_us")),
            f"{row.get('kernels', float('nan')):.0f}",
            *(f"{row.get(f'admitted_{what}_ms', float('nan')):.1f}" for what in ("tpot", "ttft")),
            str(peer),
            str(goal),
        )
    return table
