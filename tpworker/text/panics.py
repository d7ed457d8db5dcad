"""Panics of the tokenizers library, which is written in Rust: they are no Exception in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tpworker.errors import one_line

_LONGEST = 300  # characters of what it says


@contextmanager
def panics_are(error: Callable[[str], Exception]) -> Iterator[None]:
    """What the library has not thought of is raised as an error of ours.

    Args:
        error: makes it, of what the library says, in one line.
    """
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":
            raise
        raise error(one_line(str(panic), _LONGEST)) from None
