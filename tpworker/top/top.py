"""`tpworker top`: from its options to frames."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TextIO

from rich.text import Text

from tpworker.errors import ConfigError, TpworkerError
from tpworker.observe.attach import running
from tpworker.observe.snapshot import Snapshot, to_json
from tpworker.top.rates import History, Rates
from tpworker.top.screen import frame
from tpworker.top.sources import Absent, BoardSource, Ended, Source, UrlSource, told
from tpworker.top.terminal import Keys, Paper

HELP = "q quits"
QUITS = frozenset(["q", "Q", "\x1b"])
"""Keys that do: the last is Escape."""
LONGEST_WAIT = 60.0
"""Seconds; what there is to see wakes us before."""


@dataclass(frozen=True)
class TopOptions:
    """What the command line of `tpworker top` says, checked."""

    target: int | str | None
    """A pid, a URL, or None: whatever this user has running."""
    once: bool
    as_json: bool
    interval: float
    """Seconds between two frames."""
    api_key: str | None


class NothingToShow(TpworkerError):
    """Nothing runs, or what does cannot be reached."""


def run_top(options: TopOptions) -> int:
    """Shows frames until somebody types q or what is shown ends; or one, where nobody could. Returns the exit
    status.

    Raises:
        ConfigError: there is no such process or server, or it cannot be looked at.
        NothingToShow: nothing was named, and nothing runs; or it does not answer.
    """
    paper = Paper(sys.stdout)
    with closing(_source(options, can_ask=paper.can_be_painted and not options.as_json)) as source:
        if options.as_json or options.once or not paper.can_be_painted:
            snapshot, rates = _two(source, options.interval)
            if options.as_json:
                json.dump(to_json(snapshot) | {"rates": asdict(rates)}, sys.stdout)
                print()
            else:
                paper.print(frame(snapshot, rates, paper.size[0]))
            return 0
        return _live(source, paper, options.interval)


def _source(options: TopOptions, can_ask: bool) -> Source:
    target = options.target
    if isinstance(target, str):
        return UrlSource(target, options.api_key)
    if target is not None:
        return BoardSource(target)
    choices = running()
    if not choices:
        raise NothingToShow("no tpworker of this user runs on this machine: name a process or a URL")
    pids = list(dict.fromkeys(pid for pid, _ in choices))
    if len(pids) == 1:
        return BoardSource(pids[0])
    lines = told(choices, time.monotonic_ns())
    if not can_ask or not sys.stdin.isatty():
        raise ConfigError("\n".join(["several run: name one by its pid", *lines]))
    return BoardSource(choices[_choice(lines, sys.stdout)][0])


def _choice(lines: list[str], out: TextIO) -> int:
    print(*lines, sep="\n", file=out)
    while True:
        try:
            text = input(f"Which one? 1 to {len(lines)}: ").strip()
        except EOFError:
            raise ConfigError("none was chosen") from None
        if text.isdecimal() and 1 <= int(text) <= len(lines):
            return int(text) - 1


def _two(source: Source, interval: float) -> tuple[Snapshot, Rates]:
    """What is so, and what happens meanwhile."""
    history = History()
    history.add(_read(source))
    time.sleep(interval)
    snapshot = _read(source)
    return snapshot, history.add(snapshot)


def _read(source: Source) -> Snapshot:
    """For who cannot wait until it is there again."""
    try:
        return source.read()
    except (Absent, Ended) as error:
        raise NothingToShow(str(error)) from None


class _Reader(threading.Thread):
    """Reads a source now and then, so that a server that is slow to answer holds up no key."""

    def __init__(self, source: Source, interval: float, keys: Keys, first: Snapshot) -> None:
        super().__init__(name="tpworker-top", daemon=True)
        self._source, self._interval, self._keys = source, interval, keys
        self._closed = threading.Event()
        self._history = History()
        self.latest = first, self._history.add(first)
        self.trouble = ""
        """Why there is nothing newer; '': there is."""
        self.error: Exception | None = None
        """Why there will be nothing any more."""

    def run(self) -> None:
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                snapshot = self._source.read()
                self.latest, self.trouble = (snapshot, self._history.add(snapshot)), ""
            except Absent as error:
                self.trouble = str(error)
            except Exception as error:
                self.error = error
                return
            finally:
                self._keys.wake()
            self._closed.wait(max(0.05, self._interval - (time.monotonic() - began)))

    def close(self) -> None:
        """Has it end, and waits for that a moment: it may be waiting for a server."""
        self._closed.set()
        self.join(1.0)


def _live(source: Source, paper: Paper, interval: float) -> int:
    first = _read(source)
    with paper.taken() as keys:
        reader = _Reader(source, interval, keys, first)
        reader.start()
        try:
            while reader.error is None:
                paper.paint(_painted(reader, source, paper))
                if keys.wait(LONGEST_WAIT) in QUITS:
                    return 0
        except KeyboardInterrupt as error:
            if type(error) is not KeyboardInterrupt:  # another signal than Ctrl-C
                raise
            return 0
        finally:
            reader.close()
    if isinstance(reader.error, Ended):
        print(f"tpworker: {reader.error}", file=sys.stderr)
        return 0
    raise reader.error


def _painted(reader: _Reader, source: Source, paper: Paper) -> list[Text]:
    width, height = paper.size
    note = f"{HELP}   {source.name}" + (f"   {reader.trouble}" if reader.trouble else "")
    return frame(*reader.latest, width, height, note)
