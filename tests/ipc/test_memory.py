"""Shared memory: whole words, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.ipc.ranks import DEADLINE, ROOT
from tpworker.ipc.memory import SharedWords


def test_what_one_side_writes_the_other_reads() -> None:
    with closing(SharedWords.create("test", 16, 99)) as here:
        with closing(SharedWords.attach(here.fd, 16, 99, "it")) as there:
            assert list(there.words) == [99] + [0] * 15
            here.words[3] = 2**64 - 1
            there.words[4] = 5
            assert (there.words[3], here.words[4]) == (2**64 - 1, 5)
        os.fstat(here.fd)


def test_other_memory_is_refused() -> None:
    with closing(SharedWords.create("test", 16, 99)) as memory:
        with pytest.raises(ValueError, match="is not a board: 128 bytes instead of 64"):
            SharedWords.attach(memory.fd, 8, 99, "a board")
        with pytest.raises(ValueError, match="is not a board: signature 0x63 instead of 0x62"):
            SharedWords.attach(memory.fd, 16, 98, "a board")


def test_it_cannot_be_cut_short() -> None:
    with closing(SharedWords.create("test", 16, 99)) as memory, pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 8)


def test_it_is_gone_when_closed() -> None:
    memory = SharedWords.create("tpworker-gone", 16, 99)
    assert "memfd:tpworker-gone" in Path("/proc/self/maps").read_text()
    memory.close()
    memory.close()
    assert "memfd:tpworker-gone" not in Path("/proc/self/maps").read_text()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(memory.fd)
    with pytest.raises(ValueError, match="released"):
        memory.words[1]


def test_no_read_is_torn() -> None:
    """Another process stores words whose halves are equal, as fast as it can. (With struct.pack_into instead
    of the store, hundreds of these reads see a zero or unequal halves.)"""
    with closing(SharedWords.create("test", 16, 99)) as memory:
        code = (
            "import sys\n"
            "from tpworker.ipc.memory import SharedWords\n"
            "words = SharedWords.attach(int(sys.argv[1]), 16, 99, 'it').words\n"
            "while True:\n"
            "    for half in 0x00000001, 0xFFFFFFFE, 0x55555555, 0xAAAAAAAA:\n"
            "        words[8] = half << 32 | half\n"
        )
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(memory.fd)], pass_fds=[memory.fd], cwd=ROOT
        )
        try:
            words, seen = memory.words, set()
            while not words[8]:
                assert writer.poll() is None
            for _ in range(1_000_000):
                seen.add(words[8])
        finally:
            writer.kill()
            writer.wait(DEADLINE)
    halves = 0x00000001, 0xFFFFFFFE, 0x55555555, 0xAAAAAAAA
    assert seen <= {half << 32 | half for half in halves}
    assert len(seen) > 1
