"""What the command line says of the log."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest

from tests.cli.test_cli import parse
from tpworker import ConfigError, cli
from tpworker.cli import serve
from tpworker.cli.log_options import LogOptions, logging_to_stderr, say


def test_what_is_logged_unless_something_else_is_asked_for(tmp_path: Path) -> None:
    assert parse().log == LogOptions("info", "text", requests=True, prompts=0)
    assert parse("--ask", "x").log.level == "warning", "an answer, and what went wrong"
    told = parse("--log-level", "DEBUG", "--log-format", "json", "--log-prompts").log
    assert told == LogOptions("debug", "json", requests=True, prompts=1000)
    assert parse("--log-prompts", "7").log.prompts == 7
    assert not parse("--no-log-requests").log.requests
    file = tmp_path / "serve.yaml"
    file.write_text("log-prompts: 5\nlog-level: warning\n")
    assert parse("--config", str(file)).log == LogOptions("warning", "text", requests=True, prompts=5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--no-log-requests --log-prompts", "--log-prompts has no effect with --no-log-requests"),
        ("--no-log-requests --log-level error", "--no-log-requests has no effect with --log-level error"),
        ("--log-prompts --log-level error", "--log-prompts has no effect with --log-level error"),
        ("--ask x --log-prompts 5", "--log-prompts has no effect with --ask"),
        ("--ask x --no-log-requests", "--no-log-requests has no effect with --ask"),
        ("--log-prompts 0", "--log-prompts 0: must be from 1 to 10000"),
        ("--log-prompts 10001", "--log-prompts 10001: must be from 1 to 10000"),
    ],
)
def test_what_is_out_of_range_or_has_no_effect(arguments: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(*arguments.split())


@pytest.mark.parametrize("arguments", ["--log-level loud", "--log-format xml", "--log-prompts many"])
def test_words_that_are_none(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments.split())
    assert f"argument {arguments.split()[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_levels(capfd: pytest.CaptureFixture[str], level: str) -> None:
    names = [f"{name}-{number}" for name in ("tpworker.x", "library") for number in (10, 20, 30, 40)]
    with logging_to_stderr(LogOptions(level, "text", requests=True, prompts=0)):
        for name in names:
            logger, _, number = name.partition("-")
            logging.getLogger(logger).log(int(number), name)
    least = getattr(logging, level.upper())
    written = capfd.readouterr().err
    told = {"tpworker.x": least, "library": max(least, logging.WARNING)}
    for name in names:
        logger, _, number = name.partition("-")
        assert (f" {name}\n" in written) == (int(number) >= told[logger])


def test_requests_are_not_logged_if_nobody_wants_them_and_all_is_as_before_afterwards(
    capfd: pytest.CaptureFixture[str],
) -> None:
    requests = logging.getLogger("tpworker.requests")
    before = [logging.getLogger(name).level for name in ("", "tpworker")], logging.getLogger().handlers[:]
    with logging_to_stderr(LogOptions("debug", "text", requests=False, prompts=0)):
        assert not requests.isEnabledFor(logging.CRITICAL)
        assert logging.getLogger("tpworker.access").isEnabledFor(logging.DEBUG)
    assert requests.level == logging.NOTSET
    after = [logging.getLogger(name).level for name in ("", "tpworker")], logging.getLogger().handlers[:]
    assert after == before


def test_a_bug_and_a_warning_of_pythons_are_lines_of_json_too(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(options: cli.Options) -> int:
        warnings.warn("of a library", stacklevel=1)
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(serve, "serve", broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings._showwarning_orig)  # type: ignore[attr-defined]
        warnings.simplefilter("always")
        assert cli.main(["serve", "--log-format", "json"]) == 1
    warning, bug = map(json.loads, capfd.readouterr().err.splitlines())
    assert (warning["level"], warning["logger"]) == ("warning", "py.warnings")
    assert "UserWarning: of a library" in warning["message"]
    assert (bug["level"], bug["message"]) == ("critical", "this is a bug")
    assert bug["exception"].endswith("ZeroDivisionError: of ours")
    with pytest.raises(ZeroDivisionError):
        cli.main(["serve"])


def test_what_is_said_is_a_line_of_the_log_where_that_is_json(capfd: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr(LogOptions("info", "text", requests=True, prompts=0)):
        logging.getLogger("tpworker.x").info("first")
        say("second", logging.WARNING, label="warning: ")
    first, second = capfd.readouterr().err.splitlines()
    assert first.endswith("tpworker INFO first")
    assert second == "tpworker: warning: second"
    with logging_to_stderr(LogOptions("info", "json", requests=True, prompts=0)):
        say("second", logging.WARNING, label="warning: ")
    told = json.loads(capfd.readouterr().err)
    assert (told["level"], told["logger"], told["message"]) == ("warning", "tpworker.cli", "second")
