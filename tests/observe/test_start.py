"""Where the time of a start went."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tpworker.ipc import board as board_module
from tpworker.ipc.board import Board, Field, Phase, Row
from tpworker.observe.start import Stage, StartTimes

Enter = Callable[[Row, Phase, float], None]


@pytest.fixture
def ranks() -> Iterator[list[Row]]:
    board = Board.create(["rank0", "rank1"])
    yield board.rows()
    board.close()


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Enter:
    def enter(row: Row, phase: Phase, second: float) -> None:
        monkeypatch.setattr(board_module.time, "monotonic_ns", lambda: round(second * 1e9))
        row.enter(phase)

    return enter


def stages(times: StartTimes) -> list[Stage]:
    return [Stage(stage.name, round(stage.seconds, 3), stage.note) for stage in times.stages]


def of(ranks: list[Row], began: float, spawned: float, ready: float) -> StartTimes:
    return StartTimes.of(ranks, *(round(second * 1e9) for second in (began, spawned, ready)))


def test_a_stage_ends_when_the_last_rank_has_left_it(ranks: list[Row], enter: Enter) -> None:
    for rank, seconds in enumerate(([2, 3, 4, 7, 9, 10, 12, 13], [1.95, 3.5, 4, 9, 9, 10, 12, 13])):
        for phase, second in zip(Phase, [0, *seconds], strict=False):
            if phase is not Phase.STARTING:
                enter(ranks[rank], phase, second)
        ranks[rank][Field.WEIGHTS] = 5_000_000_000
        ranks[rank][Field.COMPILED] = 7 + rank
    times = of(ranks, 1, 1.25, 13.5)
    assert stages(times) == [
        Stage("model found", 0.25),
        Stage("processes started", 0.75),
        Stage("torch imported", 1.5, "rank 1 last, by 0.5 s"),
        Stage("devices opened", 0.5),
        Stage("weights loaded", 5.0, "10.0 GB, 2.0 GB/s, rank 1 last, by 2.0 s"),
        Stage("KV cache allocated", 1.0),
        Stage("kernels warmed up", 2.0, "8 kernels compiled"),
        Stage("graphs captured", 1.0),
        Stage("ready", 0.5),
    ]
    assert times.total == pytest.approx(12.5)
    assert str(times).startswith("ready in 12.5 s: model found 0.25, processes started 0.75, ")
    lines = times.table().splitlines()
    assert lines[0].split() == ["stage", "in", "all"]
    assert len(lines[0]) == len(lines[1])
    assert lines[1] == "  model found           0.25    0.25"
    assert lines[5] == ("  weights loaded        5.00    8.00  (10.0 GB, 2.0 GB/s, rank 1 last, by 2.0 s)")
    assert lines[-1].split() == ["ready", "0.50", "12.50"]


def test_phases_that_nobody_was_in_are_left_out(ranks: list[Row], enter: Enter) -> None:
    for row in ranks:
        for phase, second in ((Phase.IMPORTING, 2), (Phase.LOADING, 5), (Phase.READY, 6)):
            enter(row, phase, second)
    assert stages(of(ranks, 0, 1, 7)) == [
        Stage("model found", 1.0),
        Stage("processes started", 1.0),
        Stage("torch imported", 3.0),
        Stage("weights loaded", 1.0),
        Stage("ready", 1.0),
    ]


def test_who_is_late_is_told_where_it_took_time(ranks: list[Row], enter: Enter) -> None:
    """Rank 1 comes half a second later through all of them."""
    for row, late in zip(ranks, (0, 0.5), strict=True):
        for phase, second in ((Phase.IMPORTING, 2), (Phase.OPENING, 2.01), (Phase.READY, 3)):
            enter(row, phase, second + late)
    assert stages(of(ranks, 0, 1, 4)) == [
        Stage("model found", 1.0),
        Stage("processes started", 1.5, "rank 1 last, by 0.5 s"),
        Stage("torch imported", 0.01),
        Stage("devices opened", 0.99, "rank 1 last, by 0.5 s"),
        Stage("ready", 0.5),
    ]


def test_ranks_that_say_nothing(ranks: list[Row]) -> None:
    assert stages(of(ranks, 0, 1, 7)) == [Stage("model found", 1.0), Stage("ready", 6.0)]


def test_one_rank_is_not_the_last_of_any(ranks: list[Row], enter: Enter) -> None:
    enter(ranks[0], Phase.IMPORTING, 2)
    enter(ranks[0], Phase.READY, 5)
    assert [stage.note for stage in of(ranks[:1], 0, 1, 7).stages] == [""] * 4
