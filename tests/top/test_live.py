"""`tpworker top` in a terminal of its own, and without one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.ipc.ranks import DEADLINE, ROOT
from tests.observe.boards import busy_board
from tpworker import cli
from tpworker.observe.snapshot import from_json
from tpworker.top import top as top_module
from tpworker.top.top import TopOptions

ENTERED, LEFT = b"\x1b[?1049h", b"\x1b[?25h\x1b[?1049l"


class Terminal:
    """A terminal in which `tpworker top` runs."""

    def __init__(self, *words: str, **environment: str) -> None:
        self._master, slave = pty.openpty()
        self.resize(24, 80)
        self.modes = termios.tcgetattr(slave)
        self.slave = slave
        unwanted = ("NO_COLOR", "COLUMNS", "LINES")
        inherited = {key: value for key, value in os.environ.items() if key not in unwanted}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tpworker", "top", *words, "--interval", "0.1"],
            stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
            env={**inherited, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.seen = b""

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, condition: Callable[[bytes], bool]) -> bytes:
        """Reads until what has come since the last call fulfils a condition."""
        deadline = time.monotonic() + DEADLINE
        self.seen = b""
        while not condition(self.seen):
            assert time.monotonic() < deadline, self.seen
            if select.select([self._master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self._master, 1 << 16)
        return self.seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)
        os.close(self._master)
        os.close(self.slave)


@pytest.fixture
def board() -> Iterator[Any]:
    with closing(busy_board()) as board:
        yield board


def last_frame(seen: bytes) -> list[str]:
    """The lines of the last whole frame, without colours."""
    frame = seen.rpartition(b"\x1b[?2026l")[0].rpartition(b"\x1b[H")[2].decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", frame).split("\n")


def test_it_lives_in_the_terminal_and_leaves_it_as_it_was(board: Any) -> None:
    with closing(Terminal(str(os.getpid()))) as terminal:
        seen = terminal.until(lambda seen: seen.count(b"\x1b[?2026l") >= 3)
        assert seen.count(ENTERED) == 1
        assert seen.count(b"\x1b[2J") == 1, "it flickers"
        assert b"\x1b[32m" in seen, "no colours"
        lines = last_frame(seen)
        assert len(lines) == 24
        assert max(map(len, lines)) <= 80, lines
        assert lines[0].startswith("tpworker")
        assert "rank1" in "".join(lines)
        assert "cmpl-?[31mred" in "".join(lines), "a request's name writes to the terminal"
        terminal.resize(12, 40)
        terminal.process.send_signal(signal.SIGWINCH)
        lines = last_frame(terminal.until(lambda seen: len(last_frame(seen)) == 12))
        assert all(len(line) <= 40 for line in lines)
        terminal.type("\x1a")  # Ctrl-Z
        assert LEFT in terminal.until(lambda seen: LEFT in seen)
        os.waitpid(terminal.process.pid, os.WUNTRACED)
        assert termios.tcgetattr(terminal.slave) == terminal.modes
        terminal.process.send_signal(signal.SIGCONT)
        terminal.until(lambda seen: ENTERED in seen and b"rank1" in seen)
        terminal.type("q")
        terminal.until(lambda seen: LEFT in seen)
        assert terminal.process.wait(DEADLINE) == 0
        assert termios.tcgetattr(terminal.slave) == terminal.modes


def test_ctrl_c_ends_it_and_so_does_the_end_of_what_it_shows() -> None:
    code = (
        "import sys; from tests.observe.boards import busy_board; board = busy_board(); print(flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shown:
        assert shown.stdout is not None
        shown.stdout.readline()
        with closing(Terminal(str(shown.pid), NO_COLOR="1")) as terminal:
            seen = terminal.until(lambda seen: b"\x1b[?2026l" in seen)
            assert not re.search(rb"\x1b\[[0-9;]*3[0-9]m", seen), "colours"
            terminal.type("\x03")
            terminal.until(lambda seen: LEFT in seen)
            assert terminal.process.wait(DEADLINE) == 0
        with closing(Terminal(str(shown.pid))) as terminal:
            terminal.until(lambda seen: b"\x1b[?2026l" in seen)
            shown.communicate(timeout=DEADLINE)
            told = f"process {shown.pid} has ended".encode()
            assert told in terminal.until(lambda seen: told in seen).partition(LEFT)[2]
            assert terminal.process.wait(DEADLINE) == 0


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["top", *words, "--interval", "0.1"]) == 0
    return capsys.readouterr().out


def test_without_a_terminal_there_is_one_frame(board: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(str(os.getpid()), capsys=capsys)
    assert "\x1b" not in text
    assert text.splitlines()[0].startswith("tpworker")
    assert "rank1" in text
    told = json.loads(run(str(os.getpid()), "--json", capsys=capsys))
    assert from_json(told).scheduler.free_blocks == 60
    assert told["rates"]["steps"] == 0
    assert len(told["rates"]["ranks"]) == 2


def test_the_only_one_is_shown_and_of_several_one_is_to_be_named(
    board: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = os.getpid(), board.about
    monkeypatch.setattr(top_module, "running", lambda: [one])
    assert "rank1" in run("--once", capsys=capsys)
    monkeypatch.setattr(top_module, "running", lambda: [one, (1, board.about)])
    assert cli.main(["top"]) == 2
    told = capsys.readouterr().err
    assert "several run: name one by its pid" in told
    assert f"1  pid {os.getpid()}" in told
    answers = iter(["x", "3", "1"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert top_module._choice(["a", "b"], sys.stdout) == 0
    monkeypatch.setattr(top_module, "running", list)
    assert cli.main(["top"]) == 1
    assert "no tpworker of this user runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["abc"], "'abc' is neither a process' number nor a URL"),
        (["0"], "'0' is neither"),
        (["1", "--interval", "0"], "--interval 0.0: must be from 0.1 to 60"),
        (["1", "--api-key", "x"], "--api-key has no effect without a URL"),
        (["http://h", "--api-key", "a", "--api-key-file", "b"], "both given"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_key_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPWORKER_API_KEY", "secret")
    assert cli.parse(["top", "http://h"]) == TopOptions("http://h", False, False, 1.0, "secret")
    assert cli.parse(["top", "12", "--once"]) == TopOptions(12, True, False, 1.0, None)
    assert cli.parse(["top", "12", "--once", "--json"]) == TopOptions(12, True, True, 1.0, None)
