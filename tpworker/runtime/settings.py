"""What a configuration comes to on this machine, with this model: every default filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.ipc.child import KvEventsSettings, RankSettings, SchedulerSettings
from tpworker.ipc.deadlines import SHORTEST_SECONDS
from tpworker.ipc.messages import MAX_SEQUENCE
from tpworker.kv_events_config import KvEventsConfig

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

        How many of the tokens a step takes is chosen step by step, unless they are asked for
        (scheduler/filling.py). A CPU is as fast in small steps as in large ones, and answers sooner.
        """
        slots, tokens = (256, 8192) if device == "cuda" else (64, 512)
        if config.max_num_seqs is not None:
            slots, tokens = config.max_num_seqs, max(tokens, config.max_num_seqs)
        if config.max_num_batched_tokens is not None:
            tokens = config.max_num_batched_tokens
        return cls(min(slots, tokens), tokens)


@dataclass(frozen=True, slots=True)
class Speculation:
    """How tokens are guessed, and how many at most."""

    method: str
    """'ngram', 'mtp', or '': not at all."""
    num_drafts: int
    """Of a request in one step, at most; 0: none."""
    prompt_lookup_max: int
    """Tokens of the longest n-gram that is looked up; 1 where none is."""
    prompt_lookup_min: int

    @classmethod
    def of(cls, config: RuntimeConfig) -> Speculation:
        """As configured, with what suits the method."""
        method = config.speculative_method
        if method is None:
            return cls("", 0, 1, 1)
        if method == "mtp":
            return cls("mtp", config.num_speculative_tokens or 1, 1, 1)
        longest, shortest = config.prompt_lookup_max, config.prompt_lookup_min
        return cls(
            "ngram",
            config.num_speculative_tokens or 4,
            longest or max(4, shortest or 0),
            shortest or 1,  # an empty place for a draft costs what a wrong one does (docs/benchmarks.md)
        )

    def __str__(self) -> str:
        """For people: '' if there is none."""
        if not self.method:
            return ""
        drafts = "1 draft" if self.num_drafts == 1 else f"up to {self.num_drafts} drafts"
        if self.method == "mtp":
            return f"{drafts} a step by the model's own head"
        lengths = f"{self.prompt_lookup_min} to {self.prompt_lookup_max}"
        if self.prompt_lookup_min == self.prompt_lookup_max:
            lengths = str(self.prompt_lookup_max)
        return f"{drafts} a step by look-up of the last {lengths} tokens"


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


TARGET_ITL, TARGET_TTFT = 0.035, 0.4
"""Seconds, where none are given; see `RuntimeConfig`."""


def is_chosen(config: RuntimeConfig) -> bool:
    """Whether it is chosen, step by step, how much of its budget is used."""
    has_targets = config.target_itl is not None or config.target_ttft is not None
    return has_targets or config.max_num_batched_tokens is None


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
        step_timeout=float(config.step_timeout or 0),
        start_timeout=float(config.start_timeout),
        num_drafts=Speculation.of(config).num_drafts,
        shortest_deadline=SHORTEST_SECONDS[device],
        kv_events=_kv_events_settings(config.kv_events_config, device),
        target_itl=config.target_itl or TARGET_ITL if is_chosen(config) else 0.0,
        target_ttft=config.target_ttft or TARGET_TTFT if is_chosen(config) else 0.0,
        has_graphs=device == "cuda",
    )


def _kv_events_settings(config: KvEventsConfig | None, device: str) -> KvEventsSettings | None:
    if config is None or not config.is_on:
        return None
    return KvEventsSettings(
        endpoint=config.endpoint,
        replay_endpoint=config.replay_endpoint or "",
        buffer_steps=config.buffer_steps,
        hwm=config.hwm,
        max_queue_size=config.max_queue_size,
        topic=config.topic,
        medium="GPU" if device == "cuda" else "CPU",
    )


def rank_settings(config: RuntimeConfig, spec: ModelSpec, device: str, max_model_len: int) -> RankSettings:
    """What a rank is told of the configuration."""
    sizes, speculation = StepSizes.of(config, device), Speculation.of(config)
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
        step_timeout=float(config.step_timeout or 0),
        start_timeout=float(config.start_timeout),
        speculative_method=speculation.method,
        num_drafts=speculation.num_drafts,
        prompt_lookup_max=speculation.prompt_lookup_max,
        prompt_lookup_min=speculation.prompt_lookup_min,
        kv_cache_dtype=config.kv_cache_dtype,
        quantization=config.quantization or "",
    )
