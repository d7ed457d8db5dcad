"""A JSON file of a model folder, read key by key: what is wrong is named. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

from tpworker.errors import ModelError, shown
from tpworker.json_file import read_object

MAX_SIZE = 1 << 20
"""What an integer may be, unless something else is said: far above any published model's dimensions."""


class Config:
    """A JSON file of a model folder; every getter checks the type and names file and key when it is wrong."""

    def __init__(self, path: Path, *, optional: bool = False) -> None:
        """Read `path`; a missing file is empty if `optional`, else a ModelError."""
        self.path = path
        self.values: dict[str, Any] = {}
        try:
            self.values = read_object(path)
        except FileNotFoundError:
            if not optional:
                raise ModelError(f"{path} is missing: a model folder needs it") from None

    def get(self, key: str) -> Any:
        """The value, None if it is absent or null."""
        return self.values.get(key)

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise a ModelError that names file, key and value."""
        raise ModelError(f"{self.path}: {key}={shown(self.values.get(key))}: {problem}")

    def integer(
        self,
        key: str,
        default: int | None = None,
        minimum: int = 1,
        maximum: int = MAX_SIZE,
        reason: str = "",
        whole_floats: bool = False,
    ) -> int:
        """An integer in these bounds. Raises ModelError, also if it is absent without a default.

        Args:
            reason: what the maximum comes from.
            whole_floats: 50.0 will do for 50.
        """
        value = self.get(key)
        if value is None:
            if default is None:
                self.fail(key, "is required")
            return default
        if not _is_whole(value, whole_floats) or value < minimum:
            self.fail(key, f"must be an integer of at least {minimum} and at most {maximum}")
        if value > maximum:
            self.fail(key, f"must be at most {maximum}" + (f" ({reason})" if reason else ""))
        return int(value)

    def number(self, key: str, default: float | None = None, minimum: float | None = None) -> float:
        """A finite number above 0, or from `minimum` on; `default` if it is absent. Raises ModelError."""
        value = self.get(key)
        if value is None:
            if default is None:
                self.fail(key, "is required")
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self.fail(key, "must be a number")
        if not (value > 0 if minimum is None else value >= minimum) or value > sys.float_info.max:
            limit = "above 0" if minimum is None else f"of at least {minimum:g}"
            self.fail(key, f"must be a finite number {limit}")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many finite numbers above 0. Raises ModelError."""
        values = self.get(key)
        if (
            not isinstance(values, list)
            or len(values) != count
            or not all(type(v) in (int, float) and 0 < v <= sys.float_info.max for v in values)
        ):
            self.fail(key, f"must be a list of {count} finite numbers above 0")
        return tuple(map(float, values))

    def boolean(self, key: str, default: bool) -> bool:
        """True or false. Raises ModelError."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, "must be true or false")
        return value

    def section(self, key: str) -> Config | None:
        """The object at `key` as a Config of its own, None if it is absent or null. Raises ModelError."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, "must be an object")
        return self.part(value)

    def part(self, values: dict[str, Any]) -> Config:
        """Values that come from this file, as a Config of their own."""
        part = object.__new__(Config)
        part.path = self.path
        part.values = values
        return part

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them, of any vocabulary; none if it is absent. Raises ModelError."""
        value = self.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(_is_whole(id_, floats=True) for id_ in ids):
            self.fail(key, "must be a token id or a list of them")
        return tuple(map(int, ids))


def _is_whole(value: object, floats: bool) -> bool:
    """Whether it is an integer, or with `floats` a float without a fraction; true and false are neither."""
    if isinstance(value, float):
        return floats and value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)
