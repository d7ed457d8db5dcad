"""How long a step may take before somebody is at fault: as all processes of a group see it.

What the user gives holds as it is. Else the scheduler, which knows what each plan asks for and how long those
before took, chooses (scheduler/deadlines.py). It writes on its row of the status board what holds for all
plans in flight; ranks and the runtime read it there when they begin to wait.
"""

from __future__ import annotations

from tpworker.ipc.board import Field, Row

LONGEST_SECONDS = 60.0
"""Until it is known what steps take, and at most, unless a step has taken that long."""

SHORTEST_SECONDS = {"cpu": 5.0, "cuda": 4.0}
"""By kind of device, however quick steps are: longer than what is no fault and does not show in the time of
steps. The longest of that is a vocabulary that is read for grammars, 2 s of processor time for 262,000
tokens: the scheduler sends nothing meanwhile, and may have sent a plan to one rank and not to the next. On
the CPU, ranks and other programs take their part of the cores."""


def step_deadline(scheduler: Row, step_timeout: float) -> float:
    """Seconds to wait for what belongs to the steps in flight.

    Args:
        scheduler: its row of the status board.
        step_timeout: seconds that the user has given; 0: none.
    """
    return step_timeout or scheduler[Field.DEADLINE] / 1000 or LONGEST_SECONDS
