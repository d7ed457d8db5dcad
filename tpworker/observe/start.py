"""Where the time of a start went, from what the ranks wrote on the status board.

Ranks wait for each other time and again, so a stage ends when the last of them has come through it: the
stages follow each other without gaps, and add up to the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpworker.ipc.board import Field, Phase, Row

_STAGES = {
    Phase.STARTING: "processes started",
    Phase.IMPORTING: "torch imported",
    Phase.OPENING: "devices opened",
    Phase.LOADING: "weights loaded",
    Phase.MEETING: "ranks connected",
    Phase.ALLOCATING: "KV cache allocated",
    Phase.WARMING_UP: "kernels warmed up",
    Phase.CAPTURING: "graphs captured",
}
"""What has been reached when the last rank has left a phase."""


_LATE_NS = 100_000_000
"""Less is not worth telling: of a rank that is later than the others, or of a stage that is shorter."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a start."""

    name: str
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class StartTimes:
    """The stages of a start, in their order."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(
        cls,
        ranks: Sequence[Row],
        began_ns: int,
        spawned_ns: int,
        ready_ns: int,
        before: str = "model found",
    ) -> StartTimes:
        """From the rows of all ranks, which are ready.

        Args:
            began_ns: when somebody asked for the start; CLOCK_MONOTONIC, as the other two.
            spawned_ns: when the first process was about to be started.
            ready_ns: when requests could come.
            before: what was done until the first process was started.
        """
        stages = [Stage(before, (spawned_ns - began_ns) / 1e9)]
        last = spawned_ns
        for phase, name in _STAGES.items():
            ends = [_left(row, phase) for row in ranks]
            end = max(ends, default=0)
            if end > last:
                parts = [_which(ends)] if end - last >= _LATE_NS else []
                if phase is Phase.LOADING:
                    parts.insert(0, _speed(ranks, (end - last) / 1e9))
                elif phase is Phase.WARMING_UP:
                    parts.insert(0, _compiled(ranks))
                note = ", ".join(part for part in parts if part)
                stages.append(Stage(name, (end - last) / 1e9, note))
                last = end
        stages.append(Stage("ready", (ready_ns - last) / 1e9))
        return cls(tuple(stages))

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(stage.seconds for stage in self.stages)

    def listed(self) -> str:
        """All stages in one line."""
        return ", ".join(f"{stage.name} {stage.seconds:.2f}" for stage in self.stages)

    def __str__(self) -> str:
        return f"ready in {self.total:.1f} s: {self.listed()}"

    def table(self) -> str:
        """A line a stage: its name, how long it took, and when it was over, in seconds; with a heading."""
        width = max(len(stage.name) for stage in self.stages)
        lines, at = [f"  {'':{width}}  {'stage':>6}  {'in all':>6}"], 0.0
        for stage in self.stages:
            at += stage.seconds
            note = f"  ({stage.note})" if stage.note else ""
            lines.append(f"  {stage.name:{width}}  {stage.seconds:6.2f}  {at:6.2f}{note}")
        return "\n".join(lines)


def _left(row: Row, phase: Phase) -> int:
    """When a rank went on to whatever came after a phase; 0 if it was never in it."""
    if phase is not Phase.STARTING and not row.entered(phase):
        return 0
    return next((at for later in Phase if later > phase and (at := row.entered(later))), 0)


def _which(ends: Sequence[int]) -> str:
    """Who was late, where that was one rank by more than a tenth of a second."""
    if len(ends) < 2:
        return ""
    second, last = sorted(ends)[-2:]
    late = last - second
    return f"rank {ends.index(last)} last, by {late / 1e9:.1f} s" if late > _LATE_NS else ""


def _compiled(ranks: Sequence[Row]) -> str:
    """What the rank that had most to compile has compiled: nearly all of it in this stage."""
    most = max(row[Field.COMPILED] for row in ranks)
    return f"{most} kernels compiled" if most else ""


def _speed(ranks: Sequence[Row], seconds: float) -> str:
    num_bytes = sum(row[Field.WEIGHTS] for row in ranks)
    return f"{num_bytes / 1e9:.1f} GB, {num_bytes / 1e9 / seconds:.1f} GB/s" if num_bytes else ""
