"""Whatever becomes of what a stream is connected to: writing does not raise, and does not wait for long."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

WRITE = """
import sys
from tpworker.ipc.streams import *
make_output_safe()
print("grüße\\udcff", file=sys.stderr)
print("line\\n" * 40_000, file=sys.stderr)
sys.stderr.write("x" * 100_000)
sys.stderr.flush()
print("out")
open(sys.argv[1], "w").write("survived")
leave(7)
"""


def run(program: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program, *arguments], **options)


def test_what_is_written_comes_out_whole_at_the_pace_of_its_reader(tmp_path: Path) -> None:
    process = run(WRITE, str(tmp_path / "end"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert out == b"out\n"
    assert err == "grüße\\udcff\n".encode() + b"line\n" * 40_000 + b"\n" + b"x" * 100_000


@pytest.mark.parametrize("kind", ["full", "reader gone", "reader stalled", "full and never waiting"])
def test_what_does_not_get_through_is_lost_and_nothing_else(tmp_path: Path, kind: str) -> None:
    receiver, sender = os.pipe()
    try:
        if kind == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), sender)
        elif kind == "reader gone":
            os.close(receiver)
            receiver = os.open(os.devnull, os.O_RDONLY)
        else:
            os.write(sender, bytes(fcntl.fcntl(sender, fcntl.F_SETPIPE_SZ, 4096)))
            os.set_blocking(sender, kind == "reader stalled")
        process = run(WRITE, str(tmp_path / "end"), stdout=sender, stderr=sender)
        assert process.wait(60) == 7
        assert (tmp_path / "end").read_text() == "survived"
    finally:
        os.close(sender)
        os.close(receiver)


def test_a_reader_that_goes_on_gets_what_comes_then(tmp_path: Path) -> None:
    program = """
import sys
from tpworker.ipc.streams import *
make_stderr_safe()
for i in range(3):
    print("lost", file=sys.stderr)
print("full", flush=True)
sys.stdin.readline()
print("there", file=sys.stderr)
"""
    receiver, sender = os.pipe()
    size = fcntl.fcntl(sender, fcntl.F_SETPIPE_SZ, 4096)
    os.write(sender, bytes(size))
    process = run(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sender)
    os.close(sender)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"full\n"
    with open(receiver, "rb") as reader:
        assert reader.read(size) == bytes(size)
        process.stdin.write(b"\n")
        process.stdin.close()
        assert reader.read() == b"there\n"
    assert process.wait(60) == 0
    process.stdout.close()


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_descriptors_that_are_closed_are_taken_by_nothing_else(
    tmp_path: Path, closed: tuple[int, ...]
) -> None:
    program = """
import os, sys
from tpworker.ipc.streams import *
make_stderr_safe()
memory = os.memfd_create("ours")
print("to nobody", file=sys.stderr)
print("to nobody", flush=True)
sys.stdout.isatty()
os.write(2, b"to nobody")
links = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
open(sys.argv[1], "w").write("\\n".join([str(memory), str(os.fstat(memory).st_size), *links]))
os.execv("/bin/sh", ["sh", "-c", "cd /proc/self/fd && test -e 0 && test -e 1 && test -e 2 && exit 7"])
"""
    file = tmp_path / "seen"
    process = run(
        program, str(file), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: [os.close(fd) for fd in closed],
    )  # fmt: skip
    assert process.wait(60) == 7
    memory, size, *links = file.read_text().split()
    assert int(memory) > 2
    assert size == "0"
    assert links == ["/dev/null"] * 3


def test_a_process_leaves_though_its_threads_do_not() -> None:
    program = """
import threading, logging
from tpworker.ipc.streams import *
make_stderr_safe()
threading.Thread(target=threading.Event().wait).start()
logging.basicConfig()
logging.warning("goodbye")
leave(3)
"""
    process = run(program, stderr=subprocess.PIPE)
    watch = threading.Timer(60, process.kill)
    watch.start()
    assert process.communicate()[1] == b"WARNING:root:goodbye\n"
    watch.cancel()
    assert process.returncode == 3
