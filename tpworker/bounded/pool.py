"""The parent's side: processes of one kind, each of which does one request at a time for one thread.

    ask ─► a place ─► an idle process, or a new one: start, ready ─► request, answer ─► idle again
                                                                        └─ none: Ended, the next is new

A thread cannot be stopped, and what runs in our own process could hold every other request up, take all
memory, and keep it from ending. child.py is the other side.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from tpworker.bounded.frames import NO_MEMORY_STATUS, pack, receive
from tpworker.ipc.forks import GUARD, Home, close_in_forks
from tpworker.ipc.spawn import child_environment, log_descriptor

logger = logging.getLogger(__name__)

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How many processes there may be, and what each may take."""

    max_processes: int
    """While a request takes its time, others have another way."""
    max_seconds: float
    """Of CPU time, for one request: time in which nobody ran, on a busy machine or a paused one, is free."""
    max_start_seconds: float
    """Of CPU time too, for what comes before the first one; the imports are free."""
    max_memory: int
    """Bytes, beyond those that the process has mapped once it has imported what it needs."""
    max_waits: int = 60
    """Seconds that we were awake, and no answer came: it was stopped, or does not get to run at all."""


class Cause(Enum):
    """Why a process has ended over a request."""

    TIME = "it took more CPU time than it may"
    MEMORY = "it wanted more memory than it may have"
    CRASH = "it crashed, as native code does that runs out of stack or of memory"
    KILLED = "it was ended by somebody else, or by itself"
    SILENCE = "it has not answered for as long as anybody waits"


_CAUSES = {
    -signal.SIGPROF: Cause.TIME,
    NO_MEMORY_STATUS: Cause.MEMORY,
    -signal.SIGSEGV: Cause.CRASH,
    -signal.SIGBUS: Cause.CRASH,
    -signal.SIGABRT: Cause.CRASH,
    -signal.SIGILL: Cause.CRASH,
}
"""By exit status."""


class Ended(Exception):
    """A process has ended over a request.

    Args:
        cause: why.
        how: by which signal, or with which status.

    Attributes:
        is_start: it had been given none: it was over what it starts with.
    """

    def __init__(self, cause: Cause, how: str) -> None:
        super().__init__(f"{how}: {cause.value}")
        self.cause = cause
        self.how = how
        self.is_start = False


class NotReady(Exception):
    """A process has been started and cannot do such work at all.

    Args:
        answer: what it says of what it was given to start with.
        is_news: this is the first that is heard of it; from now on none is started.
    """

    def __init__(self, answer: Any, is_news: bool) -> None:
        super().__init__(str(answer))
        self.answer = answer
        self.is_news = is_news


class Closed(Exception):
    """The pool was closed."""


class Pool:
    """Processes of one kind, for any number of threads. None is started before it is needed.

    Args:
        module: what they run; it calls `child.serve`.
        start: makes what each is given to start with, plain data. It keeps no reference to this pool.
        bounds: of them all, and of each.
    """

    def __init__(self, module: str, start: Callable[[], Any], bounds: Bounds) -> None:
        self._module = module
        self._start = start
        self._bounds = bounds
        self._home = Home()
        self._lock = threading.Lock()
        self._places = threading.Semaphore(bounds.max_processes)
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._refusals: list[Any] = []  # what the first ones said that were not ready
        self._closed = False
        # Whoever drops it instead of closing it leaves nothing behind either.
        self._finalizer = weakref.finalize(self, _end_all, self._idle)

    def ask(self, frame: bytes) -> Any:
        """The answer to a request, see `frames.pack`. Waits for a process that does nothing.

        Raises:
            Ended: there is none. Of what others may have caused, who ended it while it was idle or what
                it had kept of earlier requests, nothing is this request's fault: it is asked of a new one.
            NotReady: such work cannot be done.
            Closed: it was closed.
            RuntimeStopped: this is a fork of its process, which shares none of them.
        """
        self._home.check()
        with self._places:
            return self._answer(frame)

    def check(self) -> None:
        """Starts a process, if none is idle. Raises as `ask`."""
        self._home.check()
        with self._places:
            self._give_back(self._take())

    def close(self) -> None:
        """Ends the processes; whoever waits for one gets `Closed`. May be called more than once."""
        if self._home.lost() is not None:
            return  # they are the parent's
        with self._lock:
            self._closed = True
            for process in self._busy:
                process.kill()
            _end_all(self._idle)

    def _answer(self, frame: bytes) -> Any:
        while True:
            process = self._take()
            try:
                answer = self._ask(process, frame)
            except Ended as error:
                if not process.is_used or error.cause in (Cause.TIME, Cause.SILENCE):
                    raise
                continue  # somebody's doing while it was idle, or what earlier requests have left in it
            process.is_used = True
            self._give_back(process)
            return answer

    def _give_back(self, process: _Process) -> None:
        """It does nothing from now on; unless the pool was closed meanwhile, the next one takes it."""
        with self._lock:
            self._busy.discard(process)
            if not self._closed:
                self._idle.append(process)
                return
        process.end()

    def _take(self) -> _Process:
        """A process that is ready and does nothing."""
        with self._lock:
            if self._closed:
                raise Closed
            if self._refusals:
                raise NotReady(self._refusals[0], is_news=False)
            while self._idle:
                process = self._idle.pop()
                if process.lives:
                    self._busy.add(process)
                    return process
                process.end()
            process = _Process(self._module, self._bounds.max_waits)
            self._busy.add(process)
        try:
            is_ready, answer = self._ask(process, self._first_frame)
        except Ended as error:
            error.is_start = True
            raise
        if not is_ready:
            self._end(process)
            with self._lock:
                self._refusals.append(answer)
            raise NotReady(answer, is_news=len(self._refusals) == 1)
        return process

    def _first_frame(self) -> bytes:
        bounds = self._bounds
        return pack(
            {
                "start": self._start(),
                "max_memory": bounds.max_memory,
                "max_start_seconds": bounds.max_start_seconds,
                "max_seconds": bounds.max_seconds,
            }
        )

    def _ask(self, process: _Process, frame: bytes | Callable[[], bytes]) -> Any:
        """An answer; a process that has none is ended."""
        try:
            return process.ask(frame() if callable(frame) else frame)
        except BaseException as error:
            self._end(process)
            if self._closed:
                raise Closed from None
            logger.info("%s: %s", self._module, error)
            raise

    def _end(self, process: _Process) -> None:
        with self._lock:
            self._busy.discard(process)
        process.end()


class _Process:
    """One process, and the channel to it. It belongs to one thread at a time, but any may kill it."""

    def __init__(self, module: str, max_waits: int) -> None:
        self._max_waits = max_waits
        with GUARD:
            self._start(module)
        self._channel.settimeout(1.0)
        self.is_used = False
        """Whether it has answered a request."""
        close_in_forks(self)

    def _start(self, module: str) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", module],
                    stdin=theirs.fileno(),
                    stdout=log_descriptor(),  # our own standard output may be somebody's data
                    env=child_environment("cpu"),
                    start_new_session=True,  # keys typed in a terminal are for us
                )
            except BaseException:
                self._channel.close()
                raise

    def leave_to_parent(self) -> None:
        """See `forks.Holder`."""
        self._channel.close()
        self._process.returncode = 0  # a process of the parent's

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, frame: bytes) -> Any:
        """The answer to a frame.

        Raises:
            Ended: it ended over it.
        """
        rest = memoryview(frame)
        try:
            while rest:
                rest = rest[self._awake(self._channel.send, rest) :]
        except (BrokenPipeError, ConnectionResetError):
            answer = None
        else:
            answer = receive(self.recv)
        if answer is None:
            raise _why_ended(self._process.wait())
        return answer

    def recv(self, size: int) -> bytes:
        """At most so many bytes; none at the end of the stream."""
        try:
            return self._awake(self._channel.recv, size)
        except ConnectionResetError:
            return b""

    def _awake(self, call: Callable[[V], T], value: V) -> T:
        """What a call on the channel gives. Seconds are counted, so that one in which we slept is one."""
        for _ in range(self._max_waits):
            with contextlib.suppress(TimeoutError):
                return call(value)
        raise Ended(Cause.SILENCE, f"after {self._max_waits} s")

    def kill(self) -> None:
        """Nothing if it is dead already."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Kills and forgets it."""
        self.kill()
        self._channel.close()


def _end_all(processes: list[_Process]) -> None:
    while processes:
        processes.pop().end()


def _why_ended(status: int) -> Ended:
    """What a process's exit status says about the request that it ended over."""
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return Ended(_CAUSES.get(status, Cause.KILLED), how)
