"""What happens at a start: from a configuration to what is served.

find ──► FoundModel ──► set_up ──► Setup ──► (Runtime starts the Processes) ──► until_ready ──► Served
files, maybe a download        no process yet; the same for each generation      processes and tokenizer
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError, InvalidRequest, ModelError
from tpworker.observe.affinity import near_cpus
from tpworker.runtime.admission import Limits
from tpworker.runtime.faults import Fault
from tpworker.runtime.group import Group
from tpworker.runtime.loading import (
    FoundModel,
    Progress,
    find_model,
    has_tokenizer,
    in_daemon_thread,
    load_tokenizer_of,
)
from tpworker.runtime.processes import Processes
from tpworker.runtime.settings import rank_settings, resolve_max_model_len, scheduler_settings
from tpworker.runtime.tokenisers import SHORT_CHARS

if TYPE_CHECKING:
    from tpworker.observe.nvml import Gpu
    from tpworker.text.tokenizer import Tokenizer

RANK_MODULE = "tpworker.rank"
SCHEDULER_MODULE = "tpworker.scheduler"


@dataclass(frozen=True, slots=True)
class Setup:
    """What is to be served, and by which processes; known before one of them is started."""

    model: FoundModel
    group: Group  # of the first generation


@dataclass(frozen=True, slots=True)
class Served:
    """What is served, since processes and tokenizer are ready."""

    model: FoundModel  # as its tokenizer ends its outputs, too
    tokenizer: Tokenizer | None
    limits: Limits
    max_num_seqs: int
    total_blocks: int  # that requests can have

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer, for what cannot be done without.

        Raises:
            InvalidRequest: the model's folder has none.
        """
        if self.tokenizer is None:
            raise InvalidRequest(
                f"there is no tokenizer in {self.model.folder}: give token ids, and detokenize=False",
                "prompt",
            )
        return self.tokenizer

    def check_length(self, text: str) -> None:
        """Refuses a long text before it is tokenised. Takes its time: not for the event loop.

        Raises:
            PromptTooLong: its characters alone prove that it does not fit.
            InvalidRequest: there is no tokenizer.
        """
        if len(text) > SHORT_CHARS:
            num_tokens = self.needed_tokenizer().at_least(text, self.limits.shortest)
            self.limits.check_length(num_tokens, len(text))


async def find(config: RuntimeConfig, progress: Progress, rank_module: str) -> FoundModel:
    """Finds the model, in a thread that nobody has to wait for. Raises as `find_model`.

    Args:
        progress: called on this event loop.
        rank_module: what the ranks run: others than ours read what they read.
    """
    loop = asyncio.get_running_loop()

    def tell(text: str, fraction: float | None) -> None:
        loop.call_soon_threadsafe(progress, text, fraction)

    is_ours = rank_module == RANK_MODULE
    return await in_daemon_thread(lambda: find_model(config, tell, check_weights=is_ours))


def set_up(
    config: RuntimeConfig,
    model: FoundModel,
    gpus: Sequence[Gpu],
    *,
    needs_tokenizer: bool,
    rank_module: str,
    scheduler_module: str,
) -> Setup:
    """What a configuration comes to with this model on these GPUs, or without any on the CPU.

    Raises:
        ModelError: there is no tokenizer, and one is needed.
        ConfigError: the model was not made for this.
    """
    if needs_tokenizer and not has_tokenizer(model.folder):
        raise ModelError(f"there is no tokenizer in {model.folder}, and text needs one: fetch tokenizer.json")
    max_model_len = resolve_max_model_len(config, model.spec)
    device = "cuda" if gpus else "cpu"
    group = Group(
        generation=0,
        num_ranks=config.tensor_parallel_size,
        model=str(model.folder),
        scheduler=scheduler_settings(config, model.spec, device, max_model_len),
        rank=rank_settings(config, model.spec, device, max_model_len),
        # Ranks that join keep to what their launcher gave them, and say themselves which GPU that is.
        rank_cpus=() if config.join_address else near_cpus(gpus),
        gpus=() if config.join_address else tuple(gpu.uuid for gpu in gpus),
        join_address=config.join_address,
        rank_module=rank_module,
        scheduler_module=scheduler_module,
    )
    return Setup(model, group)


async def until_ready(setup: Setup, processes: Processes, progress: Progress) -> Served:
    """Loads the tokenizer while the processes get ready, and waits for both.

    Raises:
        ModelError: the tokenizer cannot be read, or ends outputs by too many tokens.
        ConfigError: the chat template that takes the place of its own is broken.
        StartFailed: the processes did not get ready.
    """
    model, rank = setup.model, setup.group.rank
    ready = asyncio.ensure_future(processes.ready(progress))
    loading = in_daemon_thread(lambda: load_tokenizer_of(model))
    try:
        both: list[asyncio.Future[Any]] = [ready, loading]
        await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
        # Of two errors the tokenizer's is the plainer one.
        tokenizer = await loading if loading.done() else None
        if tokenizer is not None:
            model = model.with_tokenizer(tokenizer)
        total_blocks = await ready - 1  # the null block is nobody's
    finally:
        ready.cancel()
        loading.cancel()
    limits = Limits(rank.max_model_len, model.spec.max_model_len, total_blocks * rank.block_size)
    return Served(model, tokenizer, limits, rank.max_num_seqs, total_blocks)


def start_error(fault: Fault) -> Exception:
    """What a process said of the model or the configuration is for the user; the rest is a failure."""
    failure = fault.failure()
    for kind in (ModelError, ConfigError):
        if fault.report is not None and fault.report.error == kind.__name__:
            error = kind(fault.report.summary)
            error.__cause__ = failure
            return error
    return failure
