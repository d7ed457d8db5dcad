"""What a generation of processes is, before it is started."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from tpworker.ipc.board import About
from tpworker.ipc.child import (
    RANK_NAME,
    SCHEDULER_NAME,
    RankBoot,
    RankSettings,
    SchedulerBoot,
    SchedulerSettings,
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """What is to be started: one scheduler and `num_ranks` ranks.

    The modules are run with `python -m`; others than the default are for tests and benchmarks.
    """

    generation: int
    num_ranks: int
    model: str  # an absolute path
    scheduler: SchedulerSettings
    rank: RankSettings
    scheduler_module: str = "tpworker.scheduler"
    rank_module: str = "tpworker.rank"
    trace_fd: int | None = None
    """Where processes tell what they do (ipc/trace.py); None: nowhere."""
    rank_cpus: Sequence[AbstractSet[int] | None] = ()
    """By rank the CPUs that its process keeps to; None, and ranks beyond the end: the ones it inherits."""
    weights_fd: int | None = None
    """Safetensors in place of those of the model's folder; None: there are none. Stays the owner's."""
    weights_number: int = 0
    """Of the weights: others have another one, though they come from the same folder."""
    gpus: Sequence[str] = ()
    """By rank the UUID of its GPU; none on the CPU, and of ranks that join. For the status board."""
    join_address: str | None = None
    """Where ranks join that are started from outside; None: they are started here."""

    @property
    def about(self) -> About:
        """What its status board tells of it."""
        return About(
            generation=self.generation,
            model=self.model,
            device=self.rank.device,
            gpus=tuple(self.gpus),
            dtype=self.rank.dtype,
            max_num_seqs=self.scheduler.max_num_seqs,
            max_model_len=self.scheduler.max_model_len,
            block_size=self.scheduler.block_size,
            lookahead=self.scheduler.lookahead,
            num_drafts=self.scheduler.num_drafts,
        )


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What the processes of one generation have in common: where they meet, and what they share."""

    group: Group
    runtime_address: str
    plan_addresses: tuple[str, ...]
    result_address: str
    board_fd: int
    masks_fd: int
    barrier_fd: int
    meeting_fd: int
    store_fd: int
    blocks_fd: int
    keeper_address: str
    log_level: int
    log_format: str
    rank_gpus: tuple[str, ...]
    """Of ranks that have joined; see `RankBoot.gpus`."""

    def scheduler_boot(self) -> SchedulerBoot:
        """What the scheduler is told."""
        group = self.group
        return SchedulerBoot(
            generation=group.generation,
            name=SCHEDULER_NAME,
            log_level=self.log_level,
            report_fd=0,
            num_ranks=group.num_ranks,
            runtime_address=self.runtime_address,
            plan_addresses=self.plan_addresses,
            result_address=self.result_address,
            board_fd=self.board_fd,
            masks_fd=self.masks_fd,
            settings=group.scheduler,
            blocks_fd=self.blocks_fd,
            log_format=self.log_format,
            trace_fd=group.trace_fd,
        )

    def rank_boot(self, rank: int, kept_fd: int, num_sharing: int) -> RankBoot:
        """What a rank is told."""
        group = self.group
        return RankBoot(
            generation=group.generation,
            name=RANK_NAME.format(rank),
            log_level=self.log_level,
            report_fd=0,
            rank=rank,
            num_ranks=group.num_ranks,
            plan_address=self.plan_addresses[rank],
            result_address=self.result_address,
            barrier_fd=self.barrier_fd,
            board_fd=self.board_fd,
            meeting_fd=self.meeting_fd,
            masks_fd=self.masks_fd,
            store_fd=self.store_fd,
            model=group.model,
            settings=group.rank,
            kept_fd=kept_fd,
            keeper_address=self.keeper_address,
            log_format=self.log_format,
            trace_fd=group.trace_fd,
            weights_fd=group.weights_fd,
            weights_number=group.weights_number,
            num_sharing=num_sharing,
            gpus=self.rank_gpus,
        )
