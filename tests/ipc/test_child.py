from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import get_type_hints

import psutil
import pytest

from tests.conftest import eventually, is_gone
from tpworker.ipc.child import (
    READY,
    STACKS_SIGNAL,
    Descriptor,
    RankBoot,
    RankSettings,
    Report,
    SchedulerBoot,
    SchedulerSettings,
    descriptors_of,
    pack_boot,
    read_report,
    write_report,
)
from tpworker.ipc.codec import MessageError, unpack_dataclass
from tpworker.ipc.standby import ForkRequest, read_told

SCHEDULER_BOOT = SchedulerBoot(
    generation=3, name="tpworker-scheduler", log_level=20, report_fd=9, num_ranks=2, runtime_address="ipc://@r",
    plan_addresses=("ipc://@p0", "ipc://@p1"), result_address="ipc://@s", board_fd=7, masks_fd=10,
    settings=SchedulerSettings(2, 64, 512, 2048, 49152, 16, True, 60.0, 600.0), blocks_fd=12,
)  # fmt: skip
RANK_BOOT = RankBoot(
    generation=3, name="tpworker-rank1", log_level=20, report_fd=9, rank=1, num_ranks=2,
    plan_address="ipc://@p1", result_address="ipc://@s", barrier_fd=5, board_fd=7, meeting_fd=9,
    masks_fd=10, store_fd=8, model="/models/ä",
    settings=RankSettings(2, 64, 512, 2048, 16, 0, 0.9, "cpu", "float32", "auto", 0, False, 60.0, 600.0),
    kept_fd=11,
)  # fmt: skip


@pytest.mark.parametrize("boot", [SCHEDULER_BOOT, RANK_BOOT])
def test_a_boot_message_comes_out_as_it_went_in(boot: SchedulerBoot | RankBoot) -> None:
    assert unpack_dataclass(type(boot), pack_boot(boot)) == boot


@pytest.mark.parametrize("boot_class", [SchedulerBoot, RankBoot])
def test_descriptors_are_known_by_their_names(boot_class: type[SchedulerBoot | RankBoot]) -> None:
    """They are sent with the message, whichever fields it has."""
    hints = get_type_hints(boot_class, include_extras=True)
    assert {name for name in hints if name.endswith("_fd")} == {
        name for name, hint in hints.items() if hint in (Descriptor, Descriptor | None)
    }
    assert descriptors_of(RANK_BOOT) == [5, 7, 9, 10, 8, 11]
    assert descriptors_of(SCHEDULER_BOOT) == [7, 10, 12]
    assert descriptors_of(dataclasses.replace(SCHEDULER_BOOT, blocks_fd=None)) == [7, 10]


def test_a_boot_message_of_the_wrong_kind_or_out_of_bounds_is_refused() -> None:
    with pytest.raises(MessageError, match="RankBoot"):
        unpack_dataclass(RankBoot, pack_boot(SCHEDULER_BOOT))
    with pytest.raises(MessageError, match="within 1 and 64"):
        unpack_dataclass(RankBoot, pack_boot(dataclasses.replace(RANK_BOOT, num_ranks=65)))
    with pytest.raises(MessageError, match="limit"):
        pack_boot(dataclasses.replace(RANK_BOOT, model="x" * 70_000))


def test_a_report_fits_into_a_pipe_whatever_the_exception_says() -> None:
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    error = ValueError("\N{PILE OF POO}" * 100_000 + "\udcff")
    error.missing = [1, 99]  # type: ignore[attr-defined]
    write_report(sender, Report.of(error))
    os.close(sender)
    with open(receiver, "rb") as pipe:
        report, stacks = read_report(pipe.read())
    assert report is not None
    assert report.error == "ValueError"
    assert report.summary.startswith("\N{PILE OF POO}")
    assert report.missing == (1,)
    assert report.diverging == ()
    assert stacks == ""


def test_a_report_cut_short_is_none() -> None:
    receiver, sender = os.pipe()
    write_report(sender, Report.of(ValueError("x")))
    data = os.read(receiver, 1 << 16)
    os.close(receiver)
    os.close(sender)
    assert read_report(data)[0] is not None
    assert read_report(data[:-1])[0] is None
    assert read_report(b"") == (None, "")


def test_the_first_report_counts() -> None:
    receiver, sender = os.pipe()
    for error in (ValueError("first"), KeyError("second")):
        write_report(sender, Report.of(error))
    report, _ = read_report(os.read(receiver, 1 << 16))
    assert report is not None
    assert report.summary == "first"
    os.close(receiver)
    os.close(sender)


class Started:
    """A child that runs `code` as the body of its main function, forked from a standby of its own."""

    def __init__(self, code: str, log_format: str = "text") -> None:
        self.report_fd, report = os.pipe()
        lifeline, self.lifeline = os.pipe()
        self.status, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = "import os, signal, subprocess, sys, time, logging\nfrom tpworker.ipc.child import *\n"
        program += "def main(boot):\n" + textwrap.indent(textwrap.dedent(code), "    ")
        program += "\nrun_child(SchedulerBoot, main)\n"
        self.standby = subprocess.Popen(
            [sys.executable, "-c", program, "tpworker-scheduler-standby", "cpu", log_format, "20"],
            stdin=control.fileno(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        descriptors = [status.fileno(), lifeline, report, *[report] * 3]  # the last three stand for memfds
        boot = dataclasses.replace(SCHEDULER_BOOT, log_format=log_format)
        ForkRequest(pack_boot(boot)).send(self.control, descriptors)
        for fd in (report, lifeline):
            os.close(fd)
        status.close()
        control.close()
        self.pid = read_told(self.status.recv(64))

    def line(self) -> str:
        assert self.standby.stdout is not None
        return self.standby.stdout.readline().decode().strip()

    def end(self) -> tuple[int, Report | None, str]:
        """Waits for it; its status, its report and its stacks."""
        data = b"".join(iter(lambda: os.read(self.report_fd, 1 << 16), b""))
        self.status.settimeout(20)
        return read_told(self.status.recv(64)), *read_report(data)

    def close_lifeline(self) -> None:
        os.close(self.lifeline)
        self.lifeline = -1

    def close(self) -> None:
        os.close(self.report_fd)
        if self.lifeline >= 0:
            self.close_lifeline()
        self.standby.kill()
        for pipe in (self.standby.stdout, self.standby.stderr, self.status, self.control):
            assert pipe is not None
            pipe.close()
        self.standby.wait()
        eventually(lambda: is_gone(self.pid))


@pytest.fixture
def start() -> Iterator[type[Started]]:
    started: list[Started] = []

    class Tracked(Started):
        def __init__(self, code: str, log_format: str = "text") -> None:
            super().__init__(code, log_format)
            started.append(self)

    yield Tracked
    for child in started:
        child.close()


def test_a_child_bears_its_name_in_its_title_and_in_every_log_line(start: type[Started]) -> None:
    child = start(
        "logging.getLogger('tpworker.x').info('hello'); print(boot.name, flush=True); time.sleep(60)"
    )
    assert child.line() == "tpworker-scheduler"
    for pid, name in ((child.pid, "tpworker-scheduler"), (child.standby.pid, "tpworker-scheduler-standby")):
        assert psutil.Process(pid).cmdline()[0].strip("\0 ") == name
        assert psutil.Process(pid).name() == name
    child.standby.kill()
    assert child.standby.stderr is not None
    assert "tpworker-scheduler INFO hello" in child.standby.stderr.read().decode()


def test_a_child_writes_its_log_in_the_format_that_it_is_told(start: type[Started]) -> None:
    child = start("logging.getLogger('tpworker.x').info('hello'); print(flush=True); time.sleep(60)", "json")
    child.line()
    child.standby.kill()
    assert child.standby.stderr is not None
    told = json.loads(child.standby.stderr.read())
    assert (told["process"], told["level"], told["message"]) == ("tpworker-scheduler", "info", "hello")


def test_a_child_that_returns_ends_with_status_0_and_no_report(start: type[Started]) -> None:
    assert start("pass").end() == (0, None, "")


def test_a_child_that_raises_reports_it_with_its_traceback(start: type[Started]) -> None:
    code = "error = KeyError('nonsense'); error.minority = [1]; raise ValueError('as told') from error"
    status, report, _ = start(code).end()
    assert status == 1
    assert report is not None
    assert (report.error, report.summary) == ("ValueError", "as told")
    assert (report.missing, report.diverging) == ((), (1,))
    assert "KeyError: 'nonsense'" in report.traceback
    assert "in main" in report.traceback


def test_a_child_that_ends_is_gone_though_its_threads_are_not(start: type[Started]) -> None:
    child = start("import threading; threading.Thread(target=time.sleep, args=(1000,)).start()")
    assert child.end()[0] == 0


def test_when_to_stop_is_for_the_parent_to_say(start: type[Started]) -> None:
    child = start("print('up', flush=True); sys.stdout.flush(); time.sleep(0.3); print('done', flush=True)")
    assert child.line() == "up"
    for pid in (child.pid, child.standby.pid):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
    assert child.line() == "done"
    assert child.end()[0] == 0


def test_a_child_ends_when_its_lifeline_does(start: type[Started]) -> None:
    child = start("print('up', flush=True); time.sleep(1000)")
    assert child.line() == "up"
    child.close_lifeline()
    assert child.end()[0] == 1


def test_a_child_ends_when_its_standby_does_though_its_lifeline_holds(start: type[Started]) -> None:
    child = start("print('up', flush=True); time.sleep(1000)")
    assert child.line() == "up"
    child.standby.kill()
    eventually(lambda: is_gone(child.pid))


def test_a_standby_ends_when_its_parent_lets_go_of_it(start: type[Started]) -> None:
    child = start("print('up', flush=True); time.sleep(1000)")
    assert child.line() == "up"
    child.control.close()
    assert child.standby.wait(20) == 0
    eventually(lambda: is_gone(child.pid))


def test_nobody_can_read_the_lifeline_away(start: type[Started]) -> None:
    child = start("print(repr(sys.stdin.read()), os.get_inheritable(boot.report_fd), flush=True)")
    assert child.line() == "'' False"


def test_a_standby_ends_with_its_parent_though_its_control_socket_holds() -> None:
    """PDEATHSIG: somebody else has the other end as well, as a process forked by the user would."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = "from tpworker.ipc.child import *\nrun_child(SchedulerBoot, print)"
    parent = (
        "import subprocess, sys, time\n"
        f"command = [sys.executable, '-c', {child!r}, 'standby', 'cpu', 'text', '20']\n"
        f"child = subprocess.Popen(command, stdin={theirs.fileno()})\n"
        "print(child.pid, flush=True)\ntime.sleep(1000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, pass_fds=[theirs.fileno()]
    )
    theirs.close()
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert ours.recv(100) == READY
    process.kill()
    process.wait()
    process.stdout.close()
    eventually(lambda: is_gone(pid))
    ours.close()


def test_a_hung_child_writes_its_stacks_when_asked_and_may_report_later(start: type[Started]) -> None:
    child = start(
        """
        import threading
        def wait_for_ever():
            print('up', flush=True)
            time.sleep(1)
            raise ValueError('after all')
        wait_for_ever()
        """
    )
    assert child.line() == "up"
    os.kill(child.pid, STACKS_SIGNAL)
    status, report, stacks = child.end()
    assert status == 1
    assert report is not None
    assert report.summary == "after all"
    assert "in wait_for_ever" in stacks


def test_a_grandchild_does_not_hold_the_report_pipe(start: type[Started]) -> None:
    child = start("print(subprocess.Popen(['sleep', '1000'], close_fds=False).pid, flush=True)")
    pid = int(child.line())
    try:
        assert child.end()[0] == 0  # which waits for EOF
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_program_started_by_somebody_else_ends_at_once() -> None:
    program = "from tpworker.ipc.child import *\nrun_child(SchedulerBoot, print)"
    done = subprocess.run([sys.executable, "-c", program], input=b"", capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"MessageError: no control socket on stdin: only tpworker itself" in done.stderr


def test_a_request_that_makes_no_sense_is_refused_and_the_standby_goes_on(start: type[Started]) -> None:
    child = start("print('up', flush=True); time.sleep(1000)")
    assert child.line() == "up"
    receiver, sender = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline = os.open(os.devnull, os.O_RDONLY)
    socket.send_fds(child.control, [b"\xc1"], [theirs.fileno(), lifeline, sender])
    for fd in (sender, lifeline):
        os.close(fd)
    theirs.close()
    report, _ = read_report(b"".join(iter(lambda: os.read(receiver, 1 << 16), b"")))
    assert report is not None
    assert report.error == "MessageError"
    assert ours.recv(64) == b""
    socket.send_fds(child.control, [b"\xc1"], [])
    assert child.control.recv(100) == READY  # the one of its beginning: it has not said anything since
    assert child.standby.poll() is None
    ours.close()
    os.close(receiver)
