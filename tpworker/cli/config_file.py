"""--config FILE: options in YAML, by their names without dashes. What the command line says, counts more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpworker.cli.explain import Flags, explain
from tpworker.errors import ConfigError, one_line, shown

_MAX_BYTES = 1 << 20
_SEVERAL = frozenset(["--served-model-name", "--allowed-origins"])


def words_of(file: str, flags: Mapping[str, Flags]) -> list[str]:
    """What the options in a file are on a command line of `tpworker serve`.

    Args:
        file: its name.
        flags: of each command.

    Raises:
        ConfigError: it cannot be read, is no mapping of options, or has one that does not exist.
    """
    options, written = _read(file)
    unknown = [name for name in options if _flag(name) not in flags["serve"] or name in ("config", "help")]
    if unknown:
        said = [
            f"{name}: it has no place here" if _flag(name) in flags["serve"] else explained(name, flags)
            for name in unknown
        ]
        raise ConfigError(f"{file}: {'; '.join(said)}")
    words: list[str] = []
    for name, value in options.items():
        if value is not None:
            text = written.get(name, str(value))
            words += _words(file, name, value, text, takes_value=flags["serve"][_flag(name)])
    return words


def explained(name: str, flags: Mapping[str, Flags]) -> str:
    """What is said of an option that does not exist."""
    return explain([_flag(name)], ["serve", _flag(name)], flags)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _words(file: str, name: str, value: object, text: str, takes_value: bool) -> list[str]:
    flag = _flag(name)
    if not takes_value:
        if not isinstance(value, bool):
            raise ConfigError(f"{file}: {name}: {shown(value)} must be true or false")
        if flag == "--enable-overlap-schedule" and not value:
            return ["--no-enable-overlap-schedule"]
        return [flag] if value else []
    if isinstance(value, list) and flag in _SEVERAL and value and all(isinstance(one, str) for one in value):
        if begins := [one for one in value if one.startswith("-")]:
            raise ConfigError(f"{file}: {name}: {shown(begins[0])} must not begin with a dash")
        return [flag, *value]
    if isinstance(value, dict) and flag in ("--speculative-config", "--kv-events-config"):
        return [f"{flag}={json.dumps(value, default=str)}"]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        several = ", or a list of strings" if flag in _SEVERAL else ""
        raise ConfigError(f"{file}: {name}: {shown(value)} must be a string or a number{several}")
    return [f"{flag}={text}"]  # which may be no number: YAML reads 0123 as 83, and 1:30 as 90


def _read(file: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping that a file holds, and what is no list as it is written there.

    A key that is there twice is an error, of which YAML takes the last.
    """
    import yaml

    try:
        with Path(file).open("rb") as opened:
            data = opened.read(_MAX_BYTES + 1)  # it may have no end
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"--config {file} is longer than {_MAX_BYTES} bytes")
        node = yaml.compose(data.decode("utf-8-sig"), yaml.SafeLoader)
        options = yaml.safe_load(data)
    except OSError as error:
        raise ConfigError(f"--config {file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--config {shown(file)} is no YAML that can be read: {one_line(str(error), 300)}"
        ) from error
    if options is None:
        return {}, {}
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ConfigError(
            f"--config {file}: it must hold options by their names, as `port: 8000`, one a line"
        )
    names = [_flag(key.value) for key, _ in node.value]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--config {file}: {twice[0].removeprefix('--')} is there twice: leave out one")
    written = {key.value: value.value for key, value in node.value if isinstance(value, yaml.ScalarNode)}
    return options, written
