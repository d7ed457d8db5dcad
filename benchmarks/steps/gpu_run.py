"""One model at one TP size and lookahead, measured: a runtime of its own, each batch in turn.

Every batch runs twice. The first time nothing but the steps' own timing events is looked at; the second time
a profiler runs. What ranks do for it: gpu_rank.py.
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
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.common.floors import floor_ms
from benchmarks.common.report import quantile, told_ranks
from benchmarks.common.vocabulary import QUOTE, write_tokenizer
from benchmarks.steps.gpu_rank import TASK, TRACE_FROM, Task
from benchmarks.steps.gpu_trace import Trace, TraceFailed, figures, timeline
from tpworker import Runtime, RuntimeConfig, SamplingParams
from tpworker.model.families import read_spec
from tpworker.outputs import StepRecord
from tpworker.runtime.settings import StepSizes

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

DEFAULTS = StepSizes.of(RuntimeConfig(), "cuda")
LONG_PROMPT = 2000
_SETTLED = 5  # steps of a batch that are not looked at first
_AFTER_TRACE = 10
_SLACK = 16
_TOKENS = 256  # every vocabulary has as many
_LONG = ("timeline", "slowest", "calls", "graphs", "over_us", "spread_us")  # not printed


def _held(**of_strings: int) -> dict[str, Any]:
    """To a list of records that is longer than any answer here."""
    string = {"type": "string", **of_strings}
    record = {
        "name": string,
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["reader", "writer", "owner", None]},
        "tags": {"type": "array", "items": string, "maxItems": 4},
    }
    schema = {
        "type": "array",
        "minItems": 1000,
        "items": {
            "type": "object",
            "properties": record,
            "required": list(record),
            "additionalProperties": False,
        },
    }
    return {"structured_outputs": {"json": schema}}


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.8},
    "everything": {
        "temperature": 0.8,
        "min_p": 0.02,
        "top_k": 50,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "logit_bias": dict.fromkeys(range(0, 3000, 10), 1.0),
        "allowed_token_ids": range(30_000),
        "stop_token_ids": [7],  # suppressed all the time by min_tokens, which is max_tokens
        "logprobs": 20,
    },
    "structured": {"temperature": 0.8, **_held(), "logit_bias": {QUOTE: 10.0}},  # or no string would end
    "bounded": {"temperature": 0.8, **_held(maxLength=16), "logit_bias": {QUOTE: 10.0}},
}
"""What requests ask for; barred words are text, for which these models have no tokenizer. Where something is
structured they get one."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured with one runtime."""

    model: str
    """A folder of configs/, or any folder with a config.json."""
    ranks: int
    """Of the TP group."""
    lookahead: int
    batches: Sequence[int]
    num_prompt: int = 500
    num_output: int = 300
    trace_steps: int = 150
    admit: bool = True
    """Whether a long prompt is sent among as many requests as the largest batch has, less one."""
    replays: bool = True
    """Whether graphs alone are timed."""
    lengths: Sequence[int] = ()
    """At which they are timed besides."""
    device: str = "cuda"
    stand_ins: int = 0
    """How many ranks there are instead, each for several (stand_ins.py); 0: all of them."""
    slots: int = DEFAULTS.max_num_seqs
    """Of the runtime; at least as many as the largest batch has."""
    step_tokens: int = DEFAULTS.max_num_batched_tokens
    """Token budget of a step."""
    sampling: str = "greedy"
    """One of SAMPLINGS."""

    @property
    def num_running(self) -> int:
        """Ranks that there are."""
        return self.stand_ins or self.ranks

    @property
    def max_model_len(self) -> int:
        """Room for every request of the benchmark."""
        traced = max(self._num_traced(batch) for batch in self.batches)
        longest = [self.num_prompt + max(self.num_output, traced), *self.lengths]
        return max(longest + ([LONG_PROMPT + 1] if self.admit else [])) + _SLACK

    def _num_traced(self, batch: int) -> int:
        """Tokens of an answer that lasts until the last request is traced."""
        prefill_steps = -(-batch * self.num_prompt // (self.step_tokens - batch))
        return prefill_steps + TRACE_FROM + self.trace_steps + _AFTER_TRACE


def measure(case: Case, graphs: dict[int, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """A row for each batch; prints them as JSON on the way.

    Args:
        graphs: by batch, (length, ms of a graph alone); from earlier cases with the same model and TP size,
            to which this one adds its own.
    """
    folder = Path(case.model) if Path(case.model).is_dir() else CONFIGS / case.model
    with tempfile.TemporaryDirectory() as copy:
        config = json.loads((folder / "config.json").read_text())
        task = Task(f"{copy}/report", case.trace_steps, case.replays, case.ranks, list(case.lengths))
        config[TASK] = asdict(task)
        (Path(copy) / "config.json").write_text(json.dumps(config))
        if "structured_outputs" in SAMPLINGS[case.sampling]:
            write_tokenizer(Path(copy), config["vocab_size"])
        started = time.monotonic()
        rows = asyncio.run(_serve(Path(copy), case))
        reports = [
            json.loads(Path(f"{task.report}.rank{rank}").read_text()) for rank in range(case.num_running)
        ]
        spec = read_spec(Path(copy))
    for row in rows:
        noted = reports[0]["noted"].get(str(row["batch"]))
        steps = row.pop("step_records")
        if noted is not None:
            graphs.setdefault(row["batch"], []).extend(noted["graph_ms"])
            row["graphs"] = sorted(graphs[row["batch"]])
            row.update(_compared(steps, noted, row["graphs"]))
            row["touched"] = noted["touched"]
            row["floor_ms"] = floor_ms(spec, case.ranks, row["batch"], row["length"], noted["touched"])
        row.update(_traced([report["traces"].get(str(row["batch"])) for report in reports]))
        row.update(model=case.model, ranks=reports[0]["group"], num_running=len(reports))
        row.update(lookahead=case.lookahead)
        row.update(attention=reports[0]["attention"], kv_blocks=reports[0]["kv_blocks"])
        told = {key: value for key, value in row.items() if key not in _LONG}
        print(json.dumps(told), file=sys.stderr, flush=True)
    took = time.monotonic() - started
    shape = f"{case.model} TP {told_ranks(rows[0])} lookahead {case.lookahead}"
    print(f"{shape}: {took:.0f} s", file=sys.stderr, flush=True)
    return rows


def _compared(
    steps: Sequence[StepRecord], noted: dict[str, Any], graphs: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """Each step beside its graph alone at the same length.

    Args:
        steps: of one batch, in order; of those before `noted`'s first step nothing is said.
        noted: 'first_step' and 'length', the mean length of the sequences in that step, which grows by one;
            'single_ms', (length, ms) of single graphs alone, or nothing.
        graphs: (length, ms), ascending.
    """
    timed = [
        (noted["length"] + step.step - noted["first_step"], (step.ended_ns - before.ended_ns) / 1e6)
        for before, step in pairwise(steps)
        if step.step == before.step + 1 and step.step >= noted["first_step"] + _SETTLED
    ]
    if not timed:
        return {}
    lengths, periods = [length for length, _ in timed], [period for _, period in timed]
    row: dict[str, Any] = {
        "steps": len(timed),
        "length": quantile(lengths, 0.5),
        "tpot_ms": quantile(periods, 0.5),
        "tpot_p99_ms": quantile(periods, 0.99),
        "tpot_mean_ms": sum(periods) / len(periods),
    }
    if graphs:
        at, milliseconds = zip(*graphs, strict=True)
        alone = np.interp(lengths, at, milliseconds).tolist()
        row["graph_ms"] = quantile(alone, 0.5)
        row["tpot_over_graph"] = quantile([p / g for p, g in zip(periods, alone, strict=True)], 0.5)
        for name, steps_of in (("over", timed), ("spread", noted["single_ms"])):
            over = [1e3 * (ms - float(np.interp(length, at, milliseconds))) for length, ms in steps_of]
            if over:
                row[f"{name}_p50_us"], row[f"{name}_p99_us"] = quantile(over, 0.5), quantile(over, 0.99)
                row[f"{name}_us"] = [
                    (length, round(us, 1)) for (length, _), us in zip(steps_of, over, strict=True)
                ]
    return row


def _traced(collected: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """The figures of a trace, or why there are none."""
    try:
        if None in collected:
            return {"trace_failed": "the batch was not steady for long enough"}
        traces = [Trace.of(one) for one in collected if one is not None]
        return figures(traces) | {"timeline": timeline(traces[0])}
    except TraceFailed as error:
        return {"trace_failed": str(error)}


# ---------------------------------------------------------------------------------------- the load


async def _serve(folder: Path, case: Case) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    async with Runtime(
        folder,
        device=case.device,
        tensor_parallel_size=case.num_running,
        lookahead=case.lookahead,
        load_format="dummy",
        max_model_len=case.max_model_len,
        max_num_seqs=max(case.slots, *case.batches),
        max_num_batched_tokens=case.step_tokens,
        prefix_caching=False,
        step_timeout=60,  # a profiler that ends keeps its rank from steps for seconds
        max_restarts=0,  # what is lost is not measured
        rank_module="benchmarks.steps.gpu_rank",
    ) as runtime:
        ready = time.monotonic() - started
        admitted = await _admit(runtime, case) if case.admit and max(case.batches) > 1 else {}
        for index, batch in enumerate(case.batches):
            steps, seen = await _decode(runtime, case, batch, 2 * index + 2, case.num_output)
            row = {"batch": batch, "num_prompt": case.num_prompt, "num_output": case.num_output}
            row["step_records"] = [step for step in steps if step.num_decodes == batch]
            rows.append(row | seen | {"ready_s": ready} | (admitted if batch == max(case.batches) else {}))
        for index, batch in enumerate(case.batches):  # later, so that it disturbs nothing
            await _decode(runtime, case, batch, 2 * index + 3, case._num_traced(batch))
    return rows


async def _request(
    runtime: Runtime, prompt: list[int], num_output: int, number: int, asked: str = "greedy"
) -> tuple[float, float]:
    """Seconds to the first token and to the last."""
    sampling = SamplingParams(
        seed=number,
        max_tokens=num_output,
        min_tokens=num_output,
        ignore_eos="structured_outputs" not in SAMPLINGS[asked],  # there the grammar decides
        detokenize=False,
        **SAMPLINGS[asked],
    )
    first, started = 0.0, time.monotonic()
    async for _ in runtime.generate(prompt, sampling):
        first = first or time.monotonic()
    return first - started, time.monotonic() - started


async def _decode(
    runtime: Runtime, case: Case, batch: int, number: int, num_output: int
) -> tuple[list[StepRecord], dict[str, float]]:
    """Requests that all come at once: their steps without a prompt, and what their clients see.

    Args:
        number: see gpu_rank.py.
    """
    draw = random.Random(number)
    earlier = runtime.stats().steps
    prompts = [draw.choices(range(_TOKENS), k=case.num_prompt) for _ in range(batch)]
    began = time.monotonic()
    times = await asyncio.gather(
        *(_request(runtime, prompt, num_output, number, case.sampling) for prompt in prompts)
    )
    seen = {
        "total_s": time.monotonic() - began,
        "tokens_per_s": fmean(num_output / last for _, last in times),
        "client_tpot_ms": 1e3 * fmean((last - first) / max(1, num_output - 1) for first, last in times),
        "client_ttft_ms": 1e3 * fmean(first for first, _ in times),
    }
    stats = runtime.stats()
    records = stats.recent_steps[-(stats.steps - earlier) :]
    return [step for step in records if not step.num_prefill_tokens], seen


async def _admit(runtime: Runtime, case: Case) -> dict[str, float]:
    """A long prompt among requests that decode: milliseconds."""
    draw = random.Random(0)
    batch = max(case.batches) - 1

    def prompt(length: int) -> list[int]:
        return draw.choices(range(_TOKENS), k=length)

    others = [
        asyncio.create_task(_request(runtime, prompt(case.num_prompt), case.num_output, 0))
        for _ in range(batch)
    ]
    while not (records := runtime.stats().recent_steps) or records[-1].num_decodes < batch:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    earlier, asked = runtime.stats().steps, time.monotonic()
    await _request(runtime, prompt(LONG_PROMPT), 1, 0)
    ttft = time.monotonic() - asked
    stats = runtime.stats()
    records = stats.recent_steps[-(stats.steps - earlier) :]
    periods = [
        (step.ended_ns - before.ended_ns) / 1e6
        for before, step in pairwise(records)
        if step.num_prefill_tokens and step.num_decodes
    ]
    await asyncio.gather(*others)
    return {
        "admitted_mean_ms": fmean(periods),
        "admitted_max_ms": max(periods),
        "admitted_steps": len(periods),
        "admitted_ttft_ms": 1000 * ttft,
    }
