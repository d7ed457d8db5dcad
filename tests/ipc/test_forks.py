"""What happens in a fork of a process that has something of ours."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from tpworker.errors import RuntimeStopped
from tpworker.ipc.forks import GUARD, Home, close_in_forks


class Holder:
    def __init__(self) -> None:
        self.num_left = 0

    def leave_to_parent(self) -> None:
        self.num_left += 1
        raise OSError("it was closed")


def in_fork(function: Callable[[], object]) -> str:
    """What it returns in a child."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(sender, repr(function()).encode())
        finally:
            os._exit(0)
    os.close(sender)
    os.waitpid(pid, 0)
    with os.fdopen(receiver) as file:
        return file.read()


def test_holders_leave_once_in_a_child_and_not_again_in_its_own() -> None:
    first, second = Holder(), Holder()
    for holder in (first, second):
        close_in_forks(holder)

    def left() -> tuple[int, int]:
        return first.num_left, second.num_left

    assert in_fork(left) == in_fork(left) == "(1, 1)", "an error of one is nothing to the other"
    assert in_fork(lambda: in_fork(left)) == repr("(1, 1)")
    assert left() == (0, 0)


def test_no_fork_happens_while_somebody_has_what_no_fork_shall_have() -> None:
    held, done = threading.Event(), threading.Event()
    receiver, sender = os.pipe()

    def hold() -> None:
        nonlocal sender
        with GUARD:
            held.set()
            done.wait(20)
            os.close(sender)
            sender = -1

    holding = threading.Thread(target=hold)
    holding.start()
    assert held.wait(20)
    threading.Timer(0.2, done.set).start()
    assert in_fork(lambda: sender) == "-1"
    assert in_fork(lambda: GUARD.acquire(blocking=False)) == "True", "it is free in the child"
    holding.join()
    os.close(receiver)


def test_what_belongs_to_a_process_says_so_in_its_forks() -> None:
    home = Home()
    home.check()

    def said() -> str:
        with pytest.raises(RuntimeStopped) as error:
            home.check()
        Home().check()  # its own
        return str(error.value)

    assert f"this runtime is of process {os.getpid()}, and this is process " in in_fork(said)
