"""What only a group of processes knows: who waits for whom, and how long each part of a step takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tpworker.ipc.board import BOUNDS_NS
from tpworker.ipc.child import board_names
from tpworker.metrics.histogram import Series, family
from tpworker.observe.snapshot import Rank, Snapshot

_BOUNDS = tuple(bound / 1e9 for bound in BOUNDS_NS)


def process_metrics(snapshot: Snapshot) -> Iterable[Metric]:
    """Of the scheduler and the ranks, if there are any. Counters begin at 0 with every new process."""
    scheduler, ranks = snapshot.scheduler, snapshot.ranks
    if not ranks:
        return
    yield GaugeMetricFamily(
        "tpworker_steps_in_flight",
        "Steps that were sent to the ranks and are not answered; lookahead + 1 at most.",
        max(0, scheduler.launched - scheduler.completed),
    )
    yield family(
        "tpworker_compose_seconds",
        "From the scheduler's waking up until it has sent all plans that it could.",
        [Series({}, _BOUNDS, scheduler.compose_buckets, scheduler.compose_seconds)],
    )
    yield family(
        "tpworker_publish_seconds",
        "From the end of a step on the device until rank 0 has sent its tokens.",
        [Series({}, _BOUNDS, scheduler.publish_buckets, scheduler.publish_seconds)],
    )
    if len(ranks) > 1:
        yield from _barrier_metrics(ranks)
    yield from _usage_metrics(snapshot)


def _barrier_metrics(ranks: Sequence[Rank]) -> Iterable[Metric]:
    yield family(
        "tpworker_barrier_wait_seconds",
        "From a rank's coming to a step's barrier until all had come.",
        [Series({"rank": str(one.rank)}, _BOUNDS, one.barrier_buckets, one.barrier_seconds) for one in ranks],
    )
    last = CounterMetricFamily(
        "tpworker_barrier_last_arrivals",
        "Steps to whose barrier a rank came last, so that the others waited for it.",
        labels=["rank"],
    )
    for one in ranks:
        last.add_metric([str(one.rank)], one.last_arrivals)
    yield last


def _usage_metrics(snapshot: Snapshot) -> Iterable[Metric]:
    cpu = CounterMetricFamily(
        "tpworker_process_cpu_seconds", "Processor time of the scheduler and the ranks.", labels=["process"]
    )
    memory = GaugeMetricFamily(
        "tpworker_process_resident_memory_bytes",
        "Their memory in RAM. What they share counts for each of them.",
        labels=["process"],
    )
    processes = (snapshot.scheduler, *snapshot.ranks)
    for name, process in zip(board_names(len(snapshot.ranks)), processes, strict=True):
        if process.cpu_seconds is not None and process.memory_bytes is not None:
            cpu.add_metric([name], process.cpu_seconds)
            memory.add_metric([name], process.memory_bytes)
    yield cpu
    yield memory
