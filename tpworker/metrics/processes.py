"""What only a group of processes knows: who waits for whom, and how long each part of a step takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tpworker.ipc.board import BOUNDS_NS, SpanTimes
from tpworker.metrics.histogram import Series, family
from tpworker.observe.states import ProcessState

_BOUNDS = tuple(bound / 1e9 for bound in BOUNDS_NS)


def process_metrics(states: Sequence[ProcessState]) -> Iterable[Metric]:
    """Of the scheduler, which comes first, and the ranks. Counters begin at 0 with every new process."""
    if not states:
        return
    scheduler, *ranks = states
    yield GaugeMetricFamily(
        "tpworker_steps_in_flight",
        "Steps that were sent to the ranks and are not answered; lookahead + 1 at most.",
        max(0, scheduler.num_launched - scheduler.num_completed),
    )
    yield family(
        "tpworker_compose_seconds",
        "From the scheduler's waking up until it has sent all plans that it could.",
        [_series(scheduler.compose)],
    )
    yield family(
        "tpworker_publish_seconds",
        "From the end of a step on the device until rank 0 has sent its tokens.",
        [_series(ranks[0].publish)],
    )
    if len(ranks) > 1:
        yield from _barrier_metrics(ranks)
    yield from _usage_metrics(states)


def _series(times: SpanTimes, **labels: str) -> Series:
    return Series(labels, _BOUNDS, times.counts, times.total_ns / 1e9)


def _barrier_metrics(ranks: Sequence[ProcessState]) -> Iterable[Metric]:
    yield family(
        "tpworker_barrier_wait_seconds",
        "From a rank's coming to a step's barrier until all had come.",
        [_series(state.barrier, rank=str(rank)) for rank, state in enumerate(ranks)],
    )
    last = CounterMetricFamily(
        "tpworker_barrier_last_arrivals",
        "Steps to whose barrier a rank came last, so that the others waited for it.",
        labels=["rank"],
    )
    for rank, state in enumerate(ranks):
        last.add_metric([str(rank)], state.last_arrivals)
    yield last


def _usage_metrics(states: Sequence[ProcessState]) -> Iterable[Metric]:
    cpu = CounterMetricFamily(
        "tpworker_process_cpu_seconds", "Processor time of the scheduler and the ranks.", labels=["process"]
    )
    memory = GaugeMetricFamily(
        "tpworker_process_resident_memory_bytes",
        "Their memory in RAM. What they share counts for each of them.",
        labels=["process"],
    )
    for state in states:
        if state.cpu_seconds is not None and state.resident_bytes is not None:
            cpu.add_metric([state.name], state.cpu_seconds)
            memory.add_metric([state.name], state.resident_bytes)
    yield cpu
    yield memory
