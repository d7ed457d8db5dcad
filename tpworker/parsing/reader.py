"""Text that comes in pieces, read by generators as if it were all there.

A part of a parser is a generator that yields where it needs more text and returns what it has read, so the
state between two pieces is the place where it stands. What is looked at is taken, but for the beginning of
a mark: no character is looked at again with each piece, and the cost is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

_T = TypeVar("_T")
Reading = Generator[None, None, _T]
"""A part of a parser that returns a `_T`."""
Sink = Callable[[str], None]
"""Takes text, as it comes."""

SPACE = re.compile(r"\s+")


class Marks:
    """Strings that are looked for in text that comes in pieces: whichever is first.

    None is within another, but at its end: one would be found where the other is not whole yet.
    """

    def __init__(self, *marks: str) -> None:
        self._mark = re.compile("|".join(map(re.escape, marks)))
        self._longest = max(map(len, marks))
        beginnings = {mark[:length] for mark in marks for length in range(1, len(mark))}
        longest_first = sorted(beginnings, key=len, reverse=True)
        self._beginning = re.compile(rf"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})\Z")

    def find(self, text: str, start: int) -> re.Match[str] | None:
        """The first of them."""
        return self._mark.search(text, start)

    def beginning(self, text: str, start: int) -> int:
        """Where the text ends, but for what may be the beginning of one."""
        found = self._beginning.search(text, max(start, len(text) - self._longest + 1))
        return len(text) if found is None else found.start()


class Reader:
    """The text that has come and is not taken yet. Every method that is a generator waits for more."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._is_ended = False
        self._record: list[str] | None = None

    def add(self, text: str) -> None:
        """More of it."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """Nothing more comes."""
        self._is_ended = True

    @property
    def is_ended(self) -> bool:
        """Whether all is taken, and nothing more comes."""
        return self._is_ended and self._at == len(self._text)

    def is_cut_in(self, *marks: str) -> bool:
        """Whether the text has ended in one of these, or before it."""
        rest = self._text[self._at :] if self._is_ended else None
        return rest is not None and any(mark.startswith(rest) for mark in marks)

    # ------------------------------------------------------------ what may not be what it looks like

    def record(self, text: str = "") -> None:
        """From here on what is taken is kept, behind this text, which has been taken already."""
        self._record = [text]

    def recorded(self) -> str:
        """What was taken since `record`; nothing more is kept."""
        record, self._record = self._record or [], None
        return "".join(record)

    # ------------------------------------------------------------------------------------- at once

    def take(self, count: int = 1) -> str:
        """So many characters of those that are there."""
        return self._take_to(self._at + count)

    def rest(self) -> str:
        """All that is there."""
        return self._take_to(len(self._text))

    def _take_to(self, end: int) -> str:
        text = self._text[self._at : end]
        self._at = min(end, len(self._text))
        if self._record is not None and text:
            self._record.append(text)
        return text

    # ------------------------------------------------------------------------------------- waiting

    def peek(self) -> Reading[str]:
        """The next character, which is not taken; empty at the end."""
        while self._at == len(self._text):
            if self._is_ended:
                return ""
            yield
        return self._text[self._at]

    def accept(self, mark: str, *, is_taken: bool = True) -> Reading[bool]:
        """Whether this text comes next. It is taken then, unless it is only to be looked for."""
        while not self._text.startswith(mark, self._at):
            num_chars = len(self._text) - self._at
            if self._is_ended or num_chars >= len(mark) or not mark.startswith(self._text[self._at :]):
                return False
            yield
        if is_taken:
            self.take(len(mark))
        return True

    def while_(self, characters: re.Pattern[str], sink: Sink) -> Reading[None]:
        """Takes characters of a class (`[…]+`) for as long as they come."""
        while True:
            found = characters.match(self._text, self._at)
            if found is not None:
                sink(self._take_to(found.end()))
            if self._at < len(self._text) or self._is_ended:
                return
            yield

    def run(self, characters: re.Pattern[str]) -> Reading[str]:
        """What `while_` takes, all of it."""
        parts: list[str] = []
        yield from self.while_(characters, parts.append)
        return "".join(parts)

    def through(self, marks: Marks, sink: Sink, *, is_mark_sure: bool = False) -> Reading[str]:
        """Takes text up to a mark, and the mark, which is returned; empty: the text ended without one.

        Args:
            is_mark_sure: a beginning of a mark at the end of the text is that of a mark, and no text.
        """
        while True:
            found = marks.find(self._text, self._at)
            if found is not None:
                sink(self._take_to(found.start()))
                return self._take_to(found.end())
            is_text = self._is_ended and not is_mark_sure
            sink(self._take_to(len(self._text) if is_text else marks.beginning(self._text, self._at)))
            if self._is_ended:
                self._at = len(self._text)
                return ""
            yield


def ignore(text: str) -> None:
    """A sink for what nobody wants."""
