"""A listener that remembers."""

from __future__ import annotations

from collections.abc import Sequence

from tpworker import Listener, RequestRecord, RuntimeEvent, StepRecord


class Told(Listener):
    """Remembers all it is told."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.waits: list[float] = []
        self.intervals: list[tuple[int, float]] = []
        self.steps: list[StepRecord] = []
        self.events: list[RuntimeEvent] = []

    def on_event(self, event: RuntimeEvent) -> None:
        self.events.append(event)

    def on_request_end(self, record: RequestRecord) -> None:
        self.records.append(record)

    def on_first_tokens(self, waits: Sequence[float]) -> None:
        self.waits += waits

    def on_tokens(self, intervals: Sequence[tuple[int, float]]) -> None:
        self.intervals += intervals

    def on_step(self, step: StepRecord) -> None:
        self.steps.append(step)
