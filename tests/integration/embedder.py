"""A Python program of its own that embeds a runtime, as a test sees it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
WAIT_S = 120


class Embedder:
    """Runs `code` after `from tpworker import *` and some more; what it prints and logs is kept, by line.

    Args:
        code: of the program.
        arguments: its `sys.argv[1:]`.
        options: of subprocess.Popen.
    """

    def __init__(self, code: str, *arguments: str, **options: Any) -> None:
        program = (
            "import asyncio, gc, logging, os, signal, sys, threading, time\n"
            "from tpworker import *\n"
            "from tpworker.testing.fake_process import FAKE_RANKS, fake_model\n" + textwrap.dedent(code)
        )
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", program, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, **options,
        )  # fmt: skip
        self.lines: list[str] = []
        self._is_over = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, words: str, after: int = 0) -> int:
        """Until a line that holds these words has come, behind the first `after` lines; its number."""

        def found() -> int | None:
            return next((i for i, line in enumerate(self.lines) if i >= after and words in line), None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._is_over, WAIT_S)
            number = found()
        assert number is not None, self.output
        return number

    def wait(self) -> int:
        """Until it has ended, and nobody holds its output any more; its status."""
        status = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert not self._reader.is_alive(), f"somebody has survived it:\n{self.output}"
        return status

    def children(self) -> dict[str, psutil.Process]:
        """Its processes, and theirs, by the names that `ps` shows."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {child.cmdline()[0]: child for child in children}

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
        self.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
