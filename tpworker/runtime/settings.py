"""What a configuration comes to on this machine, with this model: every default filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.ipc.child import RankSettings, SchedulerSettings
from tpworker.ipc.messages import MAX_SEQUENCE

if TYPE_CHECKING:
    from tpworker.model.families import ModelSpec


@dataclass(frozen=True, slots=True)
class StepSizes:
    """What a step holds at most."""

    max_num_seqs: int
    max_num_batched_tokens: int

    @classmethod
    def of(cls, config: RuntimeConfig, device: str) -> StepSizes:
        """As configured, or what suits the device ('cpu' or 'cuda'); what is asked for moves the other one.

        On an H200, 64 slots and 512 tokens lose to these with 256 clients, and with prompts of thousands of
        tokens (docs/benchmarks.md). A CPU is as fast in small steps as in large ones, and answers sooner.
        """
        slots, tokens = (256, 2048) if device == "cuda" else (64, 512)
        if config.max_num_seqs is not None:
            slots, tokens = config.max_num_seqs, max(tokens, config.max_num_seqs)
        if config.max_num_batched_tokens is not None:
            tokens = config.max_num_batched_tokens
        return cls(min(slots, tokens), tokens)


def resolve_max_model_len(config: RuntimeConfig, spec: ModelSpec) -> int:
    """Most tokens of one request, prompt and output together.

    Raises:
        ConfigError: more than the model was made for.
    """
    if config.max_model_len is None:
        return min(spec.max_model_len, MAX_SEQUENCE)
    if config.max_model_len > spec.max_model_len:
        why = f"the model was made for at most {spec.max_model_len} tokens"
        if spec.max_model_len == spec.rope.max_positions:
            why = (
                f"in a sequence of more than {spec.max_model_len} tokens, the rotary positions of this model "
                "are all others, those of keys in the cache too"
            )
        raise ConfigError(
            f"max_model_len={config.max_model_len}: {why}; use {spec.max_model_len} or less, or leave "
            "--max-model-len out"
        )
    return config.max_model_len


def scheduler_settings(
    config: RuntimeConfig, spec: ModelSpec, device: str, max_model_len: int
) -> SchedulerSettings:
    """What the scheduler is told of the configuration."""
    sizes = StepSizes.of(config, device)
    return SchedulerSettings(
        lookahead=config.lookahead,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        block_size=config.block_size,
        prefix_caching=config.prefix_caching,
        step_timeout=float(config.step_timeout),
        start_timeout=float(config.start_timeout),
    )


def rank_settings(config: RuntimeConfig, spec: ModelSpec, device: str, max_model_len: int) -> RankSettings:
    """What a rank is told of the configuration."""
    sizes = StepSizes.of(config, device)
    return RankSettings(
        lookahead=config.lookahead,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
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
