"""What a fork of this process, by whoever embeds us, must not break.

A forked child has a copy of every descriptor, lock and object of ours, and none of our threads. So

    no fork happens while descriptors are open here that only a process of ours shall have (GUARD): EOF of its
    pipe must mean that it is gone, and not a fork besides;
    what is ours while a runtime lives is closed in the child (`close_in_forks`), which keeps no gigabytes of
    KV cache then, and can end or signal no process of its parent's;
    an object of ours that is used in the child says so (`Home`), where it would wait for ever.

What a child starts of its own has nothing to do with any of it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import Protocol

from tpworker.errors import RuntimeStopped

GUARD = threading.RLock()
"""Held while descriptors are open in this process that none of its forks shall have."""


class Holder(Protocol):
    """Who has descriptors, or processes, that are its own process' alone."""

    def leave_to_parent(self) -> None:
        """Called in a forked child: closes its copies of the descriptors, and forgets the processes. Takes no
        lock, which a thread of the parent's may have held."""


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()


def close_in_forks(holder: Holder) -> None:
    """From now on forked children have `leave_to_parent` called, while somebody else keeps `holder`."""
    _holders.add(holder)


def _in_child() -> None:
    GUARD.release()
    holders = list(_holders)
    _holders.clear()  # what was closed is not closed again by a child of the child
    for holder in holders:
        with contextlib.suppress(OSError):
            holder.leave_to_parent()


os.register_at_fork(before=GUARD.acquire, after_in_parent=GUARD.release, after_in_child=_in_child)


class Home:
    """The process that something belongs to: the one that makes this."""

    __slots__ = ("_pid",)

    def __init__(self) -> None:
        self._pid = os.getpid()

    def lost(self) -> RuntimeStopped | None:
        """What to say to who is in a fork of that process; None: this is it."""
        pid = os.getpid()
        if pid == self._pid:
            return None
        return RuntimeStopped(
            f"this runtime is of process {self._pid}, and this is process {pid}, a fork of it, with none of "
            "its threads and processes: start a runtime here, after the fork, or ask the one there (by HTTP)"
        )

    def check(self) -> None:
        """Raises RuntimeStopped in a fork of that process."""
        lost = self.lost()
        if lost is not None:
            raise lost
