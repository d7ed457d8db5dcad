"""Takes a snapshot: of a status board, and of what the machine knows of its processes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

from tpworker.ipc.board import About, Board, Field, Phase, Row, Span, SpanTimes
from tpworker.observe import nvml
from tpworker.observe.processes import usage_of
from tpworker.observe.snapshot import Gpu, Process, Rank, Request, Scheduler, Snapshot, Whole
from tpworker.outputs import RUNTIME_STATES
from tpworker.version import version

P = TypeVar("P", bound=Process)


def look(board: Board) -> Snapshot:
    """What a board says. Costs some microseconds a process."""
    scheduler, *ranks = board.rows()
    snapshot = without_processes(board.about, _whole(board))
    return dataclasses.replace(
        snapshot,
        age_seconds=snapshot.clock - board.about.created_ns / 1e9,
        generation=board.about.generation,
        scheduler=_scheduler(scheduler, ranks),
        ranks=tuple(_rank(number, row) for number, row in enumerate(ranks)),
        requests=tuple(
            Request(
                name=one.name,
                number=one.number,
                state="running" if one.is_running else "waiting",
                age_seconds=max(0.0, snapshot.clock - one.arrived_ns / 1e9),
                prompt_tokens=one.num_prompt,
                output_tokens=one.num_output,
            )
            for one in board.listing.read()
        ),
    )


def without_processes(about: About, runtime: Whole) -> Snapshot:
    """Of a runtime that has none at this moment; `about` is what a board would tell."""
    return Snapshot(
        version=version(),
        time=time.time(),
        clock=time.monotonic(),
        model=model_name(about.model),
        device=about.device,
        dtype=about.dtype,
        max_num_seqs=about.max_num_seqs,
        max_model_len=about.max_model_len,
        block_size=about.block_size,
        lookahead=about.lookahead,
        num_drafts=about.num_drafts,
        runtime=runtime,
    )


def model_name(folder: str) -> str:
    """What to call a model by its folder: of one in the hub's cache the hub's name."""
    parts = folder.rstrip("/").split("/")
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")
    return parts[-1]


def _whole(board: Board) -> Whole:
    row, state = board.owner, board.owner[Field.STATE]
    return Whole(
        pid=board.about.pid,
        state=("starting", *RUNTIME_STATES)[state] if state <= len(RUNTIME_STATES) else "",
        running=row[Field.RUNNING],
        waiting=row[Field.WAITING],
        output_tokens=row[Field.OUTPUT_TOKENS],
        finished=row[Field.FINISHED],
        aborted=row[Field.ABORTED],
        restarts=row[Field.RESTARTS],
        resumed=row[Field.RESUMED],
    )


def _scheduler(row: Row, ranks: Sequence[Row]) -> Scheduler:
    published = ranks[0].times(Span.PUBLISH) if ranks else SpanTimes(0, ())
    composed = row.times(Span.COMPOSE)
    return Scheduler(
        pid=row[Field.PID],
        phase=_phase(row),
        launched=row[Field.LAUNCHED],
        completed=row[Field.COMPLETED],
        running=row[Field.RUNNING],
        waiting=row[Field.WAITING],
        free_blocks=row[Field.FREE_BLOCKS],
        total_blocks=row[Field.TOTAL_BLOCKS],
        prompt_tokens=row[Field.PROMPT_TOKENS],
        cached_tokens=row[Field.CACHED_TOKENS],
        prefilled_tokens=row[Field.PREFILLED_TOKENS],
        output_tokens=row[Field.OUTPUT_TOKENS],
        preemptions=row[Field.PREEMPTIONS],
        drafts=row[Field.DRAFTS],
        accepted=row[Field.ACCEPTED],
        gaps=row[Field.NUM_GAPS],
        gap_seconds=row[Field.GAPS] / 1e9,
        busy_seconds=row[Field.BUSY] / 1e9,
        publishes=sum(published.counts),
        publish_seconds=published.total_ns / 1e9,
        publish_buckets=published.counts,
        compose_seconds=composed.total_ns / 1e9,
        compose_buckets=composed.counts,
    )


def _rank(number: int, row: Row) -> Rank:
    barrier, total = row.times(Span.BARRIER), row[Field.PROGRESS_TOTAL]
    return Rank(
        rank=number,
        pid=row[Field.PID],
        phase=_phase(row),
        progress=min(1.0, row[Field.PROGRESS_DONE] / total) if total else None,
        received=row[Field.RECEIVED],
        admitted=row[Field.ADMITTED],
        launched=row[Field.LAUNCHED],
        completed=row[Field.COMPLETED],
        barriers=sum(barrier.counts),
        barrier_seconds=barrier.total_ns / 1e9,
        barrier_buckets=barrier.counts,
        last_arrivals=row[Field.LAST_ARRIVALS],
        weights_bytes=row[Field.WEIGHTS],
    )


def _phase(row: Row) -> str:
    number = row[Field.PHASE]
    return Phase(number).name.lower().replace("_", " ") if number < len(Phase) else ""


# ------------------------------------------------------------------------ what the machine knows


def with_usage(snapshot: Snapshot, gpus: Mapping[int, Gpu], pid: int | None = None) -> Snapshot:
    """The same, with what each process has used, and how the ranks' GPUs do. Takes milliseconds.

    Args:
        snapshot: of a board on this machine.
        gpus: by rank.
        pid: of the runtime's process as this one sees it, if that is not what it takes itself for.
    """
    return dataclasses.replace(
        snapshot,
        runtime=_used(snapshot.runtime, "", pid),
        scheduler=_used(snapshot.scheduler, "tpworker-scheduler"),
        ranks=tuple(
            dataclasses.replace(_used(rank, f"tpworker-rank{rank.rank}"), gpu=gpus.get(rank.rank))
            for rank in snapshot.ranks
        ),
    )


def _used(process: P, name: str, pid: int | None = None) -> P:
    usage = usage_of(pid or process.pid, name)
    return dataclasses.replace(
        process, pid=pid or process.pid, cpu_seconds=usage.cpu_seconds, memory_bytes=usage.memory_bytes
    )


def known_gpus(driver: nvml.Nvml, uuids: Sequence[str]) -> dict[int, nvml.Gpu]:
    """The ranks' GPUs, by rank; those that the driver does not know here are left out."""
    return {rank: driver.gpu(uuid, rank) for rank, uuid in enumerate(uuids) if uuid in driver.handles}


def read_gpus(driver: nvml.Nvml, gpus: Mapping[int, nvml.Gpu]) -> dict[int, Gpu]:
    """How they do now."""
    return {rank: gpu_of(gpu, driver.read(gpu.uuid)) for rank, gpu in gpus.items()}


def gpu_of(gpu: nvml.Gpu, reading: nvml.Reading) -> Gpu:
    """A GPU, and how it does."""
    return Gpu(
        uuid=gpu.uuid,
        name=gpu.name,
        utilization=reading.utilization,
        memory_used=reading.memory_used,
        memory_total=gpu.memory or None,
        temperature=reading.temperature,
        power=reading.power,
    )
