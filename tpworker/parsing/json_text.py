"""JSON that comes in pieces, read as far as is needed to know where it ends.

What is not JSON is read for as long as there is any sense in it: nothing here raises.
"""

from __future__ import annotations

import re
from functools import cache

from tpworker.parsing.reader import Reader, Reading, Sink

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR = re.compile(r'[^\s,:"{}\[\]<;]+')
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_REPLACEMENT = "\ufffd"


def raw_value(reader: Reader, sink: Sink, end: str | None) -> Reading[bool]:
    """Takes an object or an array, as it stands; it has not begun yet.

    Args:
        end: the mark that ends what it is part of. It counts wherever it cannot be JSON: outside of strings,
            and in a string behind a control character, which no string may hold. It is not taken.

    Returns:
        Whether it was whole.
    """
    depth = 0
    outside = _stopping(r'"{}\[\]', end)
    while True:
        yield from reader.while_(outside, sink)
        character = yield from reader.peek()
        if not character or (end and character == end[0] and (yield from comes(reader, end))):
            return False
        sink(reader.take())
        if character == '"':
            yield from _raw_string(reader, sink, end)
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if depth <= 0:
                return True


def _raw_string(reader: Reader, sink: Sink, end: str | None) -> Reading[None]:
    """Takes a string and its closing quote, behind the opening one."""
    plain = _PLAIN
    while True:
        yield from reader.while_(plain, sink)
        character = yield from reader.peek()
        if not character:
            return
        if end and character == end[0] and (yield from comes(reader, end)):
            return
        sink(reader.take())
        if character == '"':
            return
        if character == "\\":
            if not (yield from reader.peek()):
                return
            sink(reader.take())
        elif character < " ":  # it is broken: from here on the end counts
            plain = _stopping(r'"\\', end)


@cache
def _stopping(characters: str, end: str | None) -> re.Pattern[str]:
    return re.compile(f"[^{characters}{re.escape(end[0]) if end else ''}]+")


def comes(reader: Reader, mark: str) -> Reading[bool]:
    """Whether this mark comes next. It is not taken."""
    return (yield from reader.accept(mark, is_taken=False))


def string(reader: Reader, sink: Sink) -> Reading[bool]:
    """Takes a string behind its opening quote, and hands on what it says, as it comes.

    Returns:
        Whether it was whole.
    """
    while True:
        yield from reader.while_(_PLAIN, sink)
        character = yield from reader.peek()
        if not character:
            return False
        reader.take()
        if character == '"':
            return True
        if character == "\\":
            yield from _escape(reader, sink)
        else:
            sink(character)


def _escape(reader: Reader, sink: Sink) -> Reading[None]:
    """Takes what is behind a backslash. Halves of surrogate pairs without the other become U+FFFD."""
    first = None
    while True:
        letter = yield from reader.peek()
        if letter != "u":
            break
        reader.take()
        digits = yield from _hex(reader)
        if len(digits) < 4:
            sink(("" if first is None else _REPLACEMENT) + "\\u" + digits)
            return
        code = int(digits, 16)
        if first is not None and 0xDC00 <= code < 0xE000:
            sink(chr(0x10000 + ((first - 0xD800) << 10) + (code - 0xDC00)))
            return
        if first is not None:
            sink(_REPLACEMENT)
        first = code if 0xD800 <= code < 0xDC00 else None
        if first is None:
            sink(_REPLACEMENT if 0xDC00 <= code < 0xE000 else chr(code))
            return
        if not (yield from reader.accept("\\")):
            sink(_REPLACEMENT)
            return
    if first is not None:
        sink(_REPLACEMENT)
    if letter:
        reader.take()
        sink(_ESCAPES.get(letter, "\\" + letter))


def _hex(reader: Reader) -> Reading[str]:
    """Takes four hexadecimal digits, or as many as there are."""
    digits = ""
    while len(digits) < 4 and (yield from reader.peek()) in _HEX_DIGITS:
        digits += reader.take()
    return digits


def scalar(reader: Reader) -> Reading[str]:
    """Takes a number or a word."""
    return (yield from reader.run(_SCALAR))
