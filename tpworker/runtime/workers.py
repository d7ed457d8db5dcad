"""A few threads that work for an event loop and keep nobody waiting: neither the process' end nor a stop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, InvalidStateError
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Workers(Executor):
    """An executor for `loop.run_in_executor`, whose threads are made when they are needed.

    concurrent.futures' own has the interpreter wait, when it ends, for whatever its threads are at. These are
    daemon threads, and `abandon` answers at once whoever waits for them, also for work that has begun.

    Args:
        num_threads: at most.
        name: of the threads, with a number.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._unsettled: set[Future[Any]] = set()
        self._threads: list[threading.Thread] = []
        self._num_idle = threading.Semaphore(0)
        self._error: Callable[[], Exception] | None = None  # once it is abandoned

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queues work. A future that is cancelled before its work has begun keeps it from being done.

        Raises:
            Exception: what `abandon` was told.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._error is not None:
                raise self._error()
            self._unsettled.add(future)
            future.add_done_callback(self._unsettled.discard)
            self._work.put((future, lambda: work(*args, **kwargs)))
            if not self._num_idle.acquire(blocking=False) and len(self._threads) < self._num_threads:
                name = f"{self._name}_{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
        return future

    def abandon(self, error: Callable[[], Exception]) -> None:
        """Whoever waits for work, begun or not, gets this error now; threads end with what they are at. No
        more is taken. The first time counts."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            unsettled = list(self._unsettled)
            for _ in self._threads:
                self._work.put(None)
        for future in unsettled:
            with suppress(InvalidStateError):  # it has been settled just now
                future.set_exception(error())

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:
        """Executor's way to say `abandon`; it does not wait, and all is cancelled, whatever is asked for."""
        self.abandon(lambda: RuntimeError("the executor was shut down"))

    def _run(self) -> None:
        while (item := self._next()) is not None:
            with suppress(InvalidStateError):  # cancelled or abandoned meanwhile
                _do(*item)
            del item  # and with it what the work was about, while this thread sleeps

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        try:
            return self._work.get_nowait()
        except queue.Empty:
            self._num_idle.release()
            return self._work.get()


def _do(future: Future[Any], work: Callable[[], Any]) -> None:
    if future.done():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
