"""What Prometheus can scrape: requests and their times, and how the runtime is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from tpworker.observe.watch import GpuState
from tpworker.outputs import Health, RequestOutput, RuntimeState, Stats, StepRecord
from tpworker.version import version

if TYPE_CHECKING:
    from tpworker.runtime.runtime import Runtime

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_EACH_TOKEN = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_RECOVERY = (0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120, 300)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


PROCESSES = ("rank", "scheduler", "standby", "keeper")
"""The kinds that may be lost. Each has a sample from the start, so that the first loss is a change."""


class _Registry(CollectorRegistry):
    """Without the times at which each series was made. They can be switched off for a whole process only."""

    def collect(self) -> Iterable[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """The metrics of one app, in a registry of its own: two apps in a process do not meet.

    Args:
        served_model_name: what clients call the model; None: what the runtime calls it.
    """

    def __init__(self, runtime: Runtime, served_model_name: str | None = None) -> None:
        self.registry = _Registry()
        self.requests = Counter(
            "tpworker_requests",
            "Requests to the API by outcome: ok, invalid, busy, unavailable, failed, disconnected.",
            ["outcome"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "tpworker_time_to_first_token_seconds",
            "From the request's arrival to each choice's first token.",
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        self.each_token = Histogram(
            "tpworker_time_per_output_token_seconds",
            "Mean time between a choice's tokens after the first.",
            buckets=_EACH_TOKEN,
            registry=self.registry,
        )
        self.whole = Histogram(
            "tpworker_request_duration_seconds",
            "From the request's arrival to each choice's end.",
            buckets=_WHOLE,
            registry=self.registry,
        )
        self.registry.register(_RuntimeCollector(runtime, served_model_name))


class Timing:
    """When the tokens of one request came."""

    def __init__(self, metrics: Metrics) -> None:
        """Create it when the request arrives."""
        self._metrics = metrics
        self._arrived = time.monotonic()
        self._first: dict[int, float] = {}

    def add(self, index: int, output: RequestOutput) -> None:
        """Some tokens of a choice, or its end, have come just now."""
        first = self._first.get(index)
        if first is not None and output.finish_reason is None:
            return
        now = time.monotonic()
        if first is None:
            first = self._first[index] = now
            self._metrics.first_token.observe(now - self._arrived)
        if output.finish_reason is not None:
            self._metrics.whole.observe(now - self._arrived)
            if output.num_output_tokens > 1:
                self._metrics.each_token.observe((now - first) / (output.num_output_tokens - 1))


class _RuntimeCollector(Collector):
    """Reads what the runtime tells of itself when it is scraped."""

    def __init__(self, runtime: Runtime, served_model_name: str | None) -> None:
        self._runtime = runtime
        self._name = served_model_name
        self._recoveries = Histogram(
            "tpworker_recovery_seconds",
            "From the notice of a lost process until requests went on.",
            buckets=_RECOVERY,
            registry=None,
        )
        self._last_seen = 0  # of the generations of processes, the last one whose coming has been counted

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not ask a runtime that has not started

    def collect(self) -> Iterable[Metric]:
        if self._runtime.device:  # else it is not known yet what will be served, and on what
            info = {
                "version": version(),
                "model": self._name or self._runtime.served_name,
                "tensor_parallel_size": str(self._runtime.config.tensor_parallel_size),
                "device": self._runtime.device,
                "speculative_method": self._runtime.speculation.method or "none",
            }
            yield InfoMetricFamily("tpworker", "What is served, and on what.", info)
        stats = self._runtime.stats()
        gauges = {
            "open_requests": ("Requests that are not ended.", stats.open),
            "running_requests": ("Requests that have got a slot, preempted ones included.", stats.running),
            "waiting_requests": (
                "Requests that have not got a slot yet, those being tokenised included.",
                stats.waiting,
            ),
            "free_kv_blocks": ("KV blocks that can be given out.", stats.free_blocks),
            "kv_blocks": ("KV blocks in all.", stats.total_blocks),
        }
        counters = {
            "steps": ("Steps of the model.", stats.steps),
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "cached_prompt_tokens": ("Tokens of prompts found in the prefix cache.", stats.cached_tokens),
            "output_tokens": ("Tokens generated.", stats.output_tokens),
            "preemptions": ("Requests put back into the queue for want of KV blocks.", stats.preemptions),
            "finished_requests": ("Requests that came to their end.", stats.finished),
            "aborted_requests": ("Requests aborted before it.", stats.aborted),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"tpworker_{name}", text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"tpworker_{name}", text, value)
        gap = GaugeMetricFamily(
            "tpworker_step_gap_seconds",
            "Time the device had nothing to do before a step, of the last steps.",
            labels=["quantile"],
        )
        gaps = step_gaps(stats.recent_steps)
        for quantile in (0.5, 0.99) if gaps else ():
            gap.add_metric([str(quantile)], gaps[int(quantile * (len(gaps) - 1))])
        yield gap
        yield from _fault_metrics(self._runtime.health(), stats)
        yield from self._recovery_times()
        if num_drafts := self._runtime.speculation.num_drafts:
            yield from _draft_metrics(stats, num_drafts)
        yield from _gpu_metrics(self._runtime.gpus())

    def _recovery_times(self) -> Iterable[Metric]:
        """The runtime remembers its last 64 events: what comes between two scrapes is far less."""
        for event in self._runtime.events:
            if event.kind == "recovered" and event.generation > self._last_seen:
                self._last_seen = event.generation
                self._recoveries.observe(event.seconds or 0.0)
        return self._recoveries.collect()


def _fault_metrics(health: Health, stats: Stats) -> Iterable[Metric]:
    """Whether it serves, and what became of its processes."""
    state = GaugeMetricFamily("tpworker_runtime_state", "1 for the state it is in.", labels=["state"])
    for name in get_args(RuntimeState):
        state.add_metric([name], float(name == health.state))
    yield state
    lost = CounterMetricFamily(
        "tpworker_lost_processes", "Processes that died, hung or raised, by kind.", labels=["process"]
    )
    for process, count in (dict.fromkeys(PROCESSES, 0) | dict(stats.lost)).items():
        lost.add_metric([process], count)
    yield lost
    for name, text, value in (
        ("restarts", "How often the processes were started anew.", stats.restarts),
        ("resumed_requests", "Requests that went on after a restart.", stats.resumed_requests),
    ):
        yield CounterMetricFamily(f"tpworker_{name}", text, value)


def _draft_metrics(stats: Stats, num_drafts: int) -> Iterable[Metric]:
    """How many drafts there were at each position, from 1 to `num_drafts`, and how many were right."""
    for name, text, counts in (
        ("draft_tokens", "Drafts that steps have checked, by their position.", stats.draft_tokens),
        ("accepted_draft_tokens", "Drafts that were right, and all before them.", stats.accepted_tokens),
    ):
        counter = CounterMetricFamily(f"tpworker_{name}", text, labels=["position"])
        for position, count in zip_longest(range(1, num_drafts + 1), counts, fillvalue=0):
            counter.add_metric([str(position)], count)
        yield counter
    last = stats.recent_steps[-1].num_drafts if stats.recent_steps else 0
    yield GaugeMetricFamily("tpworker_step_drafts", "Drafts of each request in the last step, at most.", last)


def _gpu_metrics(states: Sequence[GpuState]) -> Iterable[Metric]:
    """How the ranks' GPUs do. A GPU that does not tell something has no sample of it."""
    if not states:
        return
    labels = ["rank", "gpu", "uuid"]
    gauges: dict[str, tuple[str, Callable[[GpuState], float | None]]] = {
        "temperature_celsius": ("Temperature of the GPU.", lambda state: state.reading.temperature),
        "power_watts": ("Power that it draws.", lambda state: state.reading.power),
        "memory_used_bytes": ("Its memory in use, by all processes.", lambda s: s.reading.memory_used),
        "memory_bytes": ("Its memory in all.", lambda state: state.gpu.memory or None),
    }
    for name, (text, value) in gauges.items():
        gauge = GaugeMetricFamily(f"tpworker_gpu_{name}", text, labels=labels)
        for state in states:
            if (number := value(state)) is not None:
                gauge.add_metric(_gpu_labels(state), number)
        yield gauge
    ecc = CounterMetricFamily(
        "tpworker_gpu_ecc_errors", "Memory errors since the driver was loaded.", labels=[*labels, "kind"]
    )
    xid = CounterMetricFamily(
        "tpworker_gpu_xid_errors", "Critical errors (Xid) since the start; the log has them.", labels=labels
    )
    for state in states:
        reading = state.reading
        for kind, count in (("corrected", reading.ecc_corrected), ("uncorrected", reading.ecc_uncorrected)):
            if count is not None:
                ecc.add_metric([*_gpu_labels(state), kind], count)
        if state.num_xids is not None:
            xid.add_metric(_gpu_labels(state), state.num_xids)
    yield ecc
    yield xid


def _gpu_labels(state: GpuState) -> list[str]:
    return [str(state.rank), str(state.gpu.index), state.gpu.uuid]


def step_gaps(steps: Sequence[StepRecord]) -> list[float]:
    """Seconds between the end of a step and the start of the next, sorted.

    Only before steps that decode: before others there may have been no request at all.
    """
    return sorted(
        (after.started_ns - before.ended_ns) / 1e9
        for before, after in pairwise(steps)
        if after.step == before.step + 1 and after.num_decodes
    )
