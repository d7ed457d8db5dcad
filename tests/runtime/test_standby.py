"""Standbys as real processes; their children do what each test says."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.conftest import eventually, is_gone
from tests.ipc.test_child import RANK_BOOT
from tpworker.ipc.child import RANK_STANDBY, SCHEDULER_STANDBY
from tpworker.runtime.children import Child, state_of
from tpworker.runtime.standby import Standby
from tpworker.runtime.standbys import Standbys

pytestmark = pytest.mark.usefixtures("nothing_left")

MODULE = "tests.children.told_rank"
NAMES = ("barrier", "board", "meeting", "masks", "kept")
"""Of a rank's descriptors, beside the store."""
SLEEP = "say(boot, os.getpid()); time.sleep(1000)"


class Forks:
    """A standby, what was forked from it, and a file that its children write to."""

    def __init__(self, module: str = MODULE, device: str = "cpu") -> None:
        self.standby = Standby(RANK_STANDBY, module, device)
        self.store_fd = os.memfd_create("tpworker-store")
        fcntl.fcntl(self.store_fd, fcntl.F_SETFL, os.O_APPEND)  # or children write over each other's lines
        self.other_fds = [os.memfd_create(f"tpworker-{name}") for name in NAMES]
        self.children: list[Child] = []

    def fork(self, code: str, name: str = "tpworker-rank1", cpus: frozenset[int] = frozenset()) -> Child:
        numbers = {f"{of}_fd": fd for of, fd in zip(NAMES, self.other_fds, strict=True)}
        boot = replace(RANK_BOOT, name=name, model=code, store_fd=self.store_fd, **numbers)
        child = self.standby.fork(boot, cpus)
        self.children.append(child)
        return child

    def said(self, num: int = 1) -> list[str]:
        """The first lines that children have written."""
        eventually(lambda: len(self._lines()) >= num)
        return self._lines()

    def _lines(self) -> list[str]:
        return os.pread(self.store_fd, 1 << 16, 0).decode().splitlines()

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.wait(10)
            child.close()
        self.standby.close()
        self.standby.close()  # once more does no harm
        for fd in (self.store_fd, *self.other_fds):
            os.close(fd)


@pytest.fixture
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


def status_of(child: Child) -> int | None:
    assert child.wait(20)
    return child.status


def test_a_child_has_a_name_a_session_and_one_thread_beside_its_lifeline(forks: Forks) -> None:
    child = forks.fork("say(boot, os.getpid(), os.getppid(), os.getsid(0), threading.active_count())")
    assert status_of(child) == 0
    (line,) = forks.said()
    assert line == f"{child.pid} {forks.standby.process.pid} {child.pid} 2"
    assert child.report is None
    child.read()
    assert child.silent


def test_names_are_what_ps_shows(forks: Forks) -> None:
    child = forks.fork(SLEEP)
    forks.said()
    child.read()
    for pid, name in ((child.pid, "tpworker-rank1"), (forks.standby.process.pid, RANK_STANDBY)):
        assert psutil.Process(pid).name() == name
        assert psutil.Process(pid).cmdline()[0].strip("\0 ") == name


def test_descriptors_arrive_under_numbers_of_their_own(forks: Forks) -> None:
    code = """
fds = (boot.barrier_fd, boot.board_fd, boot.meeting_fd, boot.masks_fd, boot.kept_fd, boot.store_fd)
say(boot, *(links()[fd].split()[0] for fd in fds))
say(boot, *(os.get_inheritable(fd) for fd in (*fds, boot.report_fd)))
"""
    assert status_of(forks.fork(code)) == 0
    where, inheritable = forks.said(2)
    assert where.split() == [f"/memfd:tpworker-{name}" for name in (*NAMES, "store")]
    assert inheritable.split() == ["False"] * 7


def test_a_child_has_nothing_of_its_siblings_or_of_the_standby(forks: Forks) -> None:
    """Three standard descriptors, its lifeline, its report pipe, memfds; and later children as many."""
    code = (
        "say(boot, *(link.split(':')[0] for fd, link in sorted(links().items()) if fd > 2)); time.sleep(1000)"
    )
    for i in range(3):
        forks.fork(code, f"tpworker-rank{i}")
    for line in forks.said(3):
        assert sorted(line.split()) == ["/memfd"] * (len(NAMES) + 1) + ["pipe"] * 2


def test_a_standby_keeps_nothing_of_what_it_forked(forks: Forks) -> None:
    def held() -> int:
        return len(os.listdir(f"/proc/{forks.standby.process.pid}/fd"))

    assert status_of(forks.fork("pass")) == 0
    before = held()
    for _ in range(5):
        child = forks.fork("pass")
        assert status_of(child) == 0
    for child in forks.children:
        child.close()
    forks.children.clear()
    eventually(lambda: held() == before - 1)  # it has them as long as their statuses may be asked for
    assert not psutil.Process(forks.standby.process.pid).children()


@pytest.mark.parametrize(
    ("code", "status"),
    [("pass", 0), ("os._exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -9), ("os.abort()", -6)],
)
def test_how_a_child_ended_is_told(forks: Forks, code: str, status: int) -> None:
    child = forks.fork(code)
    assert status_of(child) == status
    child.read()
    assert child.over
    assert child.report is None
    assert not child.is_lost


def test_a_child_that_raises_says_why(forks: Forks) -> None:
    child = forks.fork("raise ValueError('as told')")
    assert status_of(child) == 1
    child.read()
    assert child.report is not None
    assert child.report.summary == "as told"
    assert "told_rank.py" in child.report.traceback


def test_children_end_in_any_order_and_others_are_forked_meanwhile(forks: Forks) -> None:
    first = forks.fork(SLEEP, "tpworker-rank0")
    forks.said()
    second = forks.fork("os._exit(5)")
    assert status_of(second) == 5
    third = forks.fork("os._exit(6)")
    assert status_of(third) == 6
    assert not first.wait(0.05)
    first.kill()
    assert status_of(first) == -signal.SIGKILL


def test_a_child_that_has_ended_keeps_its_pid_until_it_is_closed(forks: Forks) -> None:
    """So that a signal can never meet another process."""
    child = forks.fork("pass")
    assert status_of(child) == 0
    assert child.state == "dead"
    assert child.is_gone
    assert child.pid is not None
    pid = child.pid
    child.kill()  # does no harm
    forks.children.remove(child)
    child.close()
    eventually(lambda: not psutil.pid_exists(pid))


def test_a_child_can_be_asked_for_its_stacks(forks: Forks) -> None:
    child = forks.fork("def stuck():\n    say(boot, 'up')\n    time.sleep(1000)\nstuck()")
    forks.said()
    child.read()
    child.ask_for_stacks()
    eventually(lambda: child.read() or "in stuck" in child.stacks)  # type: ignore[func-returns-value]


def test_a_child_keeps_to_its_cpus_with_all_its_threads(forks: Forks) -> None:
    one = frozenset({max(os.sched_getaffinity(0))})
    code = """
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
say(boot, *(sorted(os.sched_getaffinity(int(task))) for task in os.listdir('/proc/self/task')))
"""
    assert status_of(forks.fork(code, cpus=one)) == 0
    (line,) = forks.said()
    assert line == " ".join([str(sorted(one))] * 3)
    assert os.sched_getaffinity(forks.standby.process.pid) == os.sched_getaffinity(0)


def test_a_standby_that_is_killed_takes_its_children_along(forks: Forks) -> None:
    child = forks.fork(SLEEP)
    (pid,) = map(int, forks.said())
    os.kill(forks.standby.process.pid, signal.SIGKILL)
    assert status_of(child) is None
    assert forks.standby.wait(10)
    assert child.is_orphan
    assert not forks.standby.is_alive
    assert forks.standby.ending.describe().startswith("tpworker-rank-standby was killed by SIGKILL")
    eventually(lambda: is_gone(pid))
    late = forks.fork(SLEEP)  # of a dead one: is dead
    assert late.wait(10)
    assert late.pid is None


def test_a_child_is_killed_though_its_standby_is_stopped(forks: Forks) -> None:
    child = forks.fork(SLEEP)
    (pid,) = map(int, forks.said())
    os.kill(forks.standby.process.pid, signal.SIGSTOP)
    child.kill()
    eventually(lambda: child.is_gone)
    assert not child.wait(0.05)  # nobody tells
    late = forks.fork(SLEEP)
    assert not late.wait(0.05)
    forks.standby.kill()
    assert child.wait(10)
    assert late.wait(10)
    eventually(lambda: not psutil.pid_exists(pid))


def test_who_is_not_wanted_any_more_is_not_forked(forks: Forks) -> None:
    """Killed while the standby still imports, it is gone at once; nothing comes of it afterwards."""
    first = forks.fork("say(boot, 'never')")
    os.kill(forks.standby.process.pid, signal.SIGSTOP)
    first.kill()
    assert first.has_ended
    os.kill(forks.standby.process.pid, signal.SIGCONT)
    assert status_of(forks.fork("say(boot, 'second')")) == 0
    assert forks.said() == ["second"]


def test_why_a_standby_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD_TO", "fail")
    forks = Forks(device="cuda")
    child = forks.fork("pass")
    assert child.wait(20)
    assert forks.standby.wait(20)
    forks.standby.read()
    assert forks.standby.over
    assert not forks.standby.is_ready
    assert forks.standby.ending.describe() == "tpworker-rank-standby raised ImportError: no library for cuda"
    forks.close()


def test_a_standby_lives_on_when_the_thread_that_asked_for_it_ends() -> None:
    found: list[Forks] = []
    thread = threading.Thread(target=lambda: found.append(Forks()))
    thread.start()
    thread.join()
    (forks,) = found
    assert status_of(forks.fork("pass")) == 0
    # PDEATHSIG ends a process with the thread that started it, if that was asked for before.
    assert [thread.name for thread in threading.enumerate()].count(RANK_STANDBY) == 1
    forks.close()


PARENT = """
import os, sys, time
from dataclasses import replace
from tests.ipc.test_child import RANK_BOOT
from tpworker.runtime.standby import Standby
standby = Standby("tpworker-rank-standby", "tests.children.told_rank", "cpu")
fd = os.memfd_create("one")
boot = replace(RANK_BOOT, barrier_fd=fd, board_fd=fd, meeting_fd=fd, masks_fd=fd, store_fd=fd, kept_fd=fd)
children = [standby.fork(replace(boot, model="time.sleep(1000)")) for _ in range(2)]
while None in [child.pid for child in children]:
    [child.read() for child in children]
if os.fork() == 0:
    time.sleep(1000)  # somebody who has all of its descriptors, and outlives it
print(standby.process.pid, *(child.pid for child in children), flush=True)
time.sleep(1000)
"""


def test_all_end_when_the_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True, cwd=Path.cwd()
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 3
    assert not any(map(is_gone, pids))
    parent.kill()
    parent.wait()
    eventually(lambda: all(map(is_gone, pids)))
    os.killpg(parent.pid, signal.SIGKILL)  # the forked one
    parent.stdout.close()


def test_standbys_are_started_when_they_are_needed_and_replaced_when_they_have_died() -> None:
    standbys = Standbys("tpworker.testing.fake_scheduler", MODULE, "cpu")
    assert not psutil.Process().children()
    scheduler, ranks = standbys.start()
    assert (scheduler.name, ranks.name) == (SCHEDULER_STANDBY, RANK_STANDBY)
    assert standbys.start() == (scheduler, ranks)
    ranks.kill()
    assert ranks.wait(10)
    again = standbys.start()
    assert again[0] is scheduler
    assert again[1] is not ranks
    assert again[1].is_alive
    standbys.close()
    standbys.close()
    with pytest.raises(OSError, match="closed"):
        standbys.start()


def test_a_standby_that_is_stopped_is_replaced_and_one_that_goes_on_is_not() -> None:
    standbys = Standbys("tpworker.testing.fake_scheduler", MODULE, "cpu")
    try:
        scheduler, ranks = standbys.start()
        os.kill(ranks.process.pid, signal.SIGSTOP)
        os.kill(scheduler.process.pid, signal.SIGSTOP)
        eventually(lambda: state_of(scheduler.process.pid) == "stopped")
        threading.Timer(0.2, os.kill, (scheduler.process.pid, signal.SIGCONT)).start()
        again = standbys.start()
        assert again[0] is scheduler
        assert again[1] is not ranks
        assert is_gone(ranks.process.pid)
        assert again[1].is_alive
    finally:
        standbys.close()


def test_a_standby_that_cannot_be_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(OSError, match="/nowhere/python"):
        Standby(RANK_STANDBY, MODULE, "cpu")


# ------------------------------------------------------------------- the ranks' own, with torch in it


@pytest.fixture(params=["cpu", "cuda"])
def ready_forks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Forks]:
    """From a standby that has imported what that of the ranks imports."""
    monkeypatch.setenv("TOLD_TO", "import all")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    forks = Forks(device=request.param)
    yield forks
    forks.close()


def test_the_ranks_standby_has_torch_and_one_thread_and_no_cuda(ready_forks: Forks) -> None:
    standby = ready_forks.standby
    eventually(lambda: standby.read() or standby.is_ready)  # type: ignore[func-returns-value]
    assert len(os.listdir(f"/proc/{standby.process.pid}/task")) == 1
    code = """
import sys
assert "tpworker.rank.process" in sys.modules
import torch
say(boot, len(os.listdir('/proc/self/task')), torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork())
"""
    assert status_of(ready_forks.fork(code)) == 0
    assert ready_forks.said() == ["2 False False"]  # its own and the lifeline's


def test_a_forked_rank_computes_with_several_threads(ready_forks: Forks) -> None:
    code = """
import torch
torch.set_num_threads(2)
a = torch.ones(1 << 11, 1 << 11)
for _ in range(8):
    product = a @ a
stats = [open(f'/proc/self/task/{task}/stat').read() for task in os.listdir('/proc/self/task')]
busy = [int(stat.rpartition(')')[2].split()[11]) for stat in stats]
say(boot, torch.get_num_threads(), float(product.min()), float(product.max()), sum(t > 0 for t in busy))
"""
    for _ in range(2):
        assert status_of(ready_forks.fork(code)) == 0
    assert ready_forks.said(2) == ["2 2048.0 2048.0 2"] * 2  # threads that have had the CPU for a while
