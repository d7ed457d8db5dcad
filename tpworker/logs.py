"""Formats of the log: lines of text, or a JSON object a line. In neither can what is logged begin a line.

Nothing here is installed by importing tpworker: handlers are the program's. The processes that it starts
write to stderr in the format of the handlers that the program has for `tpworker`, and from its level on.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

TEXT = "text"
JSON = "json"
FORMATS = (TEXT, JSON)

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What each record has; the rest was given with `extra`."""
_PLAIN = re.compile(r"[!#-&(-<>-\[\]-~]+")  # ASCII but for blanks, quotes, = and \
_WIPE = "\r\x1b[2K"
_INDENT = "    "
_encode = json.JSONEncoder(default=str, allow_nan=False).encode  # in ASCII: nothing in it can break a line


class Fields:
    """A message that consists of fields: give them as `extra`, too, for those who write JSON.

    Args:
        head: what the line begins with, without names.
        rest: the other fields, written as `name=value`.
    """

    def __init__(self, head: Sequence[object], rest: Mapping[str, object]) -> None:
        self._head = head
        self._rest = rest

    @property
    def head(self) -> str:
        """All that there is of a message, where the other fields are told otherwise."""
        return " ".join(map(_word, self._head))

    def __str__(self) -> str:
        return " ".join([self.head, *(f"{name}={_word(value)}" for name, value in self._rest.items())])


def _word(value: object) -> str:
    """Without spaces, unless it is in quotes; what cannot be printed is escaped."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6f}"
    if not isinstance(value, str):
        return str(value)
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=not value.isprintable())


class TextFormatter(logging.Formatter):
    """One line a record: `2026-12-01 04:15:15,123 tpworker WARNING …`, its time local.

    The lines of a traceback follow, indented, as does whatever else a message has behind its first line. What
    cannot be printed is escaped: a terminal obeys nothing that a client has sent.

    Args:
        process: the name that each line bears.
        is_terminal: where it goes, a progress bar may be drawn by another process: each line wipes it first.
    """

    def __init__(self, process: str, *, is_terminal: bool = False) -> None:
        super().__init__(f"%(asctime)s {process} %(levelname)s %(message)s")
        self._before = _WIPE if is_terminal else ""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not text.isprintable():
            text = f"\n{_INDENT}".join(map(_printable, text.split("\n")))
        return self._before + text


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: `time` (ISO 8601, UTC), `level`, `logger`, `process`, `message`, the
    fields that were given with `extra`, and `exception` with the traceback.

    Args:
        process: the name that each line bears.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told: dict[str, Any] = {
            "time": f"{time[:-6]}Z",  # for +00:00
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.msg.head if isinstance(record.msg, Fields) else record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _OWN and name not in told:
                told[name] = value
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            told["exception"] = record.exc_text
        if record.stack_info:
            told["stack"] = record.stack_info
        return _as_json(told)


def _as_json(told: Mapping[str, Any]) -> str:
    try:
        return _encode(told)
    except (ValueError, TypeError, RecursionError):  # no number of JSON's, a key that is no string, a circle
        return _encode(
            {name: value if isinstance(value, str) else ascii(value) for name, value in told.items()}
        )


def make_formatter(log_format: str, process: str, fd: int) -> logging.Formatter:
    """The formatter of that name, `text` or `json`, for what a process writes to a descriptor."""
    if log_format == JSON:
        return JsonFormatter(process)
    return TextFormatter(process, is_terminal=os.isatty(fd))


def format_in_use() -> str:
    """That of the handlers that get what `tpworker` logs: `json` if one of them has a `JsonFormatter`."""
    logger: logging.Logger | None = logging.getLogger("tpworker")
    while logger is not None:
        if any(isinstance(handler.formatter, JsonFormatter) for handler in logger.handlers):
            return JSON
        logger = logger.parent if logger.propagate else None
    return TEXT
