"""A CUDA rank that measures itself, for benchmarks/gpu.py: kernels by the profiler, and graphs alone.

Where to write is a key of the model's config.json, since a rank is told nothing but its model.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import quantile
from tpworker.ipc.child import RankBoot, run_child
from tpworker.ipc.messages import BatchPlan
from tpworker.rank.cuda import CudaDevice
from tpworker.rank.graphs import GREEDY
from tpworker.rank.process import run_rank
from tpworker.rank.runner import Launched, Runner

REPORT = "tpworker_benchmark_report"
"""The key: a file's path, to which '.rank0' is added."""
TRACE_FROM = 60
TRACE_STEPS = 100
"""Which of the steps with an unchanged batch are traced."""
LAST_KERNEL = "index_copy"
REPLAYS = 50


class MeasuringRunner(Runner):
    """Traces some steps of every steady batch."""

    made: MeasuringRunner
    context = 650
    traces: dict[int, dict[str, Any]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        MeasuringRunner.made = self
        self.traces = {}
        self._steady = 0
        self._profiler: Any = None

    def launch(self, plan: BatchPlan) -> Launched:
        launched = super().launch(plan)
        is_same = plan.decode is None and not plan.chunks and not plan.admitted
        self._steady = self._steady + 1 if is_same else 0
        if self._steady == TRACE_FROM and len(self._decode) not in self.traces:
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        if self._profiler is not None and (self._steady == TRACE_FROM + TRACE_STEPS or not is_same):
            self._profiler.stop()
            if is_same:
                self.traces[len(self._decode)] = idle_times(self._profiler) | waiting_calls(self._profiler)
            self._profiler = None
        return launched

    def replays(self) -> dict[int, float]:
        """Milliseconds of one decode step by batch size: graphs queued back to back, nothing else."""
        table, times = self._slots, {}
        num_blocks = self._cache.num_blocks - 1
        with torch.inference_mode():
            entries = torch.arange(table.block_table.numel(), device=table.block_table.device) % num_blocks
            table.block_table.copy_((entries + 1).view_as(table.block_table))
            self._batch_slots.copy_(self._rows[:-1])
            for size, mode in self._graphs._replays:
                if mode != GREEDY:
                    continue
                replay = self._graphs.find(size, mode)
                assert replay is not None
                table.position.fill_(self.context - REPLAYS // 2 - 10)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(10):
                    replay()
                begin.record()
                for _ in range(REPLAYS):
                    replay()
                end.record()
                end.synchronize()
                times[size] = begin.elapsed_time(end) / REPLAYS
        return times


def idle_times(profiler: Any) -> dict[str, float]:
    """Microseconds of GPU idle time between the last kernel of a step and the first one of the next.

    A step's last kernel is the one that writes the token ring, the only one of its kind in a decode step.
    """
    kernels = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in profiler.profiler.kineto_results.events()
        if "CUDA" in str(event.device_type()) and not event.name().startswith(("Mem", "Activity"))
    )
    ends = [number for number, kernel in enumerate(kernels[:-1]) if LAST_KERNEL in kernel[2]]
    gaps = [max(0.0, (after[0] - before[1]) / 1e3) for before, after in pairwise(kernels)]
    if len(ends) < 10:
        return {}
    between = [gaps[end] for end in ends]
    inside = sum(gaps[ends[0] + 1 : ends[-1] + 1]) - sum(between[1:])
    return {
        "kernels": statistics.median(after - before for before, after in pairwise(ends)),
        "gap_p50_us": quantile(between, 0.5),
        "gap_p99_us": quantile(between, 0.99),
        "idle_inside_us": inside / (len(ends) - 1),
    }


def waiting_calls(profiler: Any) -> dict[str, Any]:
    """What was called of CUDA by any thread while steps were traced, and how often.

    The profiler's own end, `cudaDeviceSynchronize`, is among what waits, once.
    """
    calls = Counter(
        event.name()
        for event in profiler.profiler.kineto_results.events()
        if "CUDA" not in str(event.device_type()) and event.name().startswith("cu")
    )
    waits = {name: count for name, count in calls.items() if "Synchronize" in name or name == "cudaMemcpy"}
    return {"calls": dict(calls), "waiting_calls": waits}


def main(boot: RankBoot) -> None:
    """What the process does."""
    config = json.loads((Path(boot.model) / "config.json").read_text())
    run_rank(boot, CudaDevice(boot.rank), MeasuringRunner)
    runner = MeasuringRunner.made
    report = {"replay_ms": runner.replays(), "traces": runner.traces}
    Path(f"{config[REPORT]}.rank{boot.rank}").write_text(json.dumps(report))


if __name__ == "__main__":
    run_child(RankBoot, main)
