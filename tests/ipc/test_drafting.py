"""Which numbers of drafts plans may have."""

from __future__ import annotations

import pytest

from tpworker.ipc.drafting import MOST_ROWS, draft_choices, most_drafts
from tpworker.ipc.messages import MAX_DRAFTS


@pytest.mark.parametrize(
    ("num_drafts", "choices"),
    [(0, (0,)), (1, (0, 1)), (2, (0, 1, 2)), (3, (0, 1, 3)), (5, (0, 1, 2, 5)), (8, (0, 1, 2, 4, 8))],
)
def test_choices_are_none_all_and_halves(num_drafts: int, choices: tuple[int, ...]) -> None:
    assert draft_choices(num_drafts) == choices


@pytest.mark.parametrize("num_sampled", [1, 56, 57, 102, 103, 256, 257, 4096])
def test_a_plan_has_as_many_as_its_rows_leave_room_for(num_sampled: int) -> None:
    choices = draft_choices(MAX_DRAFTS)
    most = most_drafts(choices, num_sampled)
    assert not most or num_sampled * (1 + most) <= MOST_ROWS
    larger = [drafts for drafts in choices if drafts > most]
    assert all(num_sampled * (1 + drafts) > MOST_ROWS for drafts in larger)


def test_no_drafts_are_always_possible() -> None:
    assert most_drafts((0, 1), 10_000) == 0
