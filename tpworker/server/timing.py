"""Requests as their clients see them: how they ended, and when their tokens came."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from tpworker.metrics.histogram import Histogram, family
from tpworker.outputs import RequestOutput

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_EACH_TOKEN = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

OUTCOMES = ("ok", "invalid", "busy", "unavailable", "failed", "disconnected")
"""Of requests to the API. Each has a sample from the start, so that the first one is a change."""


class FrontMetrics(Collector):
    """What the HTTP front counts. Times are in seconds."""

    def __init__(self) -> None:
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self.first_token = Histogram(_FIRST_TOKEN)
        self.each_token = Histogram(_EACH_TOKEN)
        self.whole = Histogram(_WHOLE)

    def count(self, outcome: str) -> None:
        """A request to the API has ended so."""
        self._outcomes[outcome] += 1

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "tpworker_requests", f"Requests to the API by outcome: {', '.join(OUTCOMES)}.", labels=["outcome"]
        )
        for outcome, count in self._outcomes.items():
            requests.add_metric([outcome], count)
        yield requests
        for name, text, histogram in (
            (
                "time_to_first_token",
                "From the request's arrival to each choice's first token.",
                self.first_token,
            ),
            (
                "time_per_output_token",
                "Mean time between a choice's tokens after the first.",
                self.each_token,
            ),
            ("request_duration", "From the request's arrival to each choice's end.", self.whole),
        ):
            yield family(f"tpworker_{name}_seconds", text, [histogram.series()])


class Timing:
    """When the tokens of one request came."""

    def __init__(self, metrics: FrontMetrics) -> None:
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
