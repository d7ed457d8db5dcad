"""argparse, with what it does not do as we want it."""

from __future__ import annotations

import argparse
import json
from typing import Any, NoReturn

from tpworker.cli.explain import misnamed
from tpworker.errors import shown
from tpworker.version import version


class ShowVersion(argparse.Action):
    """As argparse's own, but the version is looked up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        print(f"tpworker {version()}")
        parser.exit()


class CommandParser(argparse.ArgumentParser):
    """Says where what it finds wrong comes from, if that is not the command line."""

    source = ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Says of what others know by this name what holds here."""
        if action.choices is not None and value not in action.choices:
            flag = next((one for one in action.option_strings if one.startswith("--")), "")
            if (said := misnamed(flag, value, list(action.choices))) is not None:
                raise argparse.ArgumentError(action if flag else None, said)
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        super().error(f"{self.source}{message}")


def integer(text: str) -> int:
    """For `type=`."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be a whole number below 2**63") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"there is no {constant} in JSON")


def json_object(text: str) -> dict[str, Any]:
    """For `type=`."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{shown(text)} must be a JSON object, as {{...}}")
    return value


def number(text: str) -> float:
    """For `type=`."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be a number") from None
