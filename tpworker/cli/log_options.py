"""What the command line says of the log, and the log itself."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tpworker.cli.arguments import integer
from tpworker.cli.log_writer import LogWriter
from tpworker.errors import ConfigError
from tpworker.logs import FORMATS, JSON, TEXT, format_in_use, make_formatter

LEVELS = ("debug", "info", "warning", "error")
PROMPT_CHARS = 1000
"""Of a prompt in the log, if --log-prompts does not say how many."""
MAX_PROMPT_CHARS = 10_000
"""Token ids have to become text for it, on the event loop."""

logger = logging.getLogger("tpworker.cli")


@dataclass(frozen=True)
class LogOptions:
    """What is logged, and how."""

    level: str
    """One of LEVELS."""
    log_format: str
    requests: bool
    """Whether each request has a line."""
    prompts: int
    """Characters of a request's first prompt in its line; 0: none."""


def add_log_options(group: Any) -> None:
    """Adds the options to one of argparse's groups."""
    group.add_argument(
        "--log-level",
        type=str.lower,
        choices=LEVELS,
        help="from which level on things are logged: debug, with probes and pages; info, with a line for "
        "each request; warning, with requests that failed; error (default: info, with --ask warning)",
    )
    group.add_argument(
        "--log-format",
        choices=FORMATS,
        help="text, or json: one object a line, of all processes (default: text)",
    )
    group.add_argument(
        "--no-log-requests",
        dest="log_requests",
        action="store_false",
        help="no line for each request; what goes wrong with the server itself is logged",
    )
    group.add_argument(
        "--log-prompts",
        nargs="?",
        const=PROMPT_CHARS,
        type=integer,
        metavar="CHARS",
        help="with each request the begin of its first prompt, up to so many characters, "
        f"{PROMPT_CHARS} without a number (default: none: what people ask is not for the log)",
    )


def log_options_in(given: dict[str, Any], serves: bool) -> LogOptions:
    """Takes what argparse found of them.

    Args:
        given: by argparse's names; those that are taken are taken out.
        serves: whether there will be requests.

    Raises:
        ConfigError: out of range, or without effect beside the others.
    """
    level = given.pop("log_level", "info" if serves else "warning")
    requests = given.pop("log_requests", None)
    prompts = given.pop("log_prompts", None)
    for flag, value in (("--no-log-requests", requests), ("--log-prompts", prompts)):
        if value is not None and not serves:
            raise ConfigError(f"{flag} has no effect with --ask, which serves nobody: leave it out")
        if value is not None and level == "error":
            raise ConfigError(f"{flag} has no effect with --log-level error, which tells of no request")
    if prompts is not None and requests is False:
        raise ConfigError("--log-prompts has no effect with --no-log-requests: leave out one")
    if prompts is not None and not 1 <= prompts <= MAX_PROMPT_CHARS:
        raise ConfigError(f"--log-prompts {prompts}: must be from 1 to {MAX_PROMPT_CHARS} characters")
    return LogOptions(level, given.pop("log_format", TEXT), requests is not False, prompts or 0)


@contextmanager
def logging_to_stderr(options: LogOptions) -> Generator[None, None, None]:
    """Meanwhile what is logged is written to stderr, by a thread of its own.

    Libraries that we use tell their warnings, whatever the level, unless that is higher.
    """
    level = getattr(logging, options.level.upper())
    levels: Mapping[str, int] = {
        "": max(level, logging.WARNING),
        "tpworker": level,
        "tpworker.requests": logging.NOTSET if options.requests else logging.CRITICAL + 1,
    }
    before = {name: logging.getLogger(name).level for name in levels}
    logging.captureWarnings(True)  # of Python's own kind: records, too
    handler = LogWriter(2)
    handler.setFormatter(make_formatter(options.log_format, "tpworker", 2))
    logging.getLogger().addHandler(handler)
    for name, its_level in levels.items():
        logging.getLogger(name).setLevel(its_level)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for name, its_level in before.items():
            logging.getLogger(name).setLevel(its_level)
        logging.getLogger().removeHandler(handler)
        handler.close()


def say(text: str, level: int = logging.INFO, label: str = "") -> None:
    """Tells whoever has started the command something, on stderr: where the log is JSON, as a line of it.

    Args:
        level: that it has there.
        label: where it is text, what stands before it.
    """
    if format_in_use() == JSON:
        logger.log(level, "%s", text)
        return
    for handler in logging.getLogger().handlers:
        handler.flush()  # what was logged before, comes before
    print(f"tpworker: {label}{text}", file=sys.stderr, flush=True)
