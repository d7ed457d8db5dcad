"""Processes bounded in CPU time and memory: replaced when they go beyond, gone with whoever made them."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.children.bounded_worker import NAME
from tests.conftest import eventually, is_gone
from tpworker.bounded.frames import pack
from tpworker.bounded.pool import Bounds, Cause, Closed, Ended, NotReady, Pool

pytestmark = pytest.mark.usefixtures("nothing_left")

ROOT = Path(__file__).parents[2]
MODULE = "tests.children.bounded_worker"
BOUNDS: dict[str, Any] = {
    "max_processes": 2, "max_seconds": 0.3, "max_start_seconds": 0.3, "max_memory": 256 << 20
}  # fmt: skip
Make = Callable[..., Pool]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Pool] = []

    def maker(start: Any = None, **bounds: Any) -> Pool:
        made.append(Pool(MODULE, lambda: start, Bounds(**{**BOUNDS, **bounds})))
        return made[-1]

    yield maker
    for one in made:
        one.close()


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == NAME]


def ask(pool: Pool, verb: str, value: Any = None) -> Any:
    return pool.ask(pack([verb, value]))


class Asking:
    """A thread that asks, and what became of it."""

    def __init__(self, pool: Pool, verb: str, value: Any = None) -> None:
        self.answer: Any = None
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._ask, args=(pool, verb, value))
        self.thread.start()

    def _ask(self, pool: Pool, verb: str, value: Any) -> None:
        try:
            self.answer = ask(pool, verb, value)
        except Exception as error:
            self.error = error


def eventually_one_works() -> None:
    eventually(lambda: any(process.cpu_times().user > 0.3 for process in processes()))


# ------------------------------------------------------------------------------- what it does


def test_none_is_started_before_it_is_needed_and_one_does_for_many(make: Make) -> None:
    pool = make()
    assert not processes()
    pids = {ask(pool, "echo", {"a": [1, "\ud83d", None]})[0] for _ in range(5)}
    assert pids == {process.pid for process in processes()}
    assert len(pids) == 1
    assert ask(pool, "echo", "x" * 3_000_000)[1] == "x" * 3_000_000  # more than a socket holds


def test_check_starts_one_that_serves_then(make: Make) -> None:
    pool = make()
    pool.check()
    (process,) = processes()
    pool.check()
    assert ask(pool, "echo")[0] == process.pid


def test_threads_share_as_many_as_there_may_be(make: Make) -> None:
    pool = make()
    asking = [Asking(pool, "echo", number) for number in range(12)]
    for one in asking:
        one.thread.join()
    assert [one.answer[1] for one in asking] == list(range(12))
    assert 1 <= len({one.answer[0] for one in asking}) <= 2
    assert len(processes()) <= 2


def test_what_cannot_be_done_is_asked_of_one_process_only() -> None:
    starts: list[str] = []
    pool = Pool(MODULE, lambda: (starts.append("not ready"), "not ready")[1], Bounds(**BOUNDS))
    for is_news in (True, False, False):
        with pytest.raises(NotReady) as caught:
            ask(pool, "echo")
        assert (caught.value.answer, caught.value.is_news) == ("because", is_news)
        assert not processes()
    assert len(starts) == 1


def test_what_start_raises_is_raised_and_leaves_no_process() -> None:
    pool = Pool(MODULE, lambda: 1 // 0, Bounds(**BOUNDS))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            ask(pool, "echo")
        assert not processes()


# ------------------------------------------------------------------------------- its bounds


@pytest.mark.parametrize(
    ("verb", "value", "cause", "how"),
    [
        ("spin", None, Cause.TIME, "by SIGPROF"),
        ("allocate", 400 << 20, Cause.MEMORY, "with status 3"),
        ("signal", signal.SIGSEGV, Cause.CRASH, "by SIGSEGV"),
        ("signal", signal.SIGABRT, Cause.CRASH, "by SIGABRT"),
        ("signal", signal.SIGKILL, Cause.KILLED, "by SIGKILL"),
        ("exit", 7, Cause.KILLED, "with status 7"),
        ("raise", "a fault of ours", Cause.KILLED, "with status 1"),
    ],
)
def test_what_goes_beyond_ends_alone(make: Make, verb: str, value: Any, cause: Cause, how: str) -> None:
    pool = make(max_processes=1)
    for _ in range(2):
        pid = ask(pool, "echo")[0]
        with pytest.raises(Ended) as caught:
            ask(pool, verb, value)
        assert (caught.value.cause, caught.value.how, caught.value.is_start) == (cause, how, False)
        assert not processes()
        assert ask(pool, "echo")[0] != pid


def test_each_request_has_time_of_its_own(make: Make) -> None:
    pool = make(max_seconds=1.0)
    for _ in range(30):
        assert ask(pool, "allocate", 128 << 20) == 128 << 20  # 0.05 s of CPU time
    assert len(processes()) == 1


def test_to_be_told_of_a_request_is_no_part_of_the_one_before(make: Make) -> None:
    pool = make(max_processes=1, max_seconds=0.5)
    long = [0] * 10_000_000  # takes more CPU time to read than is left of the first request's
    pid = ask(pool, "burn", 0.42)[0]
    assert ask(pool, "length", long) == len(long)
    assert ask(pool, "echo")[0] == pid


def test_the_start_has_a_bound_of_its_own(make: Make) -> None:
    with pytest.raises(Ended) as caught:
        ask(make("spin", max_seconds=60.0), "echo")
    assert (caught.value.cause, caught.value.is_start) == (Cause.TIME, True)


def test_who_does_not_answer_is_not_waited_for_for_ever(make: Make) -> None:
    pool = make(max_waits=1)
    ask(pool, "echo")
    processes()[0].suspend()
    with pytest.raises(Ended) as caught:
        ask(pool, "echo")
    assert caught.value.cause is Cause.SILENCE
    assert not processes()


def test_what_others_have_left_in_a_process_is_no_fault_of_who_comes_next(make: Make) -> None:
    pool = make()
    before = ask(pool, "keep", 150 << 20)[0]
    assert ask(pool, "allocate", 150 << 20) == 150 << 20  # did not fit beside it
    assert ask(pool, "echo")[0] != before


def test_one_that_was_killed_while_it_did_nothing_is_replaced(make: Make) -> None:
    pool = make()
    for _ in range(5):
        before = ask(pool, "echo")[0]
        os.kill(before, signal.SIGKILL)  # it need not be gone yet
        assert ask(pool, "echo")[0] != before


def test_while_one_takes_its_time_others_are_answered(make: Make) -> None:
    pool = make(max_seconds=600.0)
    asking = Asking(pool, "spin")
    eventually_one_works()
    assert [ask(pool, "echo", number)[1] for number in range(3)] == [0, 1, 2]
    assert asking.thread.is_alive()
    pool.close()
    asking.thread.join(20)  # much less than the process may take, or be silent
    assert isinstance(asking.error, Closed)


# ------------------------------------------------------------------------------- its end


def test_closed_it_takes_no_more(make: Make) -> None:
    pool = make()
    ask(pool, "echo")
    for _ in range(2):
        pool.close()
        assert not processes()
        with pytest.raises(Closed):
            ask(pool, "echo")
        with pytest.raises(Closed):
            pool.check()


@pytest.mark.parametrize("use", [Pool.check, lambda pool: ask(pool, "echo")], ids=["check", "ask"])
def test_closed_over_one_that_has_done_its_work_it_keeps_none(
    make: Make, monkeypatch: pytest.MonkeyPatch, use: Callable[[Pool], Any]
) -> None:
    pool, give_back = make(), Pool._give_back

    def late(self: Pool, process: Any) -> None:
        self.close()
        give_back(self, process)
        assert process._channel.fileno() == -1

    monkeypatch.setattr(Pool, "_give_back", late)
    use(pool)
    assert not pool._idle
    assert not processes()


def test_who_drops_it_leaves_nothing_behind() -> None:
    pool = Pool(MODULE, lambda: None, Bounds(**BOUNDS))
    ask(pool, "echo")
    (process,) = processes()
    process.suspend()  # so that it cannot end by itself as the socket is closed
    del pool
    gc.collect()
    assert not processes()  # nor a zombie; what else is left behind is looked for after the test


@pytest.mark.parametrize("verb", ["echo", "spin"])
def test_it_ends_with_its_parent_whatever_it_does(verb: str) -> None:
    program = (
        "import sys, threading\n"
        "from tpworker.bounded.frames import pack\nfrom tpworker.bounded.pool import Bounds, Pool\n"
        f"pool = Pool({MODULE!r}, lambda: None, Bounds(**{ ({**BOUNDS, 'max_seconds': 600.0})!r}))\n"
        "print(pool.ask(pack(['echo', None]))[0], flush=True)\n"
        f"pool.ask(pack([{verb!r}, None]))\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if verb == "spin":
            eventually(lambda: is_gone(pid) or psutil.Process(pid).cpu_times().user > 0.3)
        assert not is_gone(pid)
        parent.kill()
    eventually(lambda: is_gone(pid))


def test_it_is_out_of_reach_of_signals_to_all(make: Make) -> None:
    pool = make()
    pid = ask(pool, "echo")[0]
    assert os.getsid(pid) != os.getsid(0)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    assert ask(pool, "echo")[0] == pid


def test_it_does_not_write_to_our_standard_output() -> None:
    program = (
        "from tpworker.bounded.frames import pack\nfrom tpworker.bounded.pool import Bounds, Pool\n"
        f"pool = Pool('tests.children.bounded_worker', lambda: None, Bounds(**{BOUNDS!r}))\n"
        "import os; pid = pool.ask(pack(['echo', None]))[0]\n"
        "print(os.readlink(f'/proc/{pid}/fd/1') == os.readlink(f'/proc/{pid}/fd/2'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr


def test_what_became_of_one_is_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tpworker.bounded")
    with pytest.raises(Ended):
        ask(make(), "spin")
    assert f"{MODULE}: by SIGPROF: it took more CPU time than it may" in caplog.text
