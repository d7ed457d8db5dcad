"""Status boards are found from outside, by pid; and what cannot be looked at is refused with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.ipc.ranks import DEADLINE, ROOT
from tests.observe.boards import busy_board
from tpworker.ipc.board import NAME, Field
from tpworker.ipc.memory import SharedWords
from tpworker.observe.attach import NoBoard, attach, running
from tpworker.observe.processes import inner_pid, started, usage_of, user_of

CHILD = """
import os, sys
from tpworker.ipc.board import About, Board, Field
if "make" in sys.argv:
    board = Board.create(["tpworker-scheduler"], About(model="/models/other"))
print(flush=True)
sys.stdin.read()
"""


def child(*words: str, fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    """Lives until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
        pass_fds=fds,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


def test_a_board_is_found_by_its_process_and_by_any_that_has_it() -> None:
    with closing(busy_board()) as board, child(fds=(board.fd,)) as process:
        for pid in (os.getpid(), process.pid):
            with attach(pid) as attached:
                assert attached.pid == os.getpid()
                assert attached.board.about == board.about
                assert attached.board.row("tpworker-rank1")[Field.RECEIVED] == 103
        assert [about for pid, about in running() if pid == os.getpid()] == [board.about]
        assert process.pid not in [pid for pid, _ in running()]
        process.communicate(timeout=DEADLINE)


def test_the_newest_board_counts_and_none_that_is_over() -> None:
    with closing(busy_board(generation=0)), closing(busy_board(generation=1)) as second:
        with attach(os.getpid()) as attached:
            assert (attached.board.about.generation, attached.num_others) == (1, 1)
        kept = os.dup(second.fd)
        second._end[0] = 1
        with attach(os.getpid()) as attached:
            assert (attached.board.about.generation, attached.num_others) == (0, 0)
        os.close(kept)


def test_who_ends_is_seen_to() -> None:
    with child("make") as process:
        attached = attach(process.pid)
        assert attached.board.about.model == "/models/other"
        assert (process.pid, attached.board.about) in running()
        process.communicate(timeout=DEADLINE)
        assert not attached.board.is_over, "nobody was there to say so"
        attached.close()
        with pytest.raises(NoBoard, match=f"there is no process {process.pid}"):
            attach(process.pid)


def test_what_is_no_board_is_refused_with_the_reason() -> None:
    with child() as process:
        with pytest.raises(NoBoard, match=r"\(python.*\) shows no status board: it is no tpworker, or"):
            attach(process.pid)
        process.communicate(timeout=DEADLINE)
    old = SharedWords.create(NAME, 96, 0x6277_7074_70A5_1B2C)
    with closing(old), pytest.raises(NoBoard, match=r"another version .* use its own, by /.*python"):
        attach(os.getpid())
    with closing(busy_board()) as board:
        whole = board._memory.words.tobytes()
    with open(os.memfd_create(NAME), "wb", buffering=0) as unsealed:
        unsealed.write(whole)
        with pytest.raises(NoBoard, match="shows no status board"):  # it might shrink while it is read
            attach(os.getpid())


def test_another_users_process_is_said_to_be_one() -> None:
    """As a user that is nobody."""
    code = (
        "import os, sys; from tpworker.observe.attach import NoBoard, attach, running\n"
        "from tpworker.observe import attach as attach_module\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "try: attach(int(sys.argv[1]))\n"
        "except NoBoard as error: print(error)\n"
        "print(running())\n"
        "attach_module.user_of = lambda pid, proc: 65534\n"  # as of one that has made itself undumpable
        "try: attach(int(sys.argv[1]))\n"
        "except NoBoard as error: print(error)\n"
    )
    if os.getuid():
        pytest.skip("only root can become another user")
    with closing(busy_board()):
        command = [sys.executable, "-c", code, str(os.getpid())]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, third = told.stdout.splitlines()
    assert first.endswith("is another user's: only its own and root may look at it")
    assert second == "[]"
    assert "is this user's, but the system lets only root look at it: ask as root" in third


def test_what_a_process_has_used() -> None:
    pid = os.getpid()
    used = usage_of(pid)
    assert used.cpu_seconds is not None
    assert used.memory_bytes is not None
    assert 0 < used.cpu_seconds <= sum(os.times()[:2]) + 1
    assert used.memory_bytes > 1 << 20
    assert usage_of(pid, "tpworker-rank0") == (None, None), "another process has that pid here"
    assert inner_pid(pid) == pid
    assert user_of(pid) == os.geteuid()
    assert started(pid) is not None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(DEADLINE)
    assert (usage_of(gone.pid), inner_pid(gone.pid), started(gone.pid)) == ((None, None), 0, None)


def test_a_process_in_a_container_has_a_pid_of_its_own_there(tmp_path: Path) -> None:
    """Its board tells that one; a process that has the same number here is not it."""
    with closing(busy_board()) as board:
        pid, outer = os.getpid(), tmp_path / "4242"
        outer.mkdir()
        (outer / "fd").symlink_to(f"/proc/{pid}/fd")
        (outer / "status").write_text(f"Name:\tx\nNSpid:\t4242\t{pid}\n")
        (outer / "stat").write_text("4242 (a) b) S " + " ".join(str(i) for i in range(1, 40)))
        with attach(4242, tmp_path) as attached:
            assert (attached.pid, attached.board.about) == (4242, board.about)
        assert running(tmp_path) == [(4242, board.about)]
        assert started(4242, tmp_path) == 19


def test_a_board_may_end_while_it_is_looked_at() -> None:
    board = busy_board()
    with attach(os.getpid()) as attached:
        assert not attached.board.is_over
        board.close()
        assert attached.board.is_over
        assert attached.board.owner[Field.FINISHED] == 12
