"""Whoever logs never waits for whoever reads the log, and how much was lost is told."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import select
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import eventually
from tpworker.cli import log_writer
from tpworker.cli.log_writer import LogWriter

Make = Callable[..., LogWriter]


class Pipe:
    """A pipe of one page, whose reader reads when it is told to."""

    def __init__(self) -> None:
        self.receiver, self.sender = os.pipe()
        self.size = fcntl.fcntl(self.sender, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(self.receiver, False)
        self.data = b""

    def read(self) -> str:
        """All that has come so far."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.receiver, 1 << 16):
                self.data += part
        return self.text

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")

    def reopen(self) -> None:
        """Its reader is there again, as a disk may have room again."""
        self.data = b""
        self.receiver, sender = os.pipe()
        os.set_blocking(self.receiver, False)
        os.dup2(sender, self.sender)
        os.close(sender)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    os.close(pipe.receiver)
    os.close(pipe.sender)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, pipe: Pipe) -> Iterator[Make]:
    monkeypatch.setattr(log_writer, "_END_S", 0.05)
    monkeypatch.setattr(log_writer, "_FULL_S", 0.0)
    writers: list[LogWriter] = []

    def maker(max_bytes: int = log_writer.MAX_BYTES) -> LogWriter:
        writers.append(LogWriter(pipe.sender, max_bytes))
        writers[-1].setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        return writers[-1]

    yield maker
    for writer in writers:
        writer.close()
        thread = writer._thread
        while thread is not None and thread.is_alive():  # it writes to a number, which others will have
            pipe.read()
            thread.join(0.001)


def log(writer: LogWriter, *texts: str) -> None:
    for text in texts:
        writer.handle(logging.LogRecord("x", logging.INFO, "x.py", 1, text, (), None))


@pytest.mark.parametrize("blocking", [True, False])
def test_lines_come_whole_and_in_order_at_the_pace_of_their_reader(
    make: Make, pipe: Pipe, blocking: bool
) -> None:
    os.set_blocking(pipe.sender, blocking)
    writer = make()
    lines = [f"{number} {'é' * (number % 90)}" for number in range(2000)]
    log(writer, *lines)
    wanted = "".join(f"INFO {line}\n" for line in lines)
    eventually(lambda: pipe.read() == wanted)


def test_whoever_logs_does_not_wait_and_what_was_lost_is_counted(make: Make, pipe: Pipe) -> None:
    writer = make(max_bytes=20_000)
    log(writer, *(f"{number:5} {'x' * 93}" for number in range(1000)))  # 105 KB, which nobody reads
    eventually(lambda: "could not be written" in pipe.read())
    log(writer, "the end")
    eventually(lambda: pipe.read().endswith("INFO the end\n"))
    numbers = [int(number) for number in re.findall(r"^INFO +(\d+) x{93}$", pipe.text, re.MULTILINE)]
    assert numbers == sorted(set(numbers))
    assert 15_000 <= len(numbers) * 105 <= 20_000 + pipe.size
    (told,) = re.findall(r"^WARNING (\d+) lines of the log could not be written", pipe.text, re.MULTILINE)
    assert int(told) + len(numbers) == 1000


def test_the_end_does_not_wait_for_ever(make: Make, pipe: Pipe) -> None:
    writer = make()
    log(writer, "x" * 10_000)
    writer.close()
    log(writer, "late")
    assert not pipe.read().endswith("late\n")


def test_one_line_is_one(make: Make, pipe: Pipe) -> None:
    writer = make(max_bytes=50)
    log(writer, "y" * 60)
    log(writer, "short")
    eventually(lambda: pipe.read().count("\n") == 2)
    assert pipe.text.startswith("INFO short\nWARNING 1 line of the log could not be written")


def test_a_reader_that_has_gone_harms_nobody(make: Make, pipe: Pipe) -> None:
    os.close(pipe.receiver)
    writer = make()
    log(writer, *["into the void"] * 10)
    eventually(lambda: writer._num_lost == 10)
    pipe.reopen()
    log(writer, "hello")
    eventually(lambda: "10 lines of the log could not be written" in pipe.read())
    assert pipe.text.startswith("INFO hello\n")


def test_a_line_that_was_torn_off_does_not_spoil_the_next(make: Make, pipe: Pipe) -> None:
    writer = make()
    log(writer, "x" * 10_000)  # of which a page is written
    select.select([pipe.receiver], [], [])
    assert os.read(pipe.receiver, 4096)
    os.close(pipe.receiver)
    eventually(lambda: writer._num_lost == 1)
    pipe.reopen()
    log(writer, "next")
    eventually(lambda: "1 line of the log" in pipe.read())
    assert pipe.text.startswith("\nINFO next\nWARNING 1 line")


def test_what_cannot_be_formatted_is_told_as_logging_does(
    make: Make, pipe: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = make()
    writer.handle(logging.LogRecord("x", logging.INFO, "x.py", 1, "%d", ("no number",), None))
    log(writer, "after it")
    eventually(lambda: pipe.read() == "INFO after it\n")
    assert "--- Logging error ---" in capsys.readouterr().err
