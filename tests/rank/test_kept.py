"""What a rank leaves for the next process: whole, or not there. Each writer is a process that is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from tpworker.rank.kept import HostMemory
from tpworker.runtime.keeping import Keeping

SIZE = 3 << 20
LAYOUT = "16 blocks of float32"


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    keeping = Keeping(2)
    yield keeping
    keeping.close()


def killed(fd: int, work: Callable[[int], object]) -> None:
    """Does it to a descriptor in a process that then dies of SIGKILL. A fork has none of a runtime's own."""
    theirs = os.dup(fd)
    pid = os.fork()
    if not pid:
        try:
            work(theirs)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.close(theirs)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def write(fd: int, layout: str = LAYOUT, num_bytes: int = SIZE, finishes: bool = True) -> None:
    memory = HostMemory(fd)
    area = memory.make("kv", layout, num_bytes)
    area[1::4096] = 7
    if finishes:
        memory.finish("kv")
        area[2::4096] = 8  # what comes later stays, too


def test_the_next_process_finds_what_a_killed_one_has_left(keeping: Keeping) -> None:
    assert HostMemory(keeping.fd(0)).find("kv", LAYOUT) is None
    for _ in range(2):
        killed(keeping.fd(0), write)
        area = HostMemory(keeping.fd(0)).find("kv", LAYOUT)
        assert area is not None
        assert area.nbytes == SIZE
        assert set(area[1::4096].tolist()) == {7}
        assert set(area[2::4096].tolist()) == {8}
        assert not area[3::4096].any()


def test_what_was_not_finished_is_not_there_and_takes_no_memory(keeping: Keeping) -> None:
    fd = keeping.fd(1)
    killed(fd, write)
    killed(fd, lambda fd: write(fd, finishes=False))
    assert os.fstat(fd).st_blocks > 8
    assert HostMemory(fd).find("kv", LAYOUT) is None
    assert os.fstat(fd).st_blocks <= 8
    area = HostMemory(fd).make("kv", LAYOUT, SIZE)
    assert os.fstat(fd).st_blocks <= 8, "zeros that nobody has looked at yet take memory"
    assert not area.any()


def test_of_another_layout_nothing_is_found_then_or_later(keeping: Keeping) -> None:
    fd = keeping.fd(0)
    killed(fd, write)
    assert HostMemory(fd).find("kv", "8 blocks of float32") is None
    assert HostMemory(fd).find("kv", LAYOUT) is None


def test_a_file_of_another_size_than_was_finished_is_nothing(keeping: Keeping) -> None:
    fd = keeping.fd(0)
    killed(fd, write)
    os.ftruncate(fd, os.fstat(fd).st_size + 4096)
    assert HostMemory(fd).find("kv", LAYOUT) is None


def test_what_was_found_can_be_made_anew(keeping: Keeping) -> None:
    fd = keeping.fd(0)
    killed(fd, write)
    memory = HostMemory(fd)
    assert memory.find("kv", LAYOUT) is not None
    area = memory.make("kv", LAYOUT, SIZE // 2)
    assert not area.any()
    assert HostMemory(fd).find("kv", LAYOUT) is None
    area = memory.make("kv", LAYOUT, SIZE // 2)
    memory.finish("kv")
    area.fill_(1)
    again = HostMemory(fd).find("kv", LAYOUT)
    assert again is not None
    assert torch.equal(again, area)


def test_ranks_do_not_see_each_others(keeping: Keeping) -> None:
    killed(keeping.fd(0), write)
    assert HostMemory(keeping.fd(1)).find("kv", LAYOUT) is None
    assert HostMemory(keeping.fd(0)).find("kv", LAYOUT) is not None


def test_what_is_forgotten_is_gone(keeping: Keeping) -> None:
    killed(keeping.fd(0), write)
    keeping.forget()
    assert HostMemory(keeping.fd(0)).find("kv", LAYOUT) is None
    assert os.fstat(keeping.fd(0)).st_blocks <= 8


def test_what_is_made_in_inference_mode_can_be_filled_outside(keeping: Keeping) -> None:
    """By threads: the mode is a thread's own."""
    memory = HostMemory(keeping.fd(0))
    with torch.inference_mode():
        areas = [memory.make("kv", LAYOUT, SIZE)]
        memory.finish("kv")
        areas.append(memory.find("kv", LAYOUT))  # type: ignore[arg-type]
    for number, area in enumerate(areas, 1):
        area.fill_(number)
        assert areas[0][0] == areas[1][0] == number


def test_weights_are_not_kept_on_the_cpu(keeping: Keeping) -> None:
    memory = HostMemory(keeping.fd(0))
    assert not memory.keeps("weights")
    assert memory.find("weights", LAYOUT) is None
    with pytest.raises(AssertionError, match="weights"):
        memory.make("weights", LAYOUT, SIZE)


@pytest.mark.usefixtures("nothing_left")
def test_nothing_is_left_of_it() -> None:
    keeping = Keeping(3)
    keeping.forget()
    assert len({keeping.fd(rank) for rank in range(3)}) == 3
    keeping.close()
    keeping.close()
