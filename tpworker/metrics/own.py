"""How a runtime does, by names of our own: its load, its steps, its faults."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tpworker.metrics.histogram import Histogram, family
from tpworker.metrics.recorder import Recorder
from tpworker.outputs import Health, RuntimeState, Stats

PROCESSES = ("rank", "scheduler", "standby", "keeper")
"""The kinds that may be lost. Each has a sample from the start, so that the first loss is a change."""


def load_metrics(stats: Stats) -> Iterable[Metric]:
    """Requests, tokens and KV blocks."""
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


def recorded_metrics(recorder: Recorder, lookahead: int) -> Iterable[Metric]:
    """Histograms of steps, of requests' preparation, and of recoveries."""
    histograms: dict[str, tuple[str, Histogram]] = {
        "step_seconds": ("From the start of a step on the device to its end.", recorder.step),
        "step_gap_seconds": (
            "Time for which the device had nothing to do before a step that decodes.",
            recorder.gap,
        ),
        "request_preparation_seconds": (
            "From a request's arrival until it could be queued: tokenised, and its grammar compiled.",
            recorder.preparation,
        ),
        "recovery_seconds": (
            "From the notice of a lost process until requests went on.",
            recorder.recovery,
        ),
    }
    for name, (text, histogram) in histograms.items():
        yield family(f"tpworker_{name}", text, [histogram.series()])
    yield family(
        "tpworker_steps_ahead",
        "Steps that had not ended when one that decodes was launched; 0: the device waited for the host.",
        [recorder.ahead.series(most=lookahead)],
    )


def fault_metrics(health: Health, stats: Stats) -> Iterable[Metric]:
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
        ("restarts", "How often the processes were started anew because one was lost.", stats.restarts),
        ("resumed_requests", "Requests that went on after a restart.", stats.resumed_requests),
    ):
        yield CounterMetricFamily(f"tpworker_{name}", text, value)


def draft_metrics(stats: Stats, recorder: Recorder, num_drafts: int) -> Iterable[Metric]:
    """How many drafts there were at each position, from 1 to `num_drafts`, and how many were right."""
    for name, text, counts in (
        ("draft_tokens", "Drafts that steps have checked, by their position.", stats.draft_tokens),
        ("accepted_draft_tokens", "Drafts that were right, and all before them.", stats.accepted_tokens),
    ):
        counter = CounterMetricFamily(f"tpworker_{name}", text, labels=["position"])
        for position, count in zip_longest(range(1, num_drafts + 1), counts, fillvalue=0):
            counter.add_metric([str(position)], count)
        yield counter
    last = 0 if recorder.last_step is None else recorder.last_step.num_drafts
    yield GaugeMetricFamily("tpworker_step_drafts", "Drafts of each request in the last step, at most.", last)
