"""The rank of `bench drafts`: drafts are right as often as it is told, and steps are noted, traced, replayed.

What it is to do is a key of the model's config.json (`DraftsTask`), and with which requests, their seeds say
(`imposed.Order`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.steps.gpu_rank import TRACE_FROM, collect, run_measured
from benchmarks.steps.imposed import AUTO, Imposed, Order
from benchmarks.steps.routing import UniformRouting
from tpworker.ipc.child import RankBoot, run_child
from tpworker.ipc.messages import BatchPlan
from tpworker.model.decoder import Decoder
from tpworker.model.moe import Moe
from tpworker.rank.graphs import GREEDY
from tpworker.rank.runner import Launched, Runner

REPLAYS, WARM_REPLAYS = 24, 4


@dataclass(frozen=True, slots=True)
class DraftsTask:
    """What a rank does besides its work."""

    report: str
    """A file's path, to which '.rank0' is added."""
    group: int
    """Size of the TP group; if there are fewer ranks, they stand for all of it (stand_ins.py)."""
    trace_steps: int
    length: int
    """Of sequences, at which steps are timed alone."""


class DraftsRunner(Runner):
    """See the module."""

    made: DraftsRunner
    task: DraftsTask

    def __init__(self, decoder: Decoder, *args: Any, **options: Any) -> None:
        super().__init__(decoder, *args, **options)
        DraftsRunner.made = self
        self._operations = self._slots.operations = Imposed(self._slots.operations, self._slots.seed)
        layers = [layer.mlp for layer in decoder.weights.layers]
        self._routings = (
            [UniformRouting(_mixtures(layers), self.sampler.counter)] if _mixtures(layers) else []
        )
        head = decoder.weights.mtp
        if head is not None and isinstance(head.layer.mlp, Moe):
            self._routings.append(UniformRouting([head.layer.mlp], self.sampler.counter))
        self.steady: dict[int, tuple[Order, list[int]]] = {}  # by number of the batch: its slots
        self.traces: dict[int, dict[str, Any]] = {}
        self._order, self._num_admitted, self._num_steady, self._first_traced = Order(1, 0), 0, 0, 0
        self._profiler: Any = None

    def launch(self, plan: BatchPlan) -> Launched:
        launched = super().launch(plan)
        for admission in plan.admitted:
            order = Order.of(admission.sampling.seed)
            if order != self._order:
                self._order, self._num_admitted = order, 0
            self._num_admitted += 1
        is_same = plan.decode is None and not plan.chunks and len(self._decode) == self._num_admitted
        self._num_steady = self._num_steady + 1 if is_same else 0
        if self._order.is_traced:
            self._trace(plan.step)
        elif self._num_steady == 1 and self._order.num_drafts != AUTO:
            self.steady.setdefault(self._order.number, (self._order, list(self._decode)))
        return launched

    def _trace(self, step: int) -> None:
        number = self._order.number
        try:
            if self._profiler is None and self._num_steady == TRACE_FROM and number not in self.traces:
                self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self._first_traced = step + 1
                self._profiler.start()
            elif self._profiler is not None and self._num_steady in (0, TRACE_FROM + self.task.trace_steps):
                profiler, self._profiler = self._profiler, None
                self.traces[number] = {"error": "the profiler did not end"}
                profiler.stop()
                self.traces[number] = collect(profiler, self._first_traced)
        except Exception as error:  # a trace may fail, and the steps go on
            self.traces[number] = {"error": f"{type(error).__name__}: {error}"}

    def report(self) -> dict[str, Any]:
        """What was found, after the last step."""
        with torch.inference_mode():
            for layer in (*self._cache.keys, *self._cache.values):
                layer.normal_()  # zeros would be read faster
            alone = {number: self._alone(order, slots) for number, (order, slots) in self.steady.items()}
        touched = {
            number: self._routings[0].touched(len(slots) * (1 + order.num_drafts)) if self._routings else None
            for number, (order, slots) in self.steady.items()
        }
        return {
            "graph_ms": alone,
            "touched": touched,
            "traces": self.traces,
            "kv_blocks": self._cache.num_blocks,
            "group": self.steps.decoder.shard.size,
        }

    def _alone(self, order: Order, slots: list[int]) -> float:
        """ms of a step alone, at the length that is asked for: the mean of steps queued back to back."""
        table, steps, compute = self._slots, self.steps, self._device.compute
        state, device = table.state, table.state.position.device
        entries = torch.arange(state.block_table.numel(), device=device) % (self._cache.num_blocks - 1)
        state.block_table.copy_((entries + 1).view_as(state.block_table))
        steps.batch_slots.fill_(table.num_slots)
        steps.batch_slots[: len(slots)] = torch.tensor(slots, device=device)
        tokens = sum((order.share / 1000) ** draft for draft in range(1 + order.num_drafts))
        state.position.fill_(max(1, int(self.task.length - tokens * (WARM_REPLAYS + REPLAYS / 2))))
        state.position[-1:].zero_()
        state.end.fill_(1 << 30)
        table.seed.fill_(order.seed)

        def step() -> None:
            steps.decode(len(slots), order.num_drafts, GREEDY)

        for _ in range(WARM_REPLAYS):
            compute.run(step)
        begun = compute.record()
        for _ in range(REPLAYS):
            compute.run(step)
        ended = compute.record()
        for event in (begun, ended):  # in their order, and soon after each: see the clock of `rank/cuda.py`
            event.synchronize()
        return (ended.time_ns() - begun.time_ns()) / 1e6 / REPLAYS


def _mixtures(layers: list[Any]) -> list[Moe]:
    return [layer for layer in layers if isinstance(layer, Moe)]


def main(boot: RankBoot) -> None:
    """What the process does."""
    run_measured(boot, DraftsRunner, DraftsTask)


if __name__ == "__main__":
    run_child(RankBoot, main)
