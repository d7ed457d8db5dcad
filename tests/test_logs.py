"""The formats of the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tpworker.logs import JSON, TEXT, Fields, JsonFormatter, TextFormatter, format_in_use


def record_of(
    message: object, *arguments: object, exc_info: Any = None, **extra: object
) -> logging.LogRecord:
    record = logging.LogRecord("tpworker.x", logging.WARNING, "x.py", 1, message, arguments, exc_info)
    record.created, record.msecs = 1_700_000_000.25, 250.0
    vars(record).update(extra)
    return record


def raised(text: str) -> Any:
    try:
        raise ValueError(text)
    except ValueError as error:
        return type(error), error, error.__traceback__


FORGED = "x\n2026-12-01 04:15:15,123 tpworker ERROR forged\r\x1b[31m\u2028\x85 \ud800"


def test_a_line_of_text_bears_time_process_and_level() -> None:
    line = TextFormatter("tpworker-rank0").format(record_of("it %s", "works"))
    assert line[4:].endswith(",250 tpworker-rank0 WARNING it works")
    assert TextFormatter("x", is_terminal=True).format(record_of("y")).startswith("\r\x1b[2K20")


@pytest.mark.parametrize("way", ["message", "exception"])
def test_nothing_that_is_logged_begins_a_line_of_its_own(way: str) -> None:
    record = record_of(FORGED) if way == "message" else record_of("failed", exc_info=raised(FORGED))
    lines = TextFormatter("tpworker").format(record).splitlines()
    assert len(lines) > 1
    assert all(line.startswith("    ") for line in lines[1:])
    assert all(char.isprintable() for line in lines for char in line)
    assert any(
        line.endswith("2026-12-01 04:15:15,123 tpworker ERROR forged\\r\\x1b[31m\\u2028\\x85 \\ud800")
        for line in lines
    )


def test_json_is_one_line_in_ascii_and_holds_all_of_it() -> None:
    record = record_of(FORGED, exc_info=raised(FORGED), param=FORGED)
    line = JsonFormatter("tpworker-rank0").format(record)
    assert line.isascii()
    assert line.isprintable()
    told = json.loads(line)
    assert told.pop("exception").endswith(f"ValueError: {FORGED}")
    assert told == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "tpworker.x",
        "process": "tpworker-rank0",
        "message": FORGED,
        "param": FORGED,
    }


def test_json_of_what_json_cannot_hold() -> None:
    circle: list[object] = []
    circle.append(circle)
    for value in (float("nan"), circle, {1j: 2}):
        assert json.loads(JsonFormatter("x").format(record_of("m", odd=value)))["odd"] == ascii(value)
    told = json.loads(JsonFormatter("x").format(record_of("m", time="theirs", odd={1, 2}, stack_info="at x")))
    assert told["time"].startswith("2023-"), "what we say of a record counts more"
    assert (told["odd"], told["stack"]) == ("{1, 2}", "at x")


def test_fields_are_words_of_a_line() -> None:
    values = {
        "a": "plain",
        "b": 'with "quotes" and = ',
        "c": True,
        "d": 1.5,
        "e": 3,
        "f": "",
        "g": "new\nline é",
    }
    fields = Fields(["GET", "/a b", None], values)
    assert fields.head == 'GET "/a b" -'
    words = 'a=plain b="with \\"quotes\\" and = " c=true d=1.500000 e=3 f="" g="new\\nline \\u00e9"'
    assert str(fields) == f"{fields.head} {words}"
    told = json.loads(JsonFormatter("x").format(record_of(fields, **values)))
    assert told == told | values, "each is a key"
    assert told["message"] == fields.head, "and is told once"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tpworker")
    before = logger.handlers[:]
    yield logger
    logger.handlers[:] = before


def test_the_format_in_use_is_that_of_the_programs_handlers(logger: logging.Logger) -> None:
    assert format_in_use() == TEXT
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    assert format_in_use() == TEXT
    handler.setFormatter(JsonFormatter("x"))
    assert format_in_use() == JSON
    logger.removeHandler(handler)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        assert format_in_use() == JSON, "what handlers above it write, too"
        logger.propagate = False
        assert format_in_use() == TEXT
    finally:
        logger.propagate = True
        root.removeHandler(handler)
