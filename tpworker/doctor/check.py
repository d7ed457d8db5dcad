"""One line of what `tpworker doctor` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what is there, and what to do about it."""

    subject: str
    state: State
    """`missing`: the group would not start. `warning`: it would, and be slower, or stop working some day."""
    found: str
    remedy: str | None = None
    """None: there is nothing to do, or `found` says it."""


def ok(subject: str, found: str) -> Check:
    """Nothing to do."""
    return Check(subject, "ok", found)


def warning(subject: str, found: str, remedy: str | None) -> Check:
    """It works, but not as well as it could."""
    return Check(subject, "warning", found, remedy)


def missing(subject: str, found: str, remedy: str | None) -> Check:
    """It does not work."""
    return Check(subject, "missing", found, remedy)
