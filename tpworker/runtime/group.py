"""What a generation of processes is, before it is started."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from tpworker.ipc.board import About
from tpworker.ipc.child import RankSettings, SchedulerSettings


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
    """By rank the UUID of its GPU; none on the CPU. For the status board."""

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
