"""A rank process for the barrier's tests, `python -m tests.ipc.ranks JSON`, and what starts it.

It meets the others at every step, after random delays, and prints one JSON object: when it came to each
step, when it left, and how it ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpworker.ipc.barrier import Barrier, BarrierError

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0  # seconds; only a broken test gets there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
    """What one process is to do."""

    fd: int
    num_ranks: int
    rank: int
    first_step: int = 0
    steps: int = 0
    seed: int = 0  # of the delays
    delays: bool = True
    diverge_at: int | None = None
    timeout: float = DEADLINE
    spin: float | None = None
    endless: bool = False


@contextmanager
def started(ranks: list[Rank]) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts the processes; none of them outlives the block."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ipc.ranks", json.dumps(dataclasses.asdict(rank))],
            cwd=ROOT,
            pass_fds=[rank.fd],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What the process printed, when it has ended."""
    output, _ = process.communicate(timeout=DEADLINE)
    printed: dict[str, Any] = json.loads(output)
    return printed


def delay(chance: random.Random) -> None:
    """Mostly none; often a moment; sometimes long enough for the others to fall asleep."""
    kind = chance.random()
    if kind < 0.2:
        os.sched_yield()
    elif kind < 0.3:
        time.sleep(chance.random() * 300e-6)
    elif kind < 0.305:
        time.sleep(0.006)


def main() -> None:
    """The process."""
    job = Rank(**json.loads(sys.argv[1]))
    chance = random.Random(f"{job.seed} {job.rank}")
    barrier = Barrier.attach(job.fd, job.num_ranks, spin=job.spin)
    came: list[int] = []
    left: list[int] = []
    end: dict[str, Any] = {}
    step = job.first_step
    used = resource.getrusage(resource.RUSAGE_SELF)
    try:
        while job.endless or len(left) < job.steps:
            if job.delays:
                delay(chance)
            digest = zlib.crc32(b"%d" % step)
            if step == job.diverge_at:
                digest ^= 1 << 17
            if not job.endless or not came:
                came.append(time.monotonic_ns())
            barrier.wait(job.rank, step, digest, job.timeout)
            if not job.endless:
                left.append(time.monotonic_ns())
            step += 1
    except BarrierError as error:
        end = {"error": type(error).__name__, "message": str(error)}
        end |= {name: value for name, value in vars(error).items() if not name.startswith("_")}
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    print(json.dumps({"came": came, "left": left, "passed": step - job.first_step, "cpu": cpu, **end}))


if __name__ == "__main__":
    main()
