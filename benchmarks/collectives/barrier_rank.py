"""One rank of the barrier benchmark. It imports torch only if gloo is to be measured."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tpworker.ipc.barrier import Barrier

LATE = 0.005  # seconds; others have long fallen asleep
TIMEOUT = 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a rank is told."""

    fd: int
    num_ranks: int
    rank: int
    kinds: tuple[str, ...]
    rounds: int
    steps: int
    late_steps: int
    pin: bool
    spin: float | None
    store: str  # a file for gloo's ranks to find each other

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def ours(job: Job) -> Callable[[], None]:
    """A function that waits at our barrier."""
    barrier = Barrier.attach(job.fd, job.num_ranks, spin=job.spin)
    wait, rank, step = barrier.wait, job.rank, -1

    def meet() -> None:
        nonlocal step
        step += 1
        wait(rank, step, 0x5EED5EED, TIMEOUT)

    return meet


def gloo(job: Job) -> Callable[[], None]:
    """A function that waits at torch.distributed's gloo barrier, over the loopback interface."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{job.store}", rank=job.rank, world_size=job.num_ranks
    )
    barrier: Callable[[], None] = torch.distributed.barrier
    return barrier


def phase(meet: Callable[[], None], steps: int, late: Callable[[int], bool]) -> dict[str, Any]:
    """Times of coming to and leaving `steps` barriers in ns, and the CPU time used."""
    came, left = [0] * steps, [0] * steps
    clock = time.monotonic_ns  # one clock for all processes of the machine
    meet()
    cpu = time.process_time_ns()
    for step in range(steps):
        if late(step):
            time.sleep(LATE)
        came[step] = clock()
        meet()
        left[step] = clock()
    return {"came": came, "left": left, "cpu": time.process_time_ns() - cpu}


def main() -> None:
    """Measures as told, prints one JSON object."""
    job = Job(**json.loads(sys.argv[1]))
    meets = {kind: {"ours": ours, "gloo": gloo}[kind](job) for kind in job.kinds}
    if job.pin:  # this thread only, and not before the barrier has seen how many cores there are
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[job.rank % len(cores)]})
    notes: dict[str, dict[str, list[Any]]] = {kind: {"back": [], "late": []} for kind in job.kinds}
    gc.freeze()
    gc.disable()
    for _ in range(job.rounds):
        for kind, meet in meets.items():
            notes[kind]["back"].append(phase(meet, job.steps, lambda step: False))
            notes[kind]["late"].append(
                phase(meet, job.late_steps, lambda step: step % job.num_ranks == job.rank)
            )
    for meet in meets.values():
        meet()
    print(json.dumps(notes))


if __name__ == "__main__":
    main()
