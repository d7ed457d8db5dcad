"""The status board: each writes its own row, everybody reads."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ipc.ranks import DEADLINE, ROOT
from tpworker.ipc import board as board_module
from tpworker.ipc.barrier import Barrier
from tpworker.ipc.board import BOUNDS_NS, NUM_BUCKETS, Board, Field, Phase, Span

NAMES = ["tpworker-scheduler", "tpworker-rank0", "tpworker-rank1"]


@given(st.dictionaries(st.tuples(st.sampled_from(NAMES), st.sampled_from(Field)), st.integers(0, 2**64 - 1)))
def test_a_field_is_what_was_written_and_touches_no_other(values: dict[tuple[str, Field], int]) -> None:
    with closing(Board.create(NAMES)) as board, closing(Board.attach(board.fd, NAMES)) as other:
        for (name, field), value in values.items():
            board.row(name)[field] = value
        for row in other.rows():
            for field in Field:
                assert row[field] == values.get((row.name, field), 0)


def test_a_new_board_says_nothing_yet() -> None:
    with closing(Board.create(NAMES)) as board:
        assert [row.name for row in board.rows()] == NAMES
        assert all(row.phase is Phase.STARTING and row[Field.LAUNCHED] == 0 for row in board.rows())
        board.row("tpworker-rank1")[Field.PHASE] = Phase.READY
        assert [row.phase for row in board.rows()] == [Phase.STARTING, Phase.STARTING, Phase.READY]


def test_when_a_process_came_to_a_phase() -> None:
    with closing(Board.create(NAMES)) as board, closing(Board.attach(board.fd, NAMES)) as other:
        row = board.row("tpworker-rank0")
        for field in Field:
            row[field] = 7
        before = time.monotonic_ns()
        for phase in (Phase.LOADING, Phase.READY):
            row.enter(phase)
        seen = other.row("tpworker-rank0")
        assert seen.phase is Phase.READY
        assert before <= seen.entered(Phase.LOADING) <= seen.entered(Phase.READY) <= time.monotonic_ns()
        assert not any(seen.entered(phase) for phase in Phase if phase not in (Phase.LOADING, Phase.READY))
        changed = {Field.PHASE, Field.PROGRESS_DONE, Field.PROGRESS_TOTAL}
        assert {field for field in Field if seen[field] != 7} == changed
        assert not any(other.row("tpworker-rank1").entered(phase) for phase in Phase)


@given(st.lists(st.tuples(st.sampled_from(Span), st.integers(-5, 10**9) | st.sampled_from(BOUNDS_NS))))
def test_how_long_spans_took(taken: list[tuple[Span, int]]) -> None:
    with closing(Board.create(NAMES)) as board, closing(Board.attach(board.fd, NAMES)) as other:
        for span, nanoseconds in taken:
            board.row("tpworker-rank0").took(span, nanoseconds)
        seen = other.row("tpworker-rank0")
        for span in Span:
            times = [max(nanoseconds, 0) for one, nanoseconds in taken if one is span]
            counts = [0] * NUM_BUCKETS
            for nanoseconds in times:
                counts[sum(nanoseconds > bound for bound in BOUNDS_NS)] += 1
            assert seen.times(span) == (sum(times), tuple(counts))
        assert not any(seen[field] for field in Field)
        assert not any(seen.entered(phase) for phase in Phase)
        assert not any(other.row("tpworker-rank1").times(Span.PUBLISH).counts)


def test_what_a_killed_process_wrote_stays() -> None:
    code = (
        "import sys, time\n"
        "from tpworker.ipc.board import Board, Field\n"
        "row = Board.attach(int(sys.argv[1]), sys.argv[2:]).row('tpworker-rank1')\n"
        "row[Field.LAUNCHED] = 17\n"
        "print(flush=True)\n"
        "time.sleep(3600)\n"
    )
    with closing(Board.create(NAMES)) as board:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(board.fd), *NAMES],
            pass_fds=[board.fd], cwd=ROOT, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"\n"
        finally:
            process.kill()
            assert process.wait(DEADLINE) == -signal.SIGKILL
            process.stdout.close()
        assert [row[Field.LAUNCHED] for row in board.rows()] == [0, 0, 17]


def test_both_sides_must_know_the_same_names() -> None:
    with closing(Board.create(NAMES)) as board, closing(Barrier.create(len(NAMES))) as barrier:
        for fd, names in ((board.fd, NAMES[:2]), (board.fd, NAMES[::-1]), (barrier.fd, NAMES)):
            with pytest.raises(ValueError, match="is not a board of"):
                Board.attach(fd, names)
    with pytest.raises(ValueError, match="occurs twice"):
        Board.create(["a", "b", "a"])
    with closing(Board.create(NAMES)) as board, pytest.raises(KeyError):
        board.row("tpworker-rank2")


@pytest.mark.parametrize("value", [-1, 2**64])
def test_a_field_is_64_bits(value: int) -> None:
    with closing(Board.create(NAMES)) as board, pytest.raises(ValueError, match="Q"):
        board.row(NAMES[0])[Field.BEAT] = value


def test_rows_lie_on_lines_of_their_own() -> None:
    assert max(Field) < board_module._ENTERED
    assert board_module._ENTERED + len(Phase) <= board_module._SPANS
    assert 1 + NUM_BUCKETS <= board_module._SPAN
    assert board_module._SPANS + len(Span) * board_module._SPAN <= board_module._ROW
    with closing(Board.create(NAMES)) as board:
        assert board._memory.address % 128 == 0
        for row in board.rows():
            assert len(row._words) % 16 == 0
