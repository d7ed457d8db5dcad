"""The child's side: serves its parent within its bounds, and is gone with it.

Memory is bounded by RLIMIT_AS, the time of one request by a timer of CPU time, which ends the process
whatever it is in. The parent holds the other end of a socket: when that is closed, this process ends.

    {start, max_memory, max_start_seconds, max_seconds}  ──►  [whether it is ready, its answer to the start]
    a request, a request, …                              ──►  its answer, its answer, …
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import setproctitle

from tpworker.bounded.frames import NO_MEMORY_STATUS, pack, receive

Work: TypeAlias = Callable[[Any], Any]
"""The answer to a request, both plain data."""


def serve(name: str, prepare: Callable[[Any], tuple[Any, Work | None]]) -> NoReturn:
    """Serves the parent until it is gone. What is imported by now counts for neither bound.

    Args:
        name: of the process.
        prepare: of what the parent gives to start with makes an answer and what does the work, or None if
            it cannot be done. What either raises ends the process, a MemoryError as one that wanted too much.
    """
    setproctitle.setproctitle(name)
    # When to stop is for the parent to say. Who made it may have blocked or ignored the timer's signal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    parent = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    threading.Thread(target=_end_with, args=(parent.fileno(),), daemon=True).start()
    try:
        _serve(parent, prepare)
    except MemoryError:
        os._exit(NO_MEMORY_STATUS)
    except _ParentGone:
        pass
    os._exit(0)


class _ParentGone(Exception):
    """Nobody is there to be told anything."""


def _end_with(parent: int) -> None:
    """Ends the process as soon as the other end is closed, whatever it is doing."""
    poll = select.poll()
    poll.register(parent, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


def _serve(parent: socket.socket, prepare: Callable[[Any], tuple[Any, Work | None]]) -> None:
    first = _next(parent)
    _bound_memory(first["max_memory"])
    max_seconds = first["max_seconds"]
    signal.setitimer(signal.ITIMER_PROF, first["max_start_seconds"])
    answer, work = prepare(first.pop("start"))
    signal.setitimer(signal.ITIMER_PROF, 0)
    _tell(parent, pack([work is not None, answer]))
    while work is not None:
        request = _next(parent)
        signal.setitimer(signal.ITIMER_PROF, max_seconds)
        frame = pack(work(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _tell(parent, frame)


def _next(parent: socket.socket) -> Any:
    """What the parent says next."""
    try:
        value = receive(parent.recv)
    except OSError:
        value = None
    if value is None:
        raise _ParentGone
    return value


def _tell(parent: socket.socket, frame: bytes) -> None:
    try:
        parent.sendall(frame)
    except OSError:
        raise _ParentGone from None


def _bound_memory(max_memory: int) -> None:
    """At most so many bytes beyond what the process has mapped by now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + max_memory
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
