"""A call that is a JSON object: `{"name": …, "arguments": {…}}`, in whatever order."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto

from tpworker.parsing.json_text import raw_value, scalar, string
from tpworker.parsing.reader import SPACE, Reader, Reading, ignore
from tpworker.parsing.writer import Writer

_ARGUMENTS = ("arguments", "parameters")
_BEFORE_NAME = ("name", "type", "id", *_ARGUMENTS)
"""The keys that a bare object may have before it is known to be a call."""


class Outcome(Enum):
    """What an attempt to read a call came to."""

    NO_CALL = auto()
    """No name could be read. Nothing was told; the reader has recorded what was taken."""
    WHOLE = auto()
    """It was read to its end."""
    BROKEN = auto()
    """It began, and ended where it should not have. The reader has recorded what is no part of it."""
    CUT = auto()
    """The text ended in it."""


class Call:
    """A call while it is read: it begins once its name is known; arguments that came before wait for that."""

    def __init__(self, reader: Reader, writer: Writer) -> None:
        self._reader = reader
        self._writer = writer
        self._name: str | None = None
        self._early: list[str] = []
        self._has_text = False
        self.has_begun = False
        self.has_arguments = False

    @property
    def name(self) -> str | None:
        """None: not known yet."""
        return self._name

    def set_name(self, name: str) -> None:
        """Its name, whole, before it begins."""
        self._name = name

    def begin(self) -> None:
        """Tells it. From here on what is read is no text any more, whatever comes."""
        assert self._name
        self._reader.recorded()
        self._writer.call(self._name)
        self.has_begun = True
        early, self._early = self._early, []
        for text in early:
            self.argue(text)

    def argue(self, text: str) -> None:
        """More of its arguments."""
        if not self.has_begun:
            self._early.append(text)
            return
        self._has_text = self._has_text or bool(text.strip())
        self._writer.arguments(text)

    def end(self) -> None:
        """It was whole: arguments that were left out are none."""
        if not self._has_text:
            self._writer.arguments("{}")


def read_object(
    reader: Reader, writer: Writer, *, end: str | None, known: Collection[str], is_bare: bool = False
) -> Reading[Outcome]:
    """Takes an object, and tells the call that it is. Its `{` comes next; the reader is recording.

    Args:
        end: the mark behind the call, if the format has one. It is not taken.
        known: the names of the functions.
        is_bare: nothing but its keys says that it is a call: a name that is not known needs arguments.
    """
    call = Call(reader, writer)
    reader.take()
    while True:
        if call.has_begun:
            reader.record()
        yield from reader.run(SPACE)
        character = yield from reader.peek()
        if character == "}":
            reader.take()
            return _closed(reader, call)
        if character == ",":
            reader.take()
            continue
        if character != '"':
            return _broken(reader, call)
        reader.take()
        key = yield from _text(reader)
        yield from reader.run(SPACE)
        if key is None or (yield from reader.peek()) != ":":
            return _broken(reader, call)
        reader.take()
        if is_bare and not call.has_begun and key not in _BEFORE_NAME:
            return Outcome.NO_CALL
        yield from reader.run(SPACE)
        if not (yield from _read_member(reader, call, key, end)):
            return _broken(reader, call)
        is_sure = not is_bare or call.name in known or call.has_arguments
        if call.name and not call.has_begun and is_sure:
            call.begin()


def _read_member(reader: Reader, call: Call, key: str, end: str | None) -> Reading[bool]:
    """Takes the value of a key. Returns whether there was one, whole."""
    if key == "name" and call.name is None:
        if (yield from reader.peek()) != '"':
            return False
        reader.take()
        name = yield from _text(reader)
        call.set_name(name or "")
        return bool(name)
    if key in _ARGUMENTS and not call.has_arguments:
        call.has_arguments = True
        if call.name and not call.has_begun:
            call.begin()
        if call.has_begun:
            reader.recorded()
        return (yield from _read_arguments(reader, call, end))
    character = yield from reader.peek()
    if character == '"':
        reader.take()
        return (yield from string(reader, ignore))
    if character and character in "{[":
        return (yield from raw_value(reader, ignore, end))
    return bool((yield from scalar(reader)))


def _read_arguments(reader: Reader, call: Call, end: str | None) -> Reading[bool]:
    """Takes the arguments: as they stand, but those in a string as the string says them."""
    character = yield from reader.peek()
    if character == '"':
        reader.take()
        return (yield from string(reader, call.argue))
    if character and character in "{[":
        return (yield from raw_value(reader, call.argue, end))
    text = yield from scalar(reader)
    if text != "null" and not (reader.is_ended and "null".startswith(text)):
        call.argue(text)
    return True


def _text(reader: Reader) -> Reading[str | None]:
    """Takes a string behind its opening quote; None: it is not whole."""
    parts: list[str] = []
    is_whole = yield from string(reader, parts.append)
    return "".join(parts) if is_whole else None


def _closed(reader: Reader, call: Call) -> Outcome:
    if not call.has_begun:
        return Outcome.NO_CALL
    reader.recorded()
    call.end()
    return Outcome.WHOLE


def _broken(reader: Reader, call: Call) -> Outcome:
    if not call.has_begun:
        return Outcome.NO_CALL
    return Outcome.CUT if reader.is_ended else Outcome.BROKEN
