"""What a configuration comes to on this machine, with this model: every default filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.ipc.child import RankSettings, SchedulerSettings
from tpworker.ipc.messages import MAX_SEQUENCE

if TYPE_CHECKING:
    from tpworker.model.families import ModelSpec


def resolve_max_model_len(config: RuntimeConfig, spec: ModelSpec) -> int:
    """Most tokens of one request, prompt and output together.

    Raises:
        ConfigError: more than the model was made for.
    """
    if config.max_model_len is None:
        return min(spec.max_model_len, MAX_SEQUENCE)
    if config.max_model_len > spec.max_model_len:
        raise ConfigError(
            f"max_model_len={config.max_model_len}: the model was made for at most {spec.max_model_len} "
            "tokens; use that or less, or leave --max-model-len out"
        )
    return config.max_model_len


def scheduler_settings(config: RuntimeConfig, max_model_len: int) -> SchedulerSettings:
    """What the scheduler is told of the configuration."""
    return SchedulerSettings(
        lookahead=config.lookahead,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=config.block_size,
        prefix_caching=config.prefix_caching,
        step_timeout=float(config.step_timeout),
        start_timeout=float(config.start_timeout),
    )


def rank_settings(config: RuntimeConfig, spec: ModelSpec, device: str, max_model_len: int) -> RankSettings:
    """What a rank is told of the configuration."""
    return RankSettings(
        lookahead=config.lookahead,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=config.block_size,
        num_kv_blocks=config.num_kv_blocks or 0,
        gpu_memory_utilization=float(config.gpu_memory_utilization),
        device=device,
        dtype=spec.dtype if config.dtype == "auto" else config.dtype,
        load_format=config.load_format,
        seed=config.seed,
        check_ranks_agree=config.check_ranks_agree,
        step_timeout=float(config.step_timeout),
        start_timeout=float(config.start_timeout),
    )
