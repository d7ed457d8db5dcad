"""One model with drafts, measured: first a runtime without, then one with them, each batch in turn.

How many drafts a batch gets, and how often they are right, its requests' seeds say (imposed.py), to a
scheduler and ranks of the benchmark's own (drafts_scheduler.py, drafts_rank.py).
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common.floors import floor_ms
from benchmarks.common.report import quantile
from benchmarks.steps.drafts_rank import DraftsTask
from benchmarks.steps.gpu_rank import TASK, TRACE_FROM
from benchmarks.steps.gpu_run import CONFIGS
from benchmarks.steps.gpu_trace import Trace, TraceFailed, figures
from benchmarks.steps.imposed import AUTO, CERTAIN, Order
from tpworker import Runtime, RuntimeConfig, SamplingParams
from tpworker.model.families import read_spec
from tpworker.outputs import Stats, StepRecord
from tpworker.runtime.settings import StepSizes

SIZES = StepSizes.of(RuntimeConfig(), "cuda")
"""Of steps, as they are by default on GPUs."""
_SETTLED = 5  # steps of a batch that are not looked at first
_TOKENS = 256  # every vocabulary has as many
_IMPOSING = ("_impose", "_stand_in")  # kernels


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row of the table."""

    batch: int
    num_drafts: int
    """Or AUTO: the scheduler chooses, of all there are."""
    acceptance: float = 0.0
    is_traced: bool = False


@dataclass(frozen=True, slots=True)
class DraftsCase:
    """What is measured of one model."""

    model: str
    """A folder of configs/, or any folder with a config.json."""
    ranks: int
    method: str
    """'ngram' or 'mtp'"""
    rows: Sequence[Wanted]
    """Those without drafts are measured in both runtimes."""
    num_prompt: int = 500
    num_output: int = 200
    trace_steps: int = 60
    layers: int = 0
    """Of the model, so many; 0: all."""
    device: str = "cuda"
    stand_ins: int = 0
    """How many ranks there are instead, each for several (stand_ins.py); 0: all of them."""

    @property
    def num_running(self) -> int:
        """Ranks that there are."""
        return self.stand_ins or self.ranks

    @property
    def num_drafts(self) -> int:
        """Most that a step has."""
        return max((row.num_drafts for row in self.rows if row.num_drafts != AUTO), default=1)

    def num_traced(self, wanted: Wanted) -> int:
        """Tokens of an output that lasts until its request is traced, though it begins before others do."""
        drafts = self.num_drafts if wanted.num_drafts == AUTO else wanted.num_drafts
        room = max(1, SIZES.max_num_batched_tokens - wanted.batch * (1 + drafts))
        prompt_steps = -(-wanted.batch * self.num_prompt // room)
        return (prompt_steps + TRACE_FROM + self.trace_steps + 10) * (1 + drafts)

    @property
    def max_model_len(self) -> int:
        """Room for every request."""
        longest = max(self.num_traced(row) if row.is_traced else self.num_output for row in self.rows)
        return self.num_prompt + longest + 16


def measure_drafts(case: DraftsCase) -> list[dict[str, Any]]:
    """A row for each that is wanted; prints them as JSON on the way. Rows of the runtime without drafts come
    first, and bear `method` ''."""
    rows: list[dict[str, Any]] = []
    for method in ("", case.method):
        wanted = [row for row in case.rows if method or not row.num_drafts]
        rows += _measure(case, method, wanted)
    for row in rows:
        plain = next(
            (other for other in rows if not other["method"] and other["batch"] == row["batch"]), None
        )
        if plain is not None and "tpot_ms" in row and "tpot_ms" in plain:
            row["gain"] = plain["tpot_ms"] / row["tpot_ms"]
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def _measure(case: DraftsCase, method: str, wanted: Sequence[Wanted]) -> list[dict[str, Any]]:
    """With one runtime."""
    folder = Path(case.model) if Path(case.model).is_dir() else CONFIGS / case.model
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as copy:
        config = json.loads((folder / "config.json").read_text())
        length = case.num_prompt + case.num_output // 2
        task = DraftsTask(f"{copy}/report", case.ranks, case.trace_steps, length)
        config[TASK] = asdict(task)
        if case.layers:
            config["num_hidden_layers"] = case.layers
        (Path(copy) / "config.json").write_text(json.dumps(config))
        rows = asyncio.run(_serve(Path(copy), case, method, wanted))
        report = json.loads(Path(f"{task.report}.rank0").read_text())
        spec = read_spec(Path(copy))
    for row in rows:
        number, traced = str(row.pop("number")), str(row.pop("traced", 0))
        row.update(model=case.model, ranks=report["group"], num_running=case.num_running, method=method)
        row.update(_traced(report["traces"][traced]) if traced in report["traces"] else {})
        if (graph := report["graph_ms"].get(number)) is not None:
            row["graph_ms"] = graph
            touched = report["touched"][number]
            row["floor_ms"] = floor_ms(spec, case.ranks, row["batch"], length, touched)
    took, kind = time.monotonic() - started, method or "no drafts"
    print(f"{case.model} TP {case.ranks}, {kind}: {took:.0f} s", file=sys.stderr, flush=True)
    return rows


def _traced(collected: dict[str, Any]) -> dict[str, Any]:
    """The figures of a trace, or why there are none."""
    try:
        trace = Trace.of(collected)
    except TraceFailed as error:
        return {"trace_failed": str(error)}
    steps = trace.steps.values()
    imposing = [
        kernel.end - kernel.start for step in steps for kernel in step if kernel.name.startswith(_IMPOSING)
    ]
    kept = ("gap_p50_us", "gap_p99_us", "idle_inside_us", "kernels", "kinds_us", "slowest", "traced_steps")
    found = {name: value for name, value in figures([trace]).items() if name in kept}
    return found | {"imposing_us": sum(imposing) / 1e3 / len(steps)}


# ---------------------------------------------------------------------------------------- the load


async def _serve(
    folder: Path, case: DraftsCase, method: str, wanted: Sequence[Wanted]
) -> list[dict[str, Any]]:
    numbers = count(1)
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    speculation = {"speculative_method": method, "num_speculative_tokens": case.num_drafts} if method else {}
    async with Runtime(
        folder,
        device=case.device,
        tensor_parallel_size=case.num_running,
        load_format="dummy",
        max_model_len=case.max_model_len,
        max_num_seqs=max(row.batch for row in case.rows),
        max_num_batched_tokens=SIZES.max_num_batched_tokens,
        prefix_caching=False,
        step_timeout=60,  # as in gpu_run
        max_restarts=0,
        rank_module="benchmarks.steps.drafts_rank",
        scheduler_module="benchmarks.steps.drafts_scheduler",
        **speculation,
    ) as runtime:
        ready = time.monotonic() - started
        for row in wanted:
            order = Order(next(numbers), row.num_drafts, round(CERTAIN * row.acceptance))
            found = await _decode(runtime, case, row, order, case.num_output)
            rows.append(found | {"ready_s": ready, "number": order.number})
        for row, found in zip(wanted, rows, strict=True):  # later, so that it disturbs nothing
            if row.is_traced:
                order = Order(next(numbers), row.num_drafts, round(CERTAIN * row.acceptance), is_traced=True)
                await _decode(runtime, case, row, order, case.num_traced(row))
                found["traced"] = order.number
    return rows


async def _decode(
    runtime: Runtime, case: DraftsCase, row: Wanted, order: Order, num_output: int
) -> dict[str, Any]:
    """Requests that all come at once, and the figures of the steps in which all of them decode."""
    draw = random.Random(order.number)
    before = runtime.stats()
    prompts = [draw.choices(range(_TOKENS), k=case.num_prompt) for _ in range(row.batch)]
    times = await asyncio.gather(*(_request(runtime, prompt, num_output, order.seed) for prompt in prompts))
    after = runtime.stats()
    client = fmean((last - first) / max(1, num_output - 1) for first, last in times)
    return {
        "batch": row.batch,
        "num_prompt": case.num_prompt,
        "num_output": num_output,
        "num_drafts": "auto" if row.num_drafts == AUTO else row.num_drafts,
        "wanted_acceptance": row.acceptance,
        "client_tpot_ms": 1e3 * client,
        **step_figures(before, after, row),
    }


async def _request(runtime: Runtime, prompt: list[int], num_output: int, seed: int) -> tuple[float, float]:
    """Seconds to the first token and to the last."""
    sampling = SamplingParams(
        seed=seed,
        temperature=0.0,
        max_tokens=num_output,
        min_tokens=num_output,
        ignore_eos=True,
        detokenize=False,
    )
    first, started = 0.0, time.monotonic()
    async for _ in runtime.generate(prompt, sampling):
        first = first or time.monotonic()
    return first - started, time.monotonic() - started


def step_figures(before: Stats, after: Stats, row: Wanted) -> dict[str, Any]:
    """Of a batch's steps, from what the runtime counts: time, tokens a request and step, time by tokens.

    With a number of drafts that is always the same the time is the median, else the mean, of steps in which
    all requests decode.
    """
    records = after.recent_steps[-(after.steps - before.steps) :]
    decodes = [step for step in records if not step.num_prefill_tokens]
    full = [step for step in decodes if step.num_decodes == row.batch]
    periods = _periods(full)[_SETTLED:]
    if not periods:
        return {"steps": 0}
    drafts = _since(before.draft_tokens, after.draft_tokens)
    accepted = _since(before.accepted_tokens, after.accepted_tokens)
    fixed = row.num_drafts not in (0, AUTO)
    num_fed = drafts[0] if fixed and drafts else sum(step.num_decodes for step in decodes)
    tokens = 1 + sum(accepted) / max(1, num_fed)
    step_ms = fmean(periods) if row.num_drafts == AUTO else quantile(periods, 0.5)
    return {
        "steps": len(periods),
        "step_ms": step_ms,
        "step_p99_ms": quantile(periods, 0.99),
        "tokens_a_step": tokens,
        "tpot_ms": step_ms / tokens,
        "acceptance": [right / many for right, many in zip(accepted, drafts, strict=True) if many],
        "mean_drafts": fmean(step.num_drafts for step in full),
    }


def _periods(steps: Sequence[StepRecord]) -> list[float]:
    """ms from a step's end to the next one's."""
    return [
        (step.ended_ns - before.ended_ns) / 1e6
        for before, step in pairwise(steps)
        if step.step == before.step + 1
    ]


def _since(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    """What was counted by position, which begins with nothing."""
    return [late - early for late, early in zip(after, before or (0,) * len(after), strict=True)]
