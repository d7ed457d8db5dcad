"""What processes have used, as the kernel says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tpworker.observe.processes import Usage, usage_of


def test_processor_time_is_that_of_the_program_and_of_the_kernel_for_it(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    values = ["S", *["0"] * 10, "300", "200", *["0"] * 10]
    (tmp_path / "7" / "stat").write_text(f"7 (a) b) {' '.join(values)}\n")
    (tmp_path / "7" / "statm").write_text("9 2 1 1 0 1 0\n")
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    assert usage_of(7, proc=tmp_path) == (500 / ticks, 2 * page)


def test_what_a_process_uses() -> None:
    # A name that reads as the end of what is before the values.
    code = (
        "import ctypes\n"
        "ctypes.CDLL(None).prctl(15, b'a) R 1 (b', 0, 0, 0)\n"
        "held = bytearray(b'x') * (64 << 20)\n"
        "print(flush=True)\n"
        "input()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    before = time.process_time()
    mine, theirs = usage_of(os.getpid()), usage_of(process.pid)
    assert mine.cpu_seconds is not None
    assert before - 1 < mine.cpu_seconds <= time.process_time() + 0.1
    assert theirs.memory_bytes is not None
    assert 64 << 20 <= theirs.memory_bytes < 256 << 20
    process.communicate(b"\n")
    assert usage_of(process.pid) == Usage()
