"""Snapshots of a group at work, as they follow each other."""

from __future__ import annotations

from typing import Any

from tpworker.observe.snapshot import Gpu, Rank, Request, Scheduler, Snapshot, Whole

GIB = 1 << 30


def gpu(**fields: Any) -> Gpu:
    given = {"uuid": "GPU-a", "name": "NVIDIA H200", "utilization": 99, "memory_used": 130 * GIB,
             "memory_total": 141 * GIB, "temperature": 61, "power": 655.4}  # fmt: skip
    return Gpu(**{**given, **fields})


def snapshot(second: int = 0, num_ranks: int = 2, num_requests: int = 4, on_gpus: bool = False) -> Snapshot:
    """After so many seconds, in each of which there were 100 steps of 8 requests."""
    steps = 100 * second
    return Snapshot(
        version="0.1.0", time=1e9 + second, clock=50.0 + second, age_seconds=192.0 + second,
        model="zai-org/GLM-4.5-Air", device="cuda" if on_gpus else "cpu", dtype="bfloat16", max_num_seqs=64,
        lookahead=2,
        runtime=Whole(pid=4242, state="ready", running=8, waiting=3, finished=1234, aborted=1, restarts=2,
                      cpu_seconds=10 + 0.25 * second, memory_bytes=800 << 20),
        scheduler=Scheduler(
            pid=4243, phase="ready", launched=steps + 2, completed=steps, running=8, waiting=1,
            free_blocks=250, total_blocks=1000, output_tokens=8 * steps,
            prefilled_tokens=50 * second, prompt_tokens=100 * second,
            cached_tokens=40 * second, drafts=400 * second, accepted=300 * second, gaps=90 * second,
            gap_seconds=90 * second * 4e-6, busy_seconds=0.96 * second, publishes=steps,
            publish_seconds=steps * 30e-6, cpu_seconds=0.5 * second, memory_bytes=90 << 20,
        ),
        ranks=tuple(
            Rank(rank=rank, pid=5000 + rank, phase="ready", received=steps + 2, launched=steps + 1,
                 completed=steps, barriers=steps, barrier_seconds=steps * 1e-4 * (rank != 1),
                 last_arrivals=steps * (rank == 1), cpu_seconds=1.0 * second, memory_bytes=2 * GIB,
                 weights_bytes=3 * GIB, gpu=gpu() if on_gpus else None)
            for rank in range(num_ranks)
        ),
        requests=tuple(
            Request(name=f"chatcmpl-{number:032x}", number=number, state="running" if number else "waiting",
                    age_seconds=100.0 - number, prompt_tokens=1000, output_tokens=2 * number)
            for number in range(num_requests)
        ),
    )  # fmt: skip
