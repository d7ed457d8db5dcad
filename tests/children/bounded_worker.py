"""A bounded process that does what it is told, or what a test does to it."""

from __future__ import annotations

import os
import time
from typing import Any

from tpworker.bounded import child

NAME = "tpworker-worker"  # short enough to be known of a process that is dead, too
_kept: list[bytearray] = []


def prepare(start: Any) -> tuple[Any, child.Work | None]:
    if start == "spin":
        spin()
    if start == "not ready":
        return "because", None
    return "ready", work


def spin() -> None:
    while True:
        pass


def work(request: Any) -> Any:
    verb, value = request
    if verb == "spin":
        spin()
    elif verb == "allocate":
        return len(bytearray(value))
    elif verb == "burn":
        until = time.process_time() + value
        while time.process_time() < until:
            pass
    elif verb == "length":
        return len(value)
    elif verb == "keep":
        _kept.append(bytearray(value))
    elif verb == "signal":
        os.kill(os.getpid(), value)
    elif verb == "raise":
        raise OSError(value)
    elif verb == "exit":
        os._exit(value)
    return [os.getpid(), value]


if __name__ == "__main__":
    child.serve(NAME, prepare)
