"""Sleeping on a word of memory. Nothing here sleeps for long unless it is broken."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.ipc.ranks import DEADLINE
from tpworker.ipc import futex
from tpworker.ipc.memory import WORD, SharedWords

LONG = 3600.0


@pytest.fixture
def memory() -> Iterator[SharedWords]:
    words = SharedWords.create("test", 16, 1)
    yield words
    words.close()


def test_a_sleeper_is_woken_by_a_waker_of_its_word(memory: SharedWords) -> None:
    value = 0xFFFFFFFE
    memory.words[8] = 7 << 32 | value
    sleep = futex.sleeper(memory.address + 8 * WORD, LONG)
    threads = [threading.Thread(target=sleep, args=(value, LONG), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert futex.waker(memory.address + 9 * WORD)() == 0
    wake, woken = futex.waker(memory.address + 8 * WORD), 0
    end = time.monotonic() + DEADLINE
    while woken < 3:
        assert time.monotonic() < end
        woken += wake()
        time.sleep(0.001)
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert wake() == 0


def test_who_looks_at_an_old_value_does_not_sleep(memory: SharedWords) -> None:
    memory.words[8] = 1
    futex.sleeper(memory.address + 8 * WORD, LONG)(0, LONG)


def test_the_upper_half_does_not_matter(memory: SharedWords) -> None:
    memory.words[8] = 123 << 32
    sleep = futex.sleeper(memory.address + 8 * WORD, 0.001)
    sleep(0, LONG)  # until `longest`


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9, 0.001])
def test_a_sleep_ends_by_itself(memory: SharedWords, seconds: float) -> None:
    futex.sleeper(memory.address, LONG)(1, seconds)


def test_a_signal_ends_a_sleep(memory: SharedWords) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        sleep = futex.sleeper(memory.address, LONG)
        while not heard:
            sleep(1, LONG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_bad_address_is_an_error() -> None:
    with pytest.raises(OSError, match="futex: Bad address"):
        futex.sleeper(8, LONG)(0, LONG)


def test_an_unknown_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    with pytest.raises(OSError, match="pdp11 is not known"):
        futex.waker(8)
