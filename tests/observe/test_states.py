"""How processes do, as their rows of the board and the kernel say."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from tpworker.ipc.board import Board, Field, Span
from tpworker.observe.processes import usage_of
from tpworker.observe.states import states_of


def test_processor_time_is_that_of_the_program_and_of_the_kernel_for_it(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    values = ["S", *["0"] * 10, "300", "200", *["0"] * 10]
    (tmp_path / "7" / "stat").write_text(f"7 (a) b) {' '.join(values)}\n")
    (tmp_path / "7" / "statm").write_text("9 2 1 1 0 1 0\n")
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    assert usage_of(7, proc=tmp_path) == (500 / ticks, 2 * page)


def test_what_a_process_uses_and_how_far_it_is() -> None:
    # A name that reads as the end of what is before the values.
    code = (
        "import ctypes\n"
        "ctypes.CDLL(None).prctl(15, b'a) R 1 (b', 0, 0, 0)\n"
        "held = bytearray(b'x') * (64 << 20)\n"
        "print(flush=True)\n"
        "input()\n"
    )
    with closing(Board.create(["scheduler", "rank0", "rank1"])) as board:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        own, other = board.row("scheduler"), board.row("rank0")
        own[Field.PID], other[Field.PID] = os.getpid(), process.pid
        other[Field.LAUNCHED], other[Field.COMPLETED], other[Field.LAST_ARRIVALS] = 9, 7, 3
        other.took(Span.BARRIER, 5000)
        before = time.process_time()
        mine, theirs, nobodys = states_of(board.rows())
        assert mine.cpu_seconds is not None
        assert before - 1 < mine.cpu_seconds <= time.process_time() + 0.1
        assert theirs.resident_bytes is not None
        assert 64 << 20 <= theirs.resident_bytes < 256 << 20
        assert (theirs.name, theirs.pid) == ("rank0", process.pid)
        assert (theirs.num_launched, theirs.num_completed, theirs.last_arrivals) == (9, 7, 3)
        assert (theirs.barrier.total_ns, sum(theirs.barrier.counts)) == (5000, 1)
        assert not any(theirs.publish.counts + theirs.compose.counts)
        assert (nobodys.cpu_seconds, nobodys.resident_bytes) == (None, None)
        process.communicate(b"\n")
        gone = states_of(board.rows())[1]
        assert (gone.cpu_seconds, gone.resident_bytes, gone.num_launched) == (None, None, 9)
