"""The scheduler and the ranks from outside: how far they are, how long they take, what they use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tpworker.ipc.board import Field, Row, Span, SpanTimes
from tpworker.observe.processes import Usage, usage_of


class ProcessState(NamedTuple):
    """How a process does. What it counts, it counts from its own start: another one begins at 0."""

    name: str
    """`tpworker-scheduler`, `tpworker-rank0`, …"""
    pid: int
    """0: it has not been started yet."""
    num_launched: int
    """Of a rank: steps handed to its device. Of the scheduler: plans that were sent."""
    num_completed: int
    """Of a rank: steps that its device has finished. Of the scheduler: plans that were answered."""
    last_arrivals: int
    """Of a rank: steps to whose barrier it came last, so that the others waited for it."""
    barrier: SpanTimes
    publish: SpanTimes
    compose: SpanTimes
    """See `Span`; all 0 where a process does no such thing."""
    cpu_seconds: float | None
    """Processor time of all its threads; None: it has ended."""
    resident_bytes: int | None
    """Its memory that is in RAM. What processes share counts for each of them; None: it has ended."""


def states_of(rows: Iterable[Row]) -> tuple[ProcessState, ...]:
    """What rows of the status board say, and the kernel of their processes. Takes some 50 µs for each."""
    return tuple(_state_of(row) for row in rows)


def _state_of(row: Row) -> ProcessState:
    pid = row[Field.PID]
    usage = usage_of(pid) if pid else Usage()
    return ProcessState(
        row.name,
        pid,
        row[Field.LAUNCHED],
        row[Field.COMPLETED],
        row[Field.LAST_ARRIVALS],
        row.times(Span.BARRIER),
        row.times(Span.PUBLISH),
        row.times(Span.COMPOSE),
        usage.cpu_seconds,
        usage.memory_bytes,
    )
