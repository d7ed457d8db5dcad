"""What a profiler saw of decode steps on the ranks' GPUs, and the figures that come of it. Needs no GPU.

A rank hands over (gpu_rank.collect), times in ns:

    {"first_step": of the first launch, "names": [kernel names], "calls": {CUDA call: how often},
     "launches": [[start, duration]], one a graph launch,
     "kernels": [[index of the launch, or -1, index of the name, start, duration]]}      or {"error": why not}

A step is what one graph launch ran. Clocks of two GPUs are not compared: of a collective, the rank that comes
last takes the shortest time for it, and what the others take longer they wait.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from benchmarks.common.report import quantile

KINDS = {
    "all-reduce": r"all_?reduce|all_?gather|nccl|reduce_add_norm|^_argmax$",
    "attention": r"flash|fmha|attend|prepare_varlen",
    "experts": r"^_(router_logits|choose|group|list_experts|gate_up|down|down_dense)$|expert|moe|grouped",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma|_one_row|_few_rows",
    "norms": r"norm|rotate|silu|rope|_places",
    "sampling": r"best_of|argmax|gumbel|_sample_row|sort|topk|softmax",
}
"""By kind, what a kernel's name holds; the first that fits counts, and the rest is 'other'. 'norms' are also
rotation with the writing of keys and values, and activations. A sum over ranks and the norm in one kernel
are an all-reduce; so is the choice of the best token of all ranks (`_argmax`)."""
_CONTINUES = "_combine"
"""Puts together what the kernel before it has left in parts: attention's, or the experts'."""
OTHER = "other"

UNSETTLED = 10
"""Steps after the profiler's start that are not looked at: it stops the launch thread for some time."""
_FEWEST = 10


class TraceFailed(Exception):
    """There is nothing to be read from a trace; says why."""


def kind_of(name: str) -> str:
    """What a kernel is for, a key of KINDS or OTHER."""
    return next((kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE)), OTHER)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One run of a kernel, times in ns."""

    name: str
    kind: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Trace:
    """One rank's, in order of time."""

    steps: dict[int, list[Kernel]]
    """By step; consecutive ones."""
    launches: dict[int, tuple[int, int]]
    """By step: the host's call, from, to."""
    others: list[Kernel]
    """Of no step: what applies a plan's deltas."""
    calls: dict[str, int]

    @classmethod
    def of(cls, collected: dict[str, Any]) -> Trace:
        """From what a rank collected. Raises TraceFailed."""
        if "error" in collected:
            raise TraceFailed(collected["error"])
        kinds = [kind_of(name) for name in collected["names"]]
        runs: list[list[Kernel]] = [[] for _ in collected["launches"]]
        others = []
        for launch, name, start, duration in sorted(collected["kernels"], key=lambda kernel: kernel[2]):
            kernel = Kernel(collected["names"][name], kinds[name], start, start + duration)
            if launch < 0:
                others.append(kernel)
            else:
                runs[launch].append(_after(runs[launch], kernel))
        # A graph of a few kernels would be no step, and a step at the edge of the trace may not be whole.
        most = max((len(run) for run in runs), default=0)
        whole = [index for index, run in enumerate(runs) if len(run) >= max(1, most // 2)]
        kept = whole[UNSETTLED:-1]
        if len(kept) < _FEWEST:
            raise TraceFailed(
                f"{len(whole)} whole steps in {len(runs)} graph launches, {len(collected['kernels'])} kernels"
            )
        first = collected["first_step"] + UNSETTLED
        launches = [collected["launches"][index] for index in kept]
        return cls(
            {first + place: runs[index] for place, index in enumerate(kept)},
            {first + place: (start, start + duration) for place, (start, duration) in enumerate(launches)},
            others,
            collected["calls"],
        )


def _after(earlier: Sequence[Kernel], kernel: Kernel) -> Kernel:
    """A step's next kernel, from the end of the one before: until then it is there to wait at most."""
    if not earlier:
        return kernel
    before = earlier[-1]
    kind = before.kind if kernel.name == _CONTINUES else kernel.kind
    start = max(kernel.start, before.end)
    return Kernel(kernel.name, kind, start, max(start, kernel.end))


def figures(traces: Sequence[Trace]) -> dict[str, Any]:
    """Of all ranks' traces of one batch; of rank 0 where one rank is meant. Times in µs of a step."""
    trace = traces[0]
    steps = list(trace.steps.values())
    gaps = [idle / 1e3 for idle in _gaps(trace)]
    spent: Counter[str] = Counter()
    for step in steps:
        for kernel in step:
            spent[kernel.kind] += kernel.end - kernel.start
    waits = {name: count for name, count in trace.calls.items() if _waits(name)}
    return {
        "traced_steps": len(steps),
        "kernels": median(len(step) for step in steps),
        "gap_p50_us": quantile(gaps, 0.5),
        "gap_p99_us": quantile(gaps, 0.99),
        "idle_inside_us": fmean(step[-1].end - step[0].start - covered(step) for step in steps) / 1e3,
        "kinds_us": {kind: spent[kind] / len(steps) / 1e3 for kind in (*KINDS, OTHER) if kind in spent},
        "slowest": _slowest(steps),
        "calls": trace.calls,
        "waiting_calls": waits,
        **_collectives(traces),
    }


def _gaps(trace: Trace) -> list[int]:
    """ns between two steps in which no kernel ran."""
    idle = []
    others = iter(trace.others)
    other = next(others, None)
    for before, after in pairwise(trace.steps.values()):
        end, start = max(kernel.end for kernel in before), after[0].start
        between = []
        while other is not None and other.start < start:
            if other.end > end:
                between.append(Kernel(other.name, other.kind, max(end, other.start), min(start, other.end)))
            other = next(others, None)
        idle.append(max(0, start - end - covered(between)))
    return idle


def covered(kernels: Iterable[Kernel]) -> int:
    """ns in which at least one of them ran; they are in order of their starts."""
    total, until = 0, 0
    for kernel in kernels:
        total += max(0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def _slowest(steps: Sequence[Sequence[Kernel]], number: int = 12) -> list[tuple[str, float, float]]:
    """The kernels that took most: name, how often in a step, µs of a step."""
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for step in steps:
        for kernel in step:
            times[kernel.name] += kernel.end - kernel.start
            counts[kernel.name] += 1
    return [
        (name, counts[name] / len(steps), time / len(steps) / 1e3) for name, time in times.most_common(number)
    ]


def _waits(call: str) -> bool:
    """The profiler's own end, a `cudaDeviceSynchronize`, is among what waits, once."""
    return "Synchronize" in call or call == "cudaMemcpy"


def _collectives(traces: Sequence[Trace]) -> dict[str, Any]:
    """Time in all-reduces of rank 0, what of it no rank can save, and the wait in a step's first one.

    The rank that waits least came last. Its share of the steps: `last_rank`.
    """
    if len(traces) < 2:
        return {}
    common = set.intersection(*(set(trace.steps) for trace in traces))
    total, own, skews, last = [], [], [], Counter[int]()
    for step in sorted(common):
        ranks = [
            [kernel.end - kernel.start for kernel in trace.steps[step] if kernel.kind == "all-reduce"]
            for trace in traces
        ]
        if not ranks[0] or len({len(durations) for durations in ranks}) > 1:
            continue
        total.append(sum(ranks[0]) / 1e3)
        own.append(sum(min(durations) for durations in zip(*ranks, strict=True)) / 1e3)
        firsts = [durations[0] for durations in ranks]
        skews.append((max(firsts) - min(firsts)) / 1e3)
        last[firsts.index(min(firsts))] += 1
    if not total:
        return {}
    return {
        "all_reduce_us": median(total),
        "all_reduce_own_us": median(own),
        "skew_p50_us": quantile(skews, 0.5),
        "skew_p99_us": quantile(skews, 0.99),
        "last_rank": [last[rank] / len(skews) for rank in range(len(traces))],
    }


def timeline(trace: Trace, number: int = 6) -> dict[str, Any]:
    """Some steps from the middle, to be drawn (timeline.py): µs from the first one's first kernel."""
    numbers = list(trace.steps)
    middle = max(0, (len(numbers) - number) // 2)
    chosen = numbers[middle : middle + number]
    origin = trace.steps[chosen[0]][0].start

    def span(start: int, end: int) -> list[float]:
        return [round((start - origin) / 1e3, 2), round((end - start) / 1e3, 2)]

    return {
        "steps": [
            {
                "step": step,
                "launch": span(*trace.launches[step]),
                "kernels": [[kernel.kind, *span(kernel.start, kernel.end)] for kernel in trace.steps[step]],
            }
            for step in chosen
        ]
    }
