"""Which deadline holds for a process of the group."""

from __future__ import annotations

from contextlib import closing

from tpworker.ipc.board import Board, Field
from tpworker.ipc.deadlines import LONGEST_SECONDS, step_deadline


def test_what_is_given_comes_before_what_the_scheduler_has_chosen() -> None:
    with closing(Board.create(["scheduler"])) as board:
        row = board.row("scheduler")
        assert step_deadline(row, 0.0) == LONGEST_SECONDS, "nothing was chosen yet"
        assert step_deadline(row, 0.5) == 0.5
        row[Field.DEADLINE] = 7250
        assert step_deadline(row, 0.0) == 7.25
        assert step_deadline(row, 0.5) == 0.5
