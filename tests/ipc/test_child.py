from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import eventually, is_gone
from tpworker.ipc.child import (
    STACKS_SIGNAL,
    RankBoot,
    RankSettings,
    Report,
    SchedulerBoot,
    SchedulerSettings,
    pack_boot,
    read_report,
    write_report,
)
from tpworker.ipc.codec import MessageError, unpack_dataclass

SCHEDULER_BOOT = SchedulerBoot(
    generation=3, name="tpworker-scheduler", log_level=20, report_fd=9, num_ranks=2, runtime_address="ipc://@r",
    plan_addresses=("ipc://@p0", "ipc://@p1"), result_address="ipc://@s", board_fd=7, masks_fd=10,
    settings=SchedulerSettings(2, 64, 512, 2048, 49152, 16, True, 60.0, 600.0),
)  # fmt: skip
RANK_BOOT = RankBoot(
    generation=3, name="tpworker-rank1", log_level=20, report_fd=9, rank=1, num_ranks=2,
    plan_address="ipc://@p1", result_address="ipc://@s", barrier_fd=5, board_fd=7, meeting_fd=9,
    masks_fd=10, store_fd=8, model="/models/ä",
    settings=RankSettings(2, 64, 512, 2048, 16, 0, 0.9, "cpu", "float32", "auto", 0, False, 60.0, 600.0),
)  # fmt: skip


@pytest.mark.parametrize("boot", [SCHEDULER_BOOT, RANK_BOOT])
def test_a_boot_message_comes_out_as_it_went_in(boot: SchedulerBoot | RankBoot) -> None:
    packed = pack_boot(boot)
    assert int.from_bytes(packed[:4], "little") == len(packed) - 4
    assert unpack_dataclass(type(boot), packed[4:]) == boot


def test_a_boot_message_of_the_wrong_kind_or_out_of_bounds_is_refused() -> None:
    with pytest.raises(MessageError, match="RankBoot"):
        unpack_dataclass(RankBoot, pack_boot(SCHEDULER_BOOT)[4:])
    with pytest.raises(MessageError, match="within 1 and 64"):
        unpack_dataclass(RankBoot, pack_boot(dataclasses.replace(RANK_BOOT, num_ranks=65))[4:])
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
    """A child that runs `code` as the body of its main function."""

    def __init__(self, code: str, *, lifeline: int = subprocess.PIPE) -> None:
        self.report_fd, write_end = os.pipe()
        program = "import os, signal, subprocess, sys, time, logging\nfrom tpworker.ipc.child import *\n"
        program += "def main(boot):\n" + textwrap.indent(textwrap.dedent(code), "    ")
        program += "\nrun_child(SchedulerBoot, main)\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=lifeline, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=[write_end],
        )  # fmt: skip
        os.close(write_end)
        self.boot = pack_boot(dataclasses.replace(SCHEDULER_BOOT, report_fd=write_end))
        if self.process.stdin is not None:
            self.process.stdin.write(self.boot)
            self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def end(self) -> tuple[int, Report | None, str]:
        """Waits for it; its status, its report and its stacks."""
        data = b"".join(iter(lambda: os.read(self.report_fd, 1 << 16), b""))
        return self.process.wait(20), *read_report(data)

    def close(self) -> None:
        os.close(self.report_fd)
        if self.process.poll() is None:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        self.process.wait()


@pytest.fixture
def start() -> Iterator[type[Started]]:
    started: list[Started] = []

    class Tracked(Started):
        def __init__(self, code: str, *, lifeline: int = subprocess.PIPE) -> None:
            super().__init__(code, lifeline=lifeline)
            started.append(self)

    yield Tracked
    for child in started:
        child.close()


def test_a_child_bears_its_name_in_its_title_and_in_every_log_line(start: type[Started]) -> None:
    child = start(
        "logging.getLogger('tpworker.x').info('hello'); print(boot.name, flush=True); time.sleep(60)"
    )
    assert child.line() == "tpworker-scheduler"
    assert psutil.Process(child.process.pid).cmdline()[0].strip("\0 ") == "tpworker-scheduler"
    assert psutil.Process(child.process.pid).name().startswith("tpworker-schedu")
    child.process.kill()
    assert child.process.stderr is not None
    assert "tpworker-scheduler INFO hello" in child.process.stderr.read().decode()


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
    child.process.send_signal(signal.SIGINT)
    child.process.send_signal(signal.SIGTERM)
    assert child.line() == "done"
    assert child.end()[0] == 0


def test_a_child_ends_when_its_lifeline_does(start: type[Started]) -> None:
    child = start("print('up', flush=True); time.sleep(1000)")
    assert child.line() == "up"
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.end()[0] == 1


def test_nobody_can_read_the_lifeline_away(start: type[Started]) -> None:
    child = start("print(repr(sys.stdin.read()), os.get_inheritable(boot.report_fd), flush=True)")
    assert child.line() == "'' False"


def test_a_child_ends_with_the_thread_that_started_it_though_its_lifeline_holds(tmp_path: Path) -> None:
    """PDEATHSIG: somebody else holds the lifeline's other end, as a process forked by the user would."""
    receiver, sender = os.pipe()
    report_receiver, report_sender = os.pipe()
    boot = pack_boot(dataclasses.replace(SCHEDULER_BOOT, report_fd=report_sender))
    child = "import time\nfrom tpworker.ipc.child import *\n"
    child += "run_child(SchedulerBoot, lambda boot: (print('up', flush=True), time.sleep(1000)))"
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdin={receiver}, "
        f"stdout=subprocess.PIPE, pass_fds=[{report_sender}])\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(1000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, pass_fds=[receiver, report_sender]
    )
    os.write(sender, boot)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    eventually(lambda: is_gone(pid))
    for fd in (receiver, sender, report_receiver, report_sender):
        os.close(fd)


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
    child.process.send_signal(STACKS_SIGNAL)
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


@pytest.mark.parametrize("data", [b"", b"\x05\0\0\0", b"\x03\0\0\0abc", b"\xff\xff\xff\xff"])
def test_a_child_started_by_somebody_else_ends_at_once(data: bytes) -> None:
    program = "from tpworker.ipc.child import *\nrun_child(SchedulerBoot, print)"
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"MessageError" in done.stderr
