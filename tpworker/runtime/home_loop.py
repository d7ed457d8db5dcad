"""The event loop that a runtime works on: on any other, and in a fork, whoever waits would wait for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from tpworker.errors import RuntimeStopped
from tpworker.ipc.forks import Home


class HomeLoop:
    """The event loop of a runtime, from its start until nothing is left of it there."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = Home()

    def enter(self) -> None:
        """From now on it is the running one, of this process."""
        self._process = Home()
        self._loop = asyncio.get_running_loop()

    def leave(self) -> None:
        """Nothing is left that belongs to it: any will do."""
        self._loop = None

    @property
    def is_closed(self) -> bool:
        return self._loop is not None and self._loop.is_closed()

    def lost(self) -> RuntimeStopped | None:
        """What to say to who is in a fork of its process; None: they are not, or nothing is left of it."""
        return None if self._loop is None else self._process.lost()

    def check_process(self) -> None:
        """Raises RuntimeStopped in a fork of its process."""
        if (lost := self.lost()) is not None:
            raise lost

    def check(self) -> None:
        """Raises RuntimeStopped where every wait would be for ever: on another event loop than this."""
        stray = self.astray()
        if stray is not None:
            raise stray

    def astray(self) -> RuntimeStopped | None:
        """What to say to who is not on this event loop; None: they are, or there is none."""
        if self._loop is asyncio._get_running_loop():
            return None  # nor is this a fork: in one no loop of its parent's is running
        if (lost := self.lost()) is not None:
            return lost
        if self._loop is None:
            return None
        if self._loop.is_closed():
            return RuntimeStopped(
                "the event loop that this runtime was started on has been closed, as asyncio.run does in the "
                "end, and the runtime is of no use without it: start and use one within one asyncio.run, or "
                "take SyncRuntime"
            )
        return RuntimeStopped(
            "this runtime was started on another event loop: use it there (run_coroutine_threadsafe), or "
            "start one for each loop, or take SyncRuntime, which any thread may call"
        )

    def call(self, function: Callable[[], None]) -> None:
        """Calls a function on this event loop: at once if that is where we are, or there is none. Nothing is
        called in a fork: there it is for the parent."""
        if self.lost() is not None:
            return
        if self._loop is None or self.astray() is None:
            function()
            return
        with suppress(RuntimeError):  # it has been closed: there is nothing left to tell
            self._loop.call_soon_threadsafe(function)
