"""A step that is not answered in time: whose fault that seems to be, from here."""

from __future__ import annotations

from collections.abc import Sequence

from tpworker.ipc.board import Field, Row
from tpworker.scheduler.guides import Guides
from tpworker.scheduler.inflight import InFlightPlans


class StepTimeout(Exception):
    """A step was not answered in time. `missing` are the ranks that are behind, for the report."""

    def __init__(self, message: str, missing: list[int]) -> None:
        super().__init__(message)
        self.missing = missing


class MasksUnwritten(Exception):
    """It is this process that keeps the ranks waiting: all before a step is answered, and it has no masks."""


def too_late(
    in_flight: InFlightPlans, is_given: bool, guides: Guides, ranks: Sequence[Row]
) -> StepTimeout | MasksUnwritten:
    """What to raise of the oldest plan.

    Args:
        in_flight: its plans; there is one.
        is_given: whether the deadline was, and not chosen.
        guides: of its requests.
        ranks: their rows of the board.
    """
    completed = [row[Field.COMPLETED] for row in ranks]
    behind = [rank for rank, steps in enumerate(completed) if steps == min(completed)]
    places = "; ".join(
        f"{row.name} received {row[Field.RECEIVED]}, admitted {row[Field.ADMITTED]}, "
        f"launched {row[Field.LAUNCHED]}, completed {row[Field.COMPLETED]}"
        for row in ranks
    )
    chosen = "--step-timeout" if is_given else "chosen from what steps took before"
    late = f"was not answered within {in_flight.deadline:.3g} s ({chosen})"
    oldest = in_flight.oldest
    if oldest.guided and not guides.has_written(oldest.step):
        return MasksUnwritten(f"step {oldest.step} {late}: its masks have not been written; {places}")
    return StepTimeout(
        f"a step {late}; steps of each rank: {places}",
        behind if len(behind) < len(ranks) or len(ranks) == 1 else [],
    )
