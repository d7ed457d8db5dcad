"""Numbers in JSON schemas that llguidance does not hold outputs to exactly: it knows integers as floats.

It says nothing of it, and outputs would not be of the schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpworker.errors import shown
from tpworker.grammar.schemas import parts

MOST = 1 << 53
"""Up to here each integer is a float."""
_LOWER = ("minimum", "exclusiveMinimum")
_UPPER = ("maximum", "exclusiveMaximum")
_LARGEST = (1 << 63) - 1
_HOW = f"integers beyond ±{MOST} (2^53) cannot be held to exactly: give a smaller one, or a string"


def inexact(schema: Any) -> str:
    """What outputs of a schema would not be held to exactly, and where; empty: nothing.

    Bounds may be beyond where rounding makes them no wider, as those of 64-bit integers.
    """
    todo = [("#", schema)]
    while todo:
        pointer, one = todo.pop()
        if not isinstance(one, dict):
            continue
        for key in (*_LOWER, *_UPPER):
            if _widens(key, one.get(key)):
                return f"{key}={shown(one[key])}: {_HOW}, at {pointer}"
        for key in ("const", "enum"):
            if any(abs(number) > MOST for number in _integers(one.get(key))):
                return f"{key}={shown(one[key])}: {_HOW}, at {pointer}"
        todo += [(pointer + below, part) for below, part in parts(one)]
    return ""


def _widens(key: str, bound: Any) -> bool:
    """Whether more is within a bound as llguidance rounds it than within the bound as it is."""
    if not isinstance(bound, (int, float)) or isinstance(bound, bool) or abs(bound) <= MOST:
        return False
    try:
        rounded = min(int(float(bound)), _LARGEST)
    except OverflowError:
        return True
    return rounded < bound if key in _LOWER else rounded > bound


def _integers(value: Any) -> Iterator[int]:
    """All within a value."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list):
            todo += one
        elif isinstance(one, int):
            yield one
