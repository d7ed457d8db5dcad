"""What the runtime tells on the status board, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing

import pytest

from tpworker.config import RuntimeConfig
from tpworker.ipc.board import Board, Field
from tpworker.ipc.child import board_names
from tpworker.ipc.listing import NUM_ENTRIES
from tpworker.outputs import RUNTIME_STATES, RuntimeState
from tpworker.runtime import telling as telling_module
from tpworker.runtime.intake import Intake
from tpworker.runtime.observable import Observable
from tpworker.runtime.telling import Telling


class Told:
    """A runtime as far as it is told of."""

    def __init__(self, board: Board) -> None:
        self.intake = Intake(100, 0, "fcfs", 3)
        self.board: Board | None = board
        self.state: RuntimeState = "ready"
        self.num_written = 0
        self.telling = Telling(self.intake, self._board, lambda: self.state, lambda: (2, 7))

    def _board(self) -> Board | None:
        self.num_written += 1
        return self.board


@pytest.fixture
def told() -> Iterator[Told]:
    with closing(Board.create(["tpworker-scheduler"])) as board:
        yield Told(board)


def test_state_counts_and_the_oldest_requests(told: Told) -> None:
    intake, requests = told.intake, told.intake.requests
    made = [requests.open(f"request-{number}") for number in range(NUM_ENTRIES + 3)]
    made[1].num_prompt = 12
    made[1].received.extend([5, 6, 7])
    requests._start(made[1].number, 0, 0.0)
    requests.close(made[0])
    intake.num_finished, intake.num_aborted = 30, 2
    told.state = "draining"
    told.telling.tell()
    assert told.board is not None
    row, listed = told.board.owner, told.board.listing.read()
    assert RUNTIME_STATES[row[Field.STATE] - 1] == "draining"
    assert (row[Field.RUNNING], row[Field.WAITING]) == (1, NUM_ENTRIES + 1)
    assert (row[Field.FINISHED], row[Field.ABORTED], row[Field.RESUMED]) == (30, 2, 7)
    assert row[Field.RESTARTS] == 2
    assert [one.name for one in listed] == [f"request-{number}" for number in range(1, NUM_ENTRIES + 1)]
    first = listed[0]
    assert (first.number, first.num_prompt, first.num_output) == (made[1].number, 12, 3)
    assert first.is_running
    assert first.arrived_ns == pytest.approx(made[1].times.arrived * 1e9)
    assert not listed[1].is_running


def test_it_goes_on_while_there_is_something_and_then_sleeps(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling_module, "INTERVAL_SECONDS", 0.001)

    async def main() -> None:
        told.intake._num_open = 1
        told.telling.wake()
        told.telling.wake()
        while told.num_written < 3:
            await asyncio.sleep(0.001)
        told.intake._num_open = 0
        while told.telling._timer is not None:
            await asyncio.sleep(0.001)
        count = told.num_written
        await asyncio.sleep(0.02)
        assert told.num_written == count, "it is idle"
        told.state = "recovering"
        told.board = None
        told.telling.wake()
        while told.num_written < count + 3:  # until there is a board again, and nothing starts any more
            await asyncio.sleep(0.001)
        told.telling.close()
        count = told.num_written
        await asyncio.sleep(0.02)
        assert told.num_written == count

    asyncio.run(main())


def test_who_sleeps_is_left_alone_until_there_are_processes_again(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling_module, "INTERVAL_SECONDS", 0.001)

    async def main() -> None:
        board, told.board, told.state = told.board, None, "sleeping"
        told.intake._num_open = 1
        told.telling.wake()
        while told.telling._timer is not None:
            await asyncio.sleep(0.001)
        told.board = board
        told.telling.wake()  # they are there; only then it is said to be awake
        count = told.num_written
        while told.num_written < count + 6:
            await asyncio.sleep(0.001)
        told.telling.close()

    asyncio.run(main())


class WithBoard(Observable):
    board: Board

    def _board(self) -> Board:
        return self.board


def test_a_snapshot_can_be_taken_in_any_thread_and_the_event_loops_alone_writes() -> None:
    async def main() -> None:
        runtime = WithBoard(RuntimeConfig(), None)
        runtime._home.enter()
        with closing(Board.create(board_names(2))) as runtime.board:
            seen = await asyncio.to_thread(runtime.snapshot)
            assert (seen.runtime.state, len(seen.ranks)) == ("starting", 2), "nobody has said so yet"
            assert runtime.snapshot().runtime.state == "stopped"
        gone = await asyncio.to_thread(runtime.snapshot)
        assert (gone.runtime.state, gone.ranks) == ("stopped", ())

    asyncio.run(main())
