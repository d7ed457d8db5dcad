"""A rank that measures itself, for benchmarks/steps/gpu_run.py: kernels by the profiler, and graphs alone.

What it is to do is a key of the model's config.json (`Task`), since a rank is told nothing but its model.
With which steps it is to do it, the requests' seeds say, which mean nothing else for greedy ones: each batch
has a number of its own. In a batch with an even number steps are left alone, and only their lengths are
noted, for the graphs alone at the same lengths; in one with an odd number they are traced. 0: neither.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.steps.routing import UniformRouting
from benchmarks.steps.stand_ins import stand_in
from tpworker.ipc.child import RankBoot, run_child
from tpworker.ipc.messages import BatchPlan
from tpworker.model.moe import Moe
from tpworker.rank.device import CpuDevice, Device
from tpworker.rank.graphs import GREEDY
from tpworker.rank.process import run_rank
from tpworker.rank.runner import Launched, Runner

TASK = "tpworker_benchmark"
"""The key."""
TRACE_FROM = 12
"""Steps of a batch after which the profiler starts."""
POINTS = 8
"""Lengths at which graphs alone are timed, over those that the batch had."""
REPLAYS, WARM_REPLAYS = 12, 3
MOST_SINGLE = 200
"""Replays that are timed one by one."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a rank of a benchmark does besides its work."""

    report: str
    """A file's path, to which '.rank0' is added."""
    trace_steps: int
    replays: bool
    """Whether graphs alone are timed."""
    group: int
    """Size of the TP group; if there are fewer ranks, they stand for all of it (stand_ins.py)."""
    lengths: list[int] = field(default_factory=list)
    """Of the sequences, at which they are timed besides."""


@dataclass(slots=True)
class Noted:
    """The steps of a batch that nothing disturbs."""

    first_step: int
    slots: list[int]
    positions: Tensor  # int64 [num_slots + 1], when `first_step` begins
    num_steps: int = 0


class MeasuringRunner(Runner):
    """Notes and traces steps, by the numbers of their batches."""

    made: MeasuringRunner
    task: Task

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        MeasuringRunner.made = self
        self.noted: dict[int, Noted] = {}
        self.traces: dict[int, dict[str, Any]] = {}
        self._number = self._num_admitted = self._steady = self._first_traced = 0
        self._profiler: Any = None
        mixtures = [layer.mlp for layer in self.steps.decoder.weights.layers if isinstance(layer.mlp, Moe)]
        self._routing = UniformRouting(mixtures, self.sampler.counter) if mixtures else None

    def launch(self, plan: BatchPlan) -> Launched:
        launched = super().launch(plan)
        for admission in plan.admitted:
            if admission.sampling.seed != self._number:
                self._number, self._num_admitted = admission.sampling.seed, 0
            self._num_admitted += 1
        size = len(self._decode)
        is_same = plan.decode is None and not plan.chunks and size == self._num_admitted
        self._steady = self._steady + 1 if is_same else 0
        if self._number % 2:
            self._trace(plan.step, size)
        elif self._number and self._steady:
            self._note(plan.step, size)
        return launched

    def _note(self, step: int, size: int) -> None:
        if size not in self.noted:
            positions = torch.empty_like(self._slots.state.position)
            self.noted[size] = Noted(step + 1, list(self._decode), positions)
            self._device.compute.run(lambda: positions.copy_(self._slots.state.position))
        else:
            self.noted[size].num_steps = step + 1 - self.noted[size].first_step

    def _trace(self, step: int, size: int) -> None:
        try:
            if self._profiler is None and self._steady == TRACE_FROM and size not in self.traces:
                self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self._first_traced = step + 1
                self._profiler.start()
            elif self._profiler is not None and self._steady in (0, TRACE_FROM + self.task.trace_steps):
                profiler, self._profiler = self._profiler, None
                self.traces[self._num_admitted] = {"error": "the profiler did not end"}
                profiler.stop()
                self.traces[self._num_admitted] = collect(profiler, self._first_traced)
        except Exception as error:  # a trace may fail, and the steps go on
            self.traces[self._num_admitted] = {"error": f"{type(error).__name__}: {error}"}

    def report(self) -> dict[str, Any]:
        """What was found, after the last step."""
        with torch.inference_mode():
            for layer in (*self._cache.keys, *self._cache.values):
                layer.normal_()  # zeros would be read faster
            noted = {
                size: {
                    "first_step": noted.first_step,
                    "length": 1 + noted.positions[noted.slots].double().mean().item(),
                    **(self._alone(noted) if self.task.replays else {"graph_ms": [], "single_ms": []}),
                    "touched": self._routing.touched(size) if self._routing else None,
                }
                for size, noted in self.noted.items()
            }
        return {
            "noted": noted,
            "traces": self.traces,
            "kv_blocks": self._cache.num_blocks,
            "attention": type(self.steps.decoder.attention).__name__,
            "group": self.steps.decoder.shard.size,
        }

    def _alone(self, noted: Noted) -> dict[str, list[tuple[float, float]]]:
        """(mean length, ms of a step alone) at this batch's lengths, steps queued back to back.

        Returns:
            'graph_ms': means of several steps, at a few lengths. 'single_ms': of one step after the other,
            with an event behind each, as where they are served.
        """
        table = self._slots
        device = table.state.block_table.device
        entries = torch.arange(table.state.block_table.numel(), device=device) % (self._cache.num_blocks - 1)
        table.state.block_table.copy_((entries + 1).view_as(table.state.block_table))
        table.state.end.fill_(1 << 30)  # nobody is at an end here
        self.steps.batch_slots.fill_(table.num_slots)
        self.steps.batch_slots[: len(noted.slots)] = torch.tensor(noted.slots, device=device)
        spread = max(0, noted.num_steps - REPLAYS - WARM_REPLAYS)
        starts = [noted.positions + spread * point // (POINTS - 1) for point in range(POINTS)]
        starts += [torch.full_like(noted.positions, length - WARM_REPLAYS) for length in self.task.lengths]
        means = []
        for start in starts:
            length = self._begin_at(start, noted.slots)
            (milliseconds,) = self._times(len(noted.slots), 1, REPLAYS)
            means.append((length + (REPLAYS - 1) / 2, milliseconds))
        count = min(MOST_SINGLE, noted.num_steps - WARM_REPLAYS)
        length = self._begin_at(noted.positions + (noted.num_steps - count) // 2, noted.slots)
        single = [
            (length + place, each) for place, each in enumerate(self._times(len(noted.slots), count, 1))
        ]
        return {"graph_ms": means, "single_ms": single}

    def _begin_at(self, positions: Tensor, slots: list[int]) -> float:
        """Puts the sequences where they were; returns their mean length in the first step that is timed."""
        positions[-1] = 0  # the null slot
        self._slots.state.position.copy_(positions)
        return 1 + positions[slots].double().mean().item() + WARM_REPLAYS

    def _times(self, size: int, count: int, replays: int) -> list[float]:
        """ms of a step, `count` times, each the mean of so many `replays`; all are queued at once."""
        replay = partial(self.steps.decode, size, 0, GREEDY)
        compute = self._device.compute
        for _ in range(WARM_REPLAYS):
            compute.run(replay)
        events = [compute.record()]
        for _ in range(count):
            for _ in range(replays):
                compute.run(replay)
            events.append(compute.record())
        times = []
        for event in events:  # in their order, and soon after each: see the clock of `rank/cuda.py`
            event.synchronize()
            times.append(event.time_ns())
        return [(end - begin) / 1e6 / replays for begin, end in pairwise(times)]


class LastingCpuDevice(CpuDevice):
    """One whose streams still run when the last step is over."""

    def close(self) -> None:
        """Not yet."""


def collect(profiler: Any, first_step: int) -> dict[str, Any]:
    """What gpu_trace.py wants to know; kernels of a graph bear the number of the call that launched it."""
    launches: dict[int, tuple[int, int]] = {}
    found = []
    calls: Counter[str] = Counter()
    on_gpu = torch.autograd.DeviceType.CUDA
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if event.device_type() == on_gpu:
            if not name.startswith("Activity"):
                found.append((event.correlation_id(), name, event.start_ns(), event.duration_ns()))
        elif name.startswith("cu"):
            calls[name] += 1
            if name.startswith("cudaGraphLaunch"):
                launches[event.correlation_id()] = (event.start_ns(), event.duration_ns())
    order = sorted(launches, key=lambda number: launches[number])
    index = {number: place for place, number in enumerate(order)}
    # Copies between host and device have streams of their own, but for those in a graph.
    found = [run for run in found if run[0] in index or not run[1].startswith("Mem")]
    names = {name: place for place, name in enumerate(dict.fromkeys(run[1] for run in found))}
    origin = min((run[2] for run in found), default=0)
    return {
        "first_step": first_step,
        "names": list(names),
        "calls": dict(calls),
        "launches": [(launches[number][0] - origin, launches[number][1]) for number in order],
        "kernels": [
            (index.get(number, -1), names[name], start - origin, duration)
            for number, name, start, duration in found
        ],
    }


def run_measured(boot: RankBoot, runner: Any, task: type) -> None:
    """What such a process does: its rank's work, and the report of it.

    Args:
        runner: a class of runners that has `task`, the last one made as `made`, and its `report`.
        task: made of the key TASK of the model's config.json; has `group` and `report`.
    """
    config = json.loads((Path(boot.model) / "config.json").read_text())
    runner.task = wanted = task(**config[TASK])
    if wanted.group > boot.num_ranks:
        stand_in(wanted.group)
    device: Device
    if boot.settings.device == "cuda":
        from tpworker.rank.cuda import CudaDevice

        device = CudaDevice(boot.rank)
    else:
        device = LastingCpuDevice()
    run_rank(boot, device, runner)
    Path(f"{wanted.report}.rank{boot.rank}").write_text(json.dumps(runner.made.report()))


def main(boot: RankBoot) -> None:
    """What the process does."""
    run_measured(boot, MeasuringRunner, Task)


if __name__ == "__main__":
    run_child(RankBoot, main)
