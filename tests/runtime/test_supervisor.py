"""Real processes: the scheduler echoes, the ranks do what files in the model folder say."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import eventually
from tests.ipc.test_child import RANK_BOOT, SCHEDULER_BOOT
from tpworker.ipc.board import Field, Phase
from tpworker.ipc.channels import Channel, new_address
from tpworker.ipc.child import RANK_STANDBY, SCHEDULER_STANDBY
from tpworker.ipc.messages import SchedulerReady, Stop
from tpworker.runtime import supervisor
from tpworker.runtime.children import Child
from tpworker.runtime.faults import Fault, Kind
from tpworker.runtime.group import Group
from tpworker.runtime.keeping import Keeping
from tpworker.runtime.standbys import Standbys
from tpworker.runtime.supervisor import GRACE_SECONDS, Supervisor

pytestmark = pytest.mark.usefixtures("nothing_left")

GENERATION = 5


class Watched:
    """A supervisor, its processes and what it said of them."""

    def __init__(
        self,
        model: Path,
        num_ranks: int = 2,
        standbys: Standbys | None = None,
        keeping: Keeping | None = None,
        **options: Any,
    ) -> None:
        self.channel = Channel.bind(new_address("runtime"))
        self.faults: list[Fault] = []
        options.setdefault("rank_module", "tests.children.idle_rank")
        options.setdefault("scheduler_module", "tpworker.testing.fake_scheduler")
        group = Group(
            generation=GENERATION, num_ranks=num_ranks, model=str(model), scheduler=SCHEDULER_BOOT.settings,
            rank=RANK_BOOT.settings, **options,
        )  # fmt: skip
        self.supervisor = Supervisor(group, self.channel.address, self.faults.append, standbys, keeping)

    def ready(self) -> None:
        self.channel.accept("tpworker-scheduler", GENERATION, 20)
        assert self.channel.receive(20) == SchedulerReady(GENERATION, 129)

    def pid(self, name: str) -> int:
        return next(child.pid or 0 for child in self.supervisor._children if child.name == name)

    def fault(self) -> Fault:
        """Waits for the end, and returns the reason."""
        self.supervisor.ended.result(30)
        assert len(self.faults) == 1
        return self.faults[0]

    def stop(self, timeout: float = 20.0) -> None:
        self.channel.send(Stop(GENERATION))
        self.supervisor.stop(timeout)
        self.supervisor.ended.result(30)

    def close(self) -> None:
        self.supervisor.kill()
        self.supervisor.ended.result(30)
        self.supervisor.close()
        self.supervisor.close()  # once more does no harm
        self.supervisor.kill()
        self.channel.close()


def own_children() -> list[psutil.Process]:
    return psutil.Process().children()


@pytest.fixture
def watched(model_folder: Path) -> Iterator[Watched]:
    watched = Watched(model_folder)
    yield watched
    watched.close()


def test_it_starts_a_scheduler_and_ranks_and_stops_them(watched: Watched) -> None:
    watched.ready()
    names = {parent.name(): {child.name() for child in parent.children()} for parent in own_children()}
    assert names == {
        "tpworker-scheduler-standby": {"tpworker-scheduler"},
        "tpworker-rank-standby": {"tpworker-rank0", "tpworker-rank1"},
    }
    watched.stop()
    assert [child.status for child in watched.supervisor._children] == [0, 0, 0]
    assert not watched.faults


@pytest.mark.parametrize("name", ["tpworker-scheduler", "tpworker-rank0", "tpworker-rank1"])
def test_a_process_that_is_killed_is_named(watched: Watched, name: str) -> None:
    watched.ready()
    os.kill(watched.pid(name), signal.SIGKILL)
    fault = watched.fault()
    assert fault.process == name
    assert fault.summary.startswith(f"{name} was killed by SIGKILL")


@pytest.mark.parametrize("name", ["tpworker-scheduler-standby", "tpworker-rank-standby"])
def test_a_standby_that_is_killed_is_named_and_not_its_children(watched: Watched, name: str) -> None:
    watched.ready()
    (standby,) = (process for process in own_children() if process.name() == name)
    standby.kill()
    fault = watched.fault()
    assert fault.process == name
    assert fault.summary.startswith(f"{name} was killed by SIGKILL")
    assert not own_children()


@pytest.fixture
def standbys() -> Iterator[Standbys]:
    standbys = Standbys("tpworker.testing.fake_scheduler", "tests.children.idle_rank", "cpu")
    yield standbys
    standbys.close()


def test_generations_are_forked_from_the_same_standbys(model_folder: Path, standbys: Standbys) -> None:
    pids, parents = [], []
    for how in ("killed", "stopped", "stopped"):
        watched = Watched(model_folder, standbys=standbys)
        watched.ready()
        pids.append(watched.pid("tpworker-rank1"))
        parents.append(psutil.Process(pids[-1]).ppid())
        if how == "killed":
            os.kill(pids[-1], signal.SIGKILL)
            assert watched.fault().process == "tpworker-rank1"
        else:
            watched.stop()
        watched.close()
        assert {process.name() for process in own_children()} == {SCHEDULER_STANDBY, RANK_STANDBY}
        eventually(lambda: not [child for standby in own_children() for child in standby.children()])
    assert len(set(pids)) == 3
    assert len(set(parents)) == 1


@pytest.mark.parametrize("name", [SCHEDULER_STANDBY, RANK_STANDBY])
def test_a_standby_that_hangs_is_replaced(
    model_folder: Path, standbys: Standbys, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And a rank that dies meanwhile is noticed nevertheless."""
    watched = Watched(model_folder, standbys=standbys)
    watched.ready()
    old = {standby.name: standby for standby in standbys.start()}
    os.kill(old[name].process.pid, signal.SIGSTOP)
    os.kill(watched.pid("tpworker-rank1"), signal.SIGKILL)
    assert watched.fault().process == "tpworker-rank1"
    watched.close()
    assert f"{name} hangs" in caplog.text
    new = {standby.name: standby for standby in standbys.start()}
    assert {each for each in new if new[each] is not old[each]} == {name}
    watched = Watched(model_folder, standbys=standbys)
    watched.ready()
    watched.close()
    assert not watched.faults


def test_when_one_ends_all_have_ended(watched: Watched) -> None:
    watched.ready()
    os.kill(watched.pid("tpworker-rank1"), signal.SIGSEGV)
    assert "SIGSEGV" in watched.fault().summary
    assert all(child.status is not None for child in watched.supervisor._children)


def fault_of(model: Path, num_ranks: int = 2, **scripts: str) -> Fault:
    """What comes of it when ranks do what their scripts say, once they are ready (`rank0_early`: before)."""
    for rank, script in scripts.items():
        (model / f"tpworker-{rank.replace('_', '.')}").write_text(script)
    watched = Watched(model, num_ranks)
    try:
        return watched.fault()
    finally:
        watched.close()


def test_an_exception_is_reported_with_its_traceback(model_folder: Path) -> None:
    fault = fault_of(model_folder, rank1="fail(ValueError('bad weights'))")
    assert fault.process == "tpworker-rank1"
    assert fault.summary.startswith("tpworker-rank1 raised ValueError: bad weights; tpworker-rank1 was ")
    assert fault.traceback is not None
    assert "idle_rank.py" in fault.traceback
    assert fault.report is not None
    assert fault.report.error == "ValueError"


def test_a_process_that_leaves_without_a_word_is_named(model_folder: Path) -> None:
    fault = fault_of(model_folder, rank0_early="os._exit(3)")
    assert fault.summary.startswith("tpworker-rank0 ended with status 3, without a report")


def test_a_process_that_returns_too_early_is_named(model_folder: Path) -> None:
    assert fault_of(model_folder, rank0_early="os._exit(0)").summary.startswith(
        "tpworker-rank0 ended with status 0"
    )


def test_a_cause_is_found_behind_a_consequence_that_was_quicker(model_folder: Path) -> None:
    fault = fault_of(
        model_folder,
        rank0="fail(RuntimeError('Connection closed by peer'))",
        rank1="time.sleep(0.1) or fail(ValueError('the cause'))",
    )
    assert fault.process == "tpworker-rank1"


def test_a_rank_that_hangs_is_named_with_its_stacks_and_everybodys_place(model_folder: Path) -> None:
    fault = fault_of(
        model_folder,
        rank0="row.__setitem__(Field.ADMITTED, 17) or barrier.wait(0, 0, 1, 0.3)",
        rank1="time.sleep(1000)",
    )
    assert fault.process == "tpworker-rank1"
    assert fault.hung
    assert fault.summary.startswith("tpworker-rank1 hangs; tpworker-rank0 raised BarrierTimeout")
    assert fault.traceback is not None
    assert "admitted 17" in fault.traceback
    assert "Stacks of tpworker-rank1" in fault.traceback
    assert "in obey" in fault.traceback


def test_a_rank_that_is_stopped_is_named(model_folder: Path) -> None:
    fault = fault_of(
        model_folder,
        num_ranks=3,
        rank0="barrier.wait(0, 0, 1, 0.3)",
        rank1="time.sleep(1000)",
        rank2="os.kill(os.getpid(), signal.SIGSTOP)",
    )
    assert fault.process == "tpworker-rank2"
    assert "stopped" in fault.summary
    assert fault.is_external


def test_a_module_that_is_not_there_is_a_fault(model_folder: Path) -> None:
    watched = Watched(model_folder, rank_module="tpworker.no_such_thing")
    assert watched.fault().process.startswith("tpworker-rank")
    watched.close()


def test_a_process_that_cannot_be_started_is_a_fault(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    watched = Watched(model_folder)
    assert "/nowhere/python" in watched.fault().summary
    watched.close()


def test_a_start_that_fails_half_way_leaves_nothing(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exhausted:
        def __init__(self) -> None:
            raise OSError("Too many open files")

    monkeypatch.setattr("tpworker.runtime.supervisor.selectors.DefaultSelector", Exhausted)
    group = Group(
        generation=0, num_ranks=2, model=str(model_folder), scheduler=SCHEDULER_BOOT.settings,
        rank=RANK_BOOT.settings,
    )  # fmt: skip
    with pytest.raises(OSError, match="Too many"):
        Supervisor(group, "ipc://@nobody", lambda fault: None)


def test_who_does_not_end_though_it_was_killed_is_known(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(model_folder)
    watched.ready()
    assert watched.supervisor.leftovers == []
    monkeypatch.setattr("tpworker.runtime.supervisor.REAP_SECONDS", 0.5)
    monkeypatch.setattr(Child, "is_gone", property(lambda child: child.name != "tpworker-rank1"))
    watched.supervisor.kill()
    watched.supervisor.ended.result(20)
    assert watched.supervisor.leftovers == ["tpworker-rank1"]
    watched.close()


def test_who_does_not_stop_in_time_is_killed(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (model_folder / "tpworker-rank1").write_text("time.sleep(1000)")
    watched = Watched(model_folder)
    watched.ready()
    with caplog.at_level(logging.WARNING):
        watched.stop(timeout=0.5)
    assert "tpworker-rank1 did not end in time" in caplog.text
    assert not watched.faults
    watched.close()


def test_what_goes_wrong_while_stopping_is_logged(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model_folder / "tpworker-rank1").write_text("plans.receive(30) and fail(ValueError('too late'))")
    watched = Watched(model_folder)
    watched.ready()
    with caplog.at_level(logging.WARNING):
        watched.stop()
    assert "while stopping, tpworker-rank1 raised" in caplog.text
    assert not watched.faults
    watched.close()


def test_ranks_keep_to_the_cpus_that_they_are_told(model_folder: Path) -> None:
    allowed = os.sched_getaffinity(0)
    one = {min(allowed)}
    watched = Watched(model_folder, num_ranks=3, rank_cpus=(None, one))
    watched.ready()
    names = ("tpworker-scheduler", "tpworker-rank0", "tpworker-rank1", "tpworker-rank2")
    kept = [os.sched_getaffinity(watched.pid(name)) for name in names]
    assert kept == [allowed, allowed, one, allowed]
    pid = watched.pid("tpworker-rank1")
    threads = [int(task) for task in os.listdir(f"/proc/{pid}/task")]
    assert all(os.sched_getaffinity(thread) == one for thread in threads)
    watched.close()


def test_cpus_that_were_taken_away_are_no_fault(
    model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    watched = Watched(model_folder, rank_cpus=({1023},))
    watched.ready()
    assert "tpworker-rank0 WARNING it cannot be kept to its CPUs" in capfd.readouterr().err
    watched.close()


def test_blame_ends_all_and_explains(watched: Watched) -> None:
    watched.ready()
    watched.supervisor.blame(Fault("tpworker-scheduler", "it hangs", hung=True))
    watched.supervisor.blame(Fault("tpworker-rank0", "too late"))
    fault = watched.fault()
    assert fault.summary == "it hangs"
    assert fault.traceback is not None
    assert "fake_scheduler.py" in fault.traceback
    assert not fault.is_external


def test_who_is_blamed_while_it_is_stopped_was_stopped_by_others(watched: Watched) -> None:
    watched.ready()
    scheduler = psutil.Process(watched.pid("tpworker-scheduler"))
    scheduler.suspend()
    eventually(lambda: scheduler.status() == psutil.STATUS_STOPPED)
    watched.supervisor.blame(Fault("tpworker-scheduler", "it hangs", hung=True))
    assert watched.fault().is_external


@pytest.mark.parametrize(("number", "forfeits"), [(signal.SIGSEGV, True), (signal.SIGKILL, False)])
def test_who_is_blamed_when_another_has_crashed_forfeits_what_is_kept(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, forfeits: bool
) -> None:
    monkeypatch.setitem(GRACE_SECONDS, Kind.DIED, 60.0)
    monkeypatch.setattr(supervisor, "KILLED_SECONDS", 60.0)
    watched = Watched(model_folder)
    watched.ready()
    os.kill(watched.pid("tpworker-rank0"), number)
    eventually(lambda: bool(watched.supervisor._over))
    watched.supervisor.blame(Fault("tpworker-scheduler", "it hangs"))
    assert (watched.fault().process, watched.fault().forfeits) == ("tpworker-scheduler", forfeits)
    watched.close()


def test_kill_ends_all_at_any_time_without_a_fault(model_folder: Path) -> None:
    for when_ready in (False, True):
        watched = Watched(model_folder)
        if when_ready:
            watched.ready()
        watched.close()
        assert not watched.faults


def test_the_board_says_how_far_the_start_is(watched: Watched) -> None:
    watched.ready()
    eventually(lambda: all(row[Field.PHASE] == Phase.READY for row in watched.supervisor.board.rows()))


def test_the_environment_of_ranks(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    fault = fault_of(
        model_folder,
        rank0="fail(ValueError(os.environ['OMP_NUM_THREADS'] + os.environ['GLOO_SOCKET_IFNAME']))",
    )
    assert "ValueError: 7lo;" in fault.summary


def test_a_child_inherits_only_what_it_is_given(model_folder: Path) -> None:
    secret, other = os.pipe()
    os.set_inheritable(secret, True)
    try:
        pipe = os.readlink(f"/proc/self/fd/{secret}")
        has = "[os.path.realpath('/proc/self/fd/' + fd).split('/')[-1] for fd in os.listdir('/proc/self/fd')]"
        fault = fault_of(model_folder, rank0=f"fail(ValueError({pipe!r} in {has}, len({has}) > 5))")
        assert "ValueError: (False, True);" in fault.summary
    finally:
        os.close(secret)
        os.close(other)


def test_what_a_child_prints_does_not_mix_with_our_output(
    model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fault_of(model_folder, rank0="print('noise', flush=True) or fail(ValueError())")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "noise" in printed.err


def test_keys_typed_in_the_terminal_are_not_for_children(model_folder: Path) -> None:
    fault = fault_of(model_folder, rank0="fail(ValueError(os.getsid(0) == os.getpid()))")
    assert "ValueError: True;" in fault.summary
