"""Threads that keep nobody waiting."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest

from tpworker.runtime.workers import Workers


def test_work_is_done_by_so_many_threads_at_most_and_only_as_many_as_it_takes() -> None:
    workers = Workers(3, "test")
    gate = threading.Barrier(3)
    assert len({workers.submit(threading.current_thread).result(20).name for _ in range(5)}) == 1
    names = [workers.submit(lambda: (gate.wait(20), threading.current_thread().name)[1]) for _ in range(3)]
    assert {name.result(20) for name in names} == {"test_0", "test_1", "test_2"}
    assert workers.submit(int, "ff", base=16).result(20) == 255
    assert len(workers._threads) == 3
    workers.shutdown()


def test_what_work_raises_is_its_callers() -> None:
    workers = Workers(1, "test")
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 // 0).result(20)
    with pytest.raises(SystemExit):
        workers.submit(exit).result(20)
    assert workers.submit(lambda: 1).result(20) == 1
    workers.shutdown()


def blocked(workers: Workers) -> Callable[[], None]:
    """Has a thread of theirs wait until what is returned is called."""
    begun, gate = threading.Event(), threading.Event()
    workers.submit(lambda: (begun.set(), gate.wait(60)))
    assert begun.wait(20)
    return gate.set


def test_who_waits_is_told_when_they_are_abandoned() -> None:
    workers = Workers(1, "test")
    done: list[int] = []
    begun, gate = threading.Event(), threading.Event()
    running = workers.submit(lambda: (begun.set(), gate.wait(60), done.append(1)))
    assert begun.wait(20)
    waiting = workers.submit(lambda: done.append(2))
    workers.abandon(lambda: KeyError("over"))
    workers.abandon(lambda: ValueError("too late"))
    for future in (running, waiting):
        with pytest.raises(KeyError, match="over"):
            future.result(20)
    with pytest.raises(KeyError, match="over"):
        workers.submit(lambda: None)
    gate.set()
    workers._threads[0].join(20)
    assert not workers._threads[0].is_alive()
    assert done == [1], "what had not begun was not done"


def test_what_is_cancelled_before_it_begins_is_not_done() -> None:
    workers = Workers(1, "test")
    release = blocked(workers)
    done: list[int] = []
    future = workers.submit(lambda: done.append(1))
    assert future.cancel()
    release()
    assert workers.submit(lambda: 2).result(20) == 2
    assert not done
    with pytest.raises(CancelledError):
        future.result()
    workers.shutdown()


def test_an_event_loop_waits_for_them() -> None:
    async def main() -> None:
        workers = Workers(2, "test")
        loop = asyncio.get_running_loop()
        results = await asyncio.gather(*(loop.run_in_executor(workers, pow, 2, i) for i in range(20)))
        assert results == [2**i for i in range(20)]
        slow = loop.run_in_executor(workers, time.sleep, 0.2)
        slow.cancel()  # while it runs: nobody is told, and nothing is logged
        await asyncio.sleep(0.4)
        workers.shutdown()

    asyncio.run(main(), debug=True)


def test_an_idle_thread_keeps_nothing_of_its_work() -> None:
    class Text:
        pass

    workers = Workers(1, "test")
    text = Text()
    gone = weakref.ref(text)
    workers.submit(lambda text: None, text).result(20)
    del text
    workers.submit(lambda: None).result(20)  # the thread has come to the next
    gc.collect()
    assert gone() is None
    workers.shutdown()
