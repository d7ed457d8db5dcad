"""A terminal that is painted over and over, and whose keys are read: no flicker, and as it was afterwards.

A frame goes out in one write, line over line, and nothing is erased that is not written at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from tpworker.top.text import in_ascii

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J"  # the other screen, without a cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"  # to be shown as one; terminals that do not know it ignore it
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class Paper:
    """Where lines of text go, in colour if that is wanted there (NO_COLOR, TERM, and what it is).

    Args:
        out: stdout.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._console = Console(file=out, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._is_ascii = "utf" not in (out.encoding or "").lower()

    @property
    def can_be_painted(self) -> bool:
        """Whether it is a terminal that can be written over."""
        return self._out.isatty() and not self._console.is_dumb_terminal

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, at this instant."""
        return self._console.size.width, self._console.size.height

    def rendered(self, line: Text) -> str:
        """A line with its colours."""
        if self._is_ascii:
            spans, line = line.spans, Text(in_ascii(line.plain), line.style)
            line.spans = spans
        with self._console.capture() as capture:
            self._console.print(line, end="", no_wrap=True, crop=False, overflow="ignore")
        return capture.get()

    def print(self, lines: Sequence[Text]) -> None:
        """Below what is there."""
        self._out.write("".join(f"{self.rendered(line).rstrip()}\n" for line in lines))
        self._out.flush()

    def paint(self, lines: Sequence[Text]) -> None:
        """Over what is there, from the top; no more lines than the terminal has."""
        text = f"{_REST_OF_LINE}\r\n".join(map(self.rendered, lines))
        self._write(f"{_BEGIN}{_HOME}{text}{_REST_OF_LINE}{_REST_OF_SCREEN}{_END}")

    def _write(self, text: str) -> None:
        data = text.encode(self._out.encoding or "ascii", "replace")
        while data:
            data = data[os.write(self._out.fileno(), data) :]

    @contextmanager
    def taken(self) -> Generator[Keys, None, None]:
        """Meanwhile the other screen is shown, and keys are read as they are typed.

        Whatever ends it, an error or a signal that raises, the terminal is as it was.
        """
        self._out.flush()
        with Keys(sys.stdin, self._leave, self._enter) as keys:
            self._enter()
            try:
                yield keys
            finally:
                self._leave()

    def _enter(self) -> None:
        self._write(_ENTER)

    def _leave(self) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._write(_LEAVE)


class Keys:
    """Keys that are typed, and whatever else is to wake who waits for them: a new size, a new snapshot.

    Args:
        stream: stdin. If it is no terminal nothing is read from it.
        leave, enter: called when Ctrl-Z stops this process, and when it goes on.
    """

    def __init__(self, stream: TextIO, leave: Callable[[], None], enter: Callable[[], None]) -> None:
        self._fd = stream.fileno() if stream.isatty() else None
        self._leave, self._enter = leave, enter
        self._before: list[Any] | None = None
        self._receiver, self._sender = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handlers: dict[int, Any] = {}
        self._is_to_stop = self._has_gone_on = False

    def __enter__(self) -> Keys:
        for number in (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT):
            self._handlers[number] = signal.signal(number, self._signalled)
        self._take()
        return self

    def __exit__(self, *exception: object) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._receiver)
        os.close(self._sender)

    def wake(self) -> None:
        """Ends a `wait`; from any thread, and from signal handlers."""
        with contextlib.suppress(OSError):  # full of wake-ups already, or closed
            os.write(self._sender, b"\0")

    def wait(self, seconds: float) -> str:
        """Sleeps until a key is typed, or somebody wakes us. Returns what was typed, perhaps nothing."""
        watched = [self._receiver] if self._fd is None else [self._receiver, self._fd]
        ready, _, _ = select.select(watched, [], [], seconds)
        if self._receiver in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._receiver, 1 << 12)
        if self._is_to_stop:
            self._stop()
        if self._has_gone_on:
            self._go_on()
        if self._fd is not None and self._fd in ready:
            try:
                typed = os.read(self._fd, 1 << 10)
            except OSError:
                typed = b""
            return typed.decode(errors="replace") if typed else "q"  # '': the terminal is gone
        return ""

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._is_to_stop |= number == signal.SIGTSTP
        self._has_gone_on |= number == signal.SIGCONT
        self.wake()

    def _stop(self) -> None:
        """The shell gets its terminal as it was."""
        self._is_to_stop = False
        self._give_back()
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _go_on(self) -> None:
        """Whoever has stopped us: somebody else may have used the terminal."""
        self._has_gone_on = False
        self._take()
        self._enter()

    def _take(self) -> None:
        if self._fd is not None:
            self._before = self._before or termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd, termios.TCSANOW)  # Ctrl-C and Ctrl-Z stay signals

    def _give_back(self) -> None:
        if self._fd is not None and self._before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, self._before)
