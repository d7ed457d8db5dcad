"""What the runtime tells on the status board: its state, what became of requests, and which are the oldest.

A few times a second while requests are open or processes start, and once when something has changed: an idle
runtime does nothing for it. The board is that of the present generation; while there is none, nobody is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tpworker.ipc.board import Board, Field
from tpworker.ipc.listing import NUM_ENTRIES, Listed
from tpworker.outputs import RUNTIME_STATES, RuntimeState
from tpworker.runtime.intake import Intake
from tpworker.runtime.requests import Request

INTERVAL_SECONDS = 0.25


class Telling:
    """Writes now and then, from the event loop that calls `wake`.

    Args:
        intake: whose requests and counts are told.
        board: where, if there is one.
        state: of the runtime.
        restarts: how many there were because processes were lost, and requests that went on after them.
    """

    def __init__(
        self,
        intake: Intake,
        board: Callable[[], Board | None],
        state: Callable[[], RuntimeState],
        restarts: Callable[[], tuple[int, int]],
    ) -> None:
        self._intake, self._board, self._state, self._restarts = intake, board, state, restarts
        self._timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """A request has come, or something else has changed."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL_SECONDS, self._tick)

    def close(self) -> None:
        """There is nothing to tell any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        self.tell()
        state = self._state()
        is_busy = self._intake.num_open and state != "sleeping"
        is_waking = state == "sleeping" and self._board() is not None
        if is_busy or is_waking or state in ("starting", "recovering", "updating"):  # on a board that is new
            self.wake()

    def tell(self) -> None:
        """Writes all of it now."""
        board = self._board()
        if board is None:
            return
        requests, row = self._intake.requests, board.owner
        row[Field.STATE] = 1 + RUNTIME_STATES.index(self._state())
        row[Field.RUNNING] = requests.num_running
        row[Field.WAITING] = self._intake.num_waiting
        row[Field.OUTPUT_TOKENS] = requests.num_output_tokens
        row[Field.FINISHED] = self._intake.num_finished
        row[Field.ABORTED] = self._intake.num_aborted
        row[Field.RESTARTS], row[Field.RESUMED] = self._restarts()
        board.listing.write([_listed(request) for request in requests.unended()[:NUM_ENTRIES]])


def _listed(request: Request) -> Listed:
    return Listed(
        request.number,
        request.request_id,
        round(request.times.arrived * 1e9),
        request.num_prompt,
        request.num_received,
        request.is_running,
    )
