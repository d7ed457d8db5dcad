"""What has a file's name and is none, and the line with which a model's folder is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tpworker.errors import ModelError

NO_FILES: list[tuple[Callable[[Path], None], str]] = [
    (lambda path: path.mkdir(), "is a folder, not a file"),
    (lambda path: path.symlink_to("/nonexistent/x"), "is a link to /nonexistent/x, which is missing"),
    (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
    (os.mkfifo, "is a device or a pipe, not a file"),
    (lambda path: path.symlink_to("/dev/zero"), "is a device or a pipe, not a file"),
]
"""What makes it at a path where there is nothing, and what is said of it."""


def refused(read: Callable[[Path], object], folder: Path) -> str:
    """The line with which `read` refuses a folder."""
    with pytest.raises(ModelError) as caught:
        read(folder)
    line = str(caught.value)
    assert line.isprintable(), "more than a line"
    assert len(line) < 500 + len(str(folder)), line
    return line
