"""Boards that look like those of a runtime at work."""

from __future__ import annotations

import os
import time

from tpworker.ipc.board import About, Board, Field, Phase, Span
from tpworker.ipc.child import board_names
from tpworker.ipc.listing import Listed
from tpworker.outputs import RUNTIME_STATES

MIB = 1 << 20


def busy_board(num_ranks: int = 2, **about: object) -> Board:
    """Of a group that has done some steps; its processes are this one."""
    facts = {"model": "/models/tiny", "device": "cpu", "dtype": "float32", "max_num_seqs": 8, "lookahead": 2}
    board = Board.create(board_names(num_ranks), About(**{**facts, **about}))  # type: ignore[arg-type]
    scheduler, *ranks = board.rows()
    values = {
        Field.PID: os.getpid(), Field.PHASE: Phase.READY, Field.LAUNCHED: 103, Field.COMPLETED: 100,
        Field.RUNNING: 5, Field.WAITING: 2, Field.FREE_BLOCKS: 60, Field.TOTAL_BLOCKS: 100,
        Field.PROMPT_TOKENS: 500, Field.CACHED_TOKENS: 200, Field.PREFILLED_TOKENS: 300,
        Field.OUTPUT_TOKENS: 450, Field.PREEMPTIONS: 1, Field.NUM_GAPS: 90, Field.GAPS: 450_000,
        Field.BUSY: 900_000_000,
    }  # fmt: skip
    for field, value in values.items():
        scheduler[field] = value
    for rank, row in enumerate(ranks):
        row[Field.PID], row[Field.WEIGHTS] = os.getpid(), 256 * MIB
        row.enter(Phase.READY)
        row[Field.RECEIVED], row[Field.ADMITTED] = 103, 102
        row[Field.LAUNCHED], row[Field.COMPLETED] = 102, 100
        for _ in range(100):
            row.took(Span.BARRIER, 2000 * (1 + rank))
        row[Field.LAST_ARRIVALS] = 100 if not rank else 0
    ranks[0].took(Span.PUBLISH, 30_000)
    scheduler.took(Span.COMPOSE, 7_000)
    board.owner[Field.STATE] = 1 + RUNTIME_STATES.index("ready")
    board.owner[Field.RUNNING], board.owner[Field.WAITING] = 5, 3
    board.owner[Field.OUTPUT_TOKENS], board.owner[Field.FINISHED] = 1450, 12
    now = time.monotonic_ns()
    board.listing.write(
        [
            Listed(7, "chatcmpl-old", now - 12_000_000_000, 128, 40, True),
            Listed(9, "cmpl-\x1b[31mred", now - 1_500_000_000, 64, 0, False),
        ]
    )
    return board
