"""The status board: each writes its own row, everybody reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ipc.ranks import DEADLINE, ROOT
from tpworker.ipc import board as board_module
from tpworker.ipc.barrier import Barrier
from tpworker.ipc.board import BOUNDS_NS, NUM_BUCKETS, About, Board, Field, OtherVersion, Phase, Span
from tpworker.ipc.listing import MAX_NAME, NUM_ENTRIES, Listed
from tpworker.ipc.memory import SharedWords
from tpworker.version import version

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


def test_who_was_told_nothing_reads_whose_rows_it_has() -> None:
    about = About(model="/models/ünicode", gpus=("GPU-1", "GPU-2"), generation=3, max_num_seqs=8)
    with closing(Board.create(NAMES, about)) as board, closing(Board.look(board.fd)) as other:
        board.row("tpworker-rank1")[Field.LAUNCHED] = 5
        board.owner[Field.RESUMED] = 2
        assert [row.name for row in other.rows()] == NAMES
        assert [row[Field.LAUNCHED] for row in other.rows()] == [0, 0, 5]
        assert other.owner[Field.RESUMED] == 2
        assert other.about == board.about
        assert replace(other.about, version="", pid=0, created_ns=0) == about
        assert (other.about.pid, other.about.version) == (os.getpid(), version())
        with pytest.raises(TypeError, match="read-only"):
            other.owner[Field.RESUMED] = 3


def test_a_reader_sees_that_the_owner_has_let_go() -> None:
    board = Board.create(NAMES)
    with closing(Board.look(fd := os.dup(board.fd))) as other:
        Board.attach(board.fd, NAMES).close()  # who has a row in it does not end it
        assert not other.is_over
        board.close()
        assert other.is_over
    os.close(fd)


@pytest.mark.parametrize("signature", [0x6277_7074_70A5_1B2C, 0x6277_7074_0000_0001])
def test_another_versions_board_is_told_from_what_is_none(signature: int) -> None:
    """The first as boards were before they described themselves."""
    memory = SharedWords.create("tpworker-board", 96, signature)
    with closing(memory), pytest.raises(OtherVersion, match="another version's"):
        Board.look(memory.fd)
    with closing(Barrier.create(1)) as barrier, pytest.raises(ValueError, match="is not a board: signature"):
        Board.look(barrier.fd)
    for size in (0, 12):
        with open(os.memfd_create("odd"), "wb", buffering=0) as odd:
            odd.truncate(size)
            with pytest.raises(ValueError, match=f"is not a board: {size} bytes"):
                Board.look(odd.fileno())


def test_a_description_that_lies_is_refused() -> None:
    with closing(Board.create(NAMES)) as board:
        size = board._memory.words[1]
        for wrong in (0, size - 1, 1 << 40):
            board._memory.words[1] = wrong
            with pytest.raises(ValueError, match=r"is not a board: (its|a) description"):
                Board.look(board.fd)


@given(
    st.lists(
        st.builds(
            Listed,
            st.integers(0, 2**63),
            st.text(max_size=30),
            st.integers(0, 2**63),
            st.integers(0, 2**31),
            st.integers(0, 2**31),
            st.booleans(),
        ),
        max_size=NUM_ENTRIES + 2,
    ),
    st.integers(0, 3),
)
def test_the_listing_is_what_was_written_last(requests: list[Listed], num_before: int) -> None:
    with closing(Board.create(NAMES)) as board, closing(Board.look(board.fd)) as other:
        board.listing.write([Listed(1, "x" * 200, 2, 3, 4, True)] * num_before)
        assert all(one.name == "x" * MAX_NAME for one in other.listing.read())
        board.listing.write(requests)
        found = other.listing.read()
        shown = requests[:NUM_ENTRIES]
        assert found == [
            one._replace(name=one.name.encode()[:MAX_NAME].decode(errors="ignore")) for one in shown
        ]


def test_a_listing_that_is_being_written_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed(1, "a", 2, 3, 4, True)
    with closing(Board.create(NAMES)) as board:
        listing, read, num_looks = board.listing, board.listing._read, 0
        listing._words[0] |= 1  # as a writer begins

        def look() -> list[Listed]:
            nonlocal num_looks
            num_looks += 1
            if num_looks == 3:
                listing.write([listed])
            return read()

        monkeypatch.setattr(listing, "_read", look)
        assert listing.read() == [listed]
        assert num_looks == 4, "what was written in the middle of a look is looked at once more"


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
