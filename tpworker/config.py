"""What a user can set of a runtime. What they can of a request: `sampling_params.py`.

It is validated once, then frozen. Nothing here imports torch, so a bad option is refused in an instant,
before a process is started.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, Literal

from tpworker.errors import ConfigError, shown
from tpworker.keywords import OPTIONS, Named
from tpworker.kv_events_config import KvEventsConfig, kv_events_config
from tpworker.values import MAX_RANKS, MAX_SEED, dtype_name, is_address, is_utf8, number, string

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
KvCacheDtype = Literal["auto", "fp8"]
QuantizationName = Literal["fp8"]
SchedulingPolicy = Literal["fcfs", "priority"]
SpeculativeMethod = Literal["ngram", "mtp"]

MAX_LOOKAHEAD = 16
MAX_NUM_SEQS = 4096
MAX_SPECULATIVE_TOKENS = 8
MAX_PROMPT_LOOKUP = 16

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "float | None": (float, int, type(None)),
    "str | None": (str, type(None)),
    "DeviceName": (str,),
    "DtypeName": (str,),
    "LoadFormat": (str,),
    "KvCacheDtype": (str,),
    "QuantizationName | None": (str, type(None)),
    "SchedulingPolicy": (str,),
    "SpeculativeMethod | None": (str, type(None)),
    "KvEventsConfig | None": (KvEventsConfig, type(None)),
}
"""What a field of `RuntimeConfig` may be, by its annotation: an integer is no bool, and no float either."""


_DTYPES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
"""What other engines call them."""


def _settled(name: str, value: Any) -> Any:
    """What is no number, as Python's own: paths are strings, and so are the names of types of numbers."""
    if name in ("model", "chat_template") and isinstance(value, os.PathLike):
        return os.fspath(value)
    if name == "kv_events_config":
        return kv_events_config(value)
    return dtype_name(value) if name == "dtype" else string(value)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Named):
    """How a runtime is built.

    Every field is also a flag of `tpworker serve`, but for `num_kv_blocks` and `check_ranks_agree`.
    """

    _elsewhere = OPTIONS

    model: str | None = None
    """A folder with config.json, safetensors and tokenizer.json or tokenizer.model, a hub name, or None: the
    default model."""
    tensor_parallel_size: int = 1
    """Number of TP ranks: one process each, one GPU each on CUDA."""
    device: DeviceName = "auto"
    """`auto`: GPUs, where there is one for each rank, else the CPU."""
    dtype: DtypeName = "auto"
    """Of weights, activations and KV cache. `auto` is what the checkpoint says."""
    quantization: QuantizationName | None = None
    """`fp8`: weights of attention and MLPs, experts too, are brought to FP8 (E4M3) as they are read, with
    a scale for each output channel, if they are not in FP8 already. Half the memory of bfloat16 on GPUs, and
    half the time to read them; the CPU computes with what they stand for, and saves nothing. None: as the
    checkpoint has them."""
    max_model_len: int | None = None
    """Most tokens of one request, prompt and output together. None: what the model's config says."""
    max_num_seqs: int | None = None
    """Most requests that run at once: the number of slots. None: 256 on GPUs, 64 on the CPU, but no more than
    the token budget that is asked for."""
    max_num_batched_tokens: int | None = None
    """Token budget of one step: decoding requests count one each, the rest goes to prefill chunks. None: at
    most 8192 on GPUs, 512 on the CPU, or as many as there are slots; how many of them a step takes is chosen
    by `target_itl` and `target_ttft`. If it is given, and those are not, a step takes as much as there is."""
    target_itl: float | None = None
    """Seconds between two tokens of a request (ITL) that steps with prompts keep to, if three steps without
    prompts take no longer: so small are the chunks of prompts. None: 0.035 s."""
    target_ttft: float | None = None
    """Seconds to the first token (TTFT): when all that waits would take longer than that in small chunks,
    steps are as large as they may be, and tokens come more slowly. None: 0.4 s."""
    lookahead: int = 2
    """Steps launched beyond the oldest unanswered one, at most: where they are long, and their sizes are
    chosen, it is one. 0 is the plain schedule, without overlap."""
    block_size: int = 16
    """Tokens in one KV block."""
    num_kv_blocks: int | None = None
    """KV blocks of a rank. None: from the device's free memory."""
    kv_cache_dtype: KvCacheDtype = "auto"
    """`fp8`: keys and values are rounded to FP8 (E4M3, without a scale) as they are stored: twice as many
    tokens as of bfloat16 in the same memory, half the time to read them. `auto`: they have the `dtype`."""
    gpu_memory_utilization: float = 0.9
    """Share, of the memory that is free once a rank has its weights, that its KV blocks may take: on a GPU
    of all that is free there, on the CPU of the rank's part of half of it. Graphs need some of the rest."""
    prefix_caching: bool = True
    """Share the KV blocks of equal prefixes between requests."""
    kv_events_config: KvEventsConfig | None = None
    """Tell of what the prefix cache holds (`KvEventsConfig`, or a mapping of its fields). None: do not."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """`fcfs`: first come, first served. `priority`: who waits gets a slot in the order of
    `SamplingParams.priority`, of equals who came first; when KV blocks run out, who runs loses them in the
    reverse order. Nobody loses a slot to one who waits; and who waits may wait for ever, while others that go
    before keep coming."""
    max_queue: int = 1024
    """Most requests that wait for a slot, those still being tokenised included, beyond the ones that free
    slots are about to take; one more is refused with `QueueFull`. Each choice of a request counts."""
    speculative_method: SpeculativeMethod | None = None
    """Guess tokens, and check several in one step: outputs are the same, sooner. `ngram`: what followed when
    the last few tokens stood in the prompt or the output before; any model. `mtp`: by the model's own
    next-token layer, where it has one. None: one token a step."""
    num_speculative_tokens: int | None = None
    """Most drafts of one request in a step. How many there are is chosen while serving, by what they cost and
    how many are right: 0, this, or a half, a quarter, … of it. None: 1 with `mtp`, 4 with `ngram`."""
    prompt_lookup_max: int | None = None
    """With `ngram`: tokens of the longest n-gram that is looked up, before shorter ones. None: 4, or
    `prompt_lookup_min` if that is more."""
    prompt_lookup_min: int | None = None
    """With `ngram`: tokens of the shortest. None: 1."""
    step_timeout: float | None = None
    """Seconds after which a step that is not answered, or a rank that has not come, is a fault. None: chosen
    from what steps take: ten times the slowest of its size so far, but at least 5 on the CPU and 4 on GPUs;
    60 for the first steps, and at most, unless a step has taken that long."""
    max_restarts: int = 10
    """A process of the group that dies, hangs or raises has the group started anew, and open requests go on;
    after more restarts than these within `restart_window` the runtime fails. 0: at the first fault."""
    restart_window: float = 300.0
    """Seconds within which restarts are counted."""
    start_timeout: float = 600.0
    """Seconds within which all ranks must have loaded the model."""
    join_address: str | None = None
    """Ranks are not started here, but by somebody else, with `tpworker rank --join` and this name: torchrun,
    Slurm, a Ray placement group. Letters, digits, '.', '_' and '-', up to 64. Those that are missing, at the
    start and when one has been lost, are waited for as long as `start_timeout` says. None: they are started
    here."""
    load_format: LoadFormat = "auto"
    """`dummy`: random weights of the right shapes, for benchmarks."""
    chat_template: str | None = None
    """A file with a chat template (Jinja), which takes the place of the model's own."""
    seed: int = 0
    """Of dummy weights, and of the seeds drawn for requests that give none."""
    check_ranks_agree: bool = False
    """Debug mode: compare, at every step, what all ranks must compute alike, bit by bit."""

    def __post_init__(self) -> None:
        self._settle_types()
        self._check_model()
        self._check_schedule()
        self._check_speculation()

    def _check(self, ok: bool, name: str, limit: str) -> None:
        if not ok:
            raise ConfigError(f"{name}={shown(getattr(self, name))}: must be {limit}")

    def _settle_types(self) -> None:
        """First: numbers of any library become Python's own, and the others find what they can compare."""
        for option in fields(self):
            given, kinds = getattr(self, option.name), _KINDS[str(option.type)]
            kind = next((kind for kind in (float, int) if kind in kinds), None)
            value = _settled(option.name, given) if kind is None else number(given, kind)
            object.__setattr__(self, option.name, value)
            names = [k.__name__ for k in kinds if k is not type(None)] + ["None"] * (type(None) in kinds)
            self._check(type(value) in kinds, option.name, " or ".join(names))

    def _check_model(self) -> None:
        """What is served, and on what."""
        self._check(
            self.model != "" and is_utf8(self.model or ""),
            "model",
            "a folder or a name on the hub, in UTF-8; leave it out for the default model",
        )
        self._check(
            self.chat_template != "" and is_utf8(self.chat_template or ""),
            "chat_template",
            "a file, named in UTF-8; leave it out for the model's own",
        )
        self._check(
            self.join_address is None or is_address(self.join_address),
            "join_address",
            "1 to 64 of letters, digits, '.', '_' and '-'; leave it out to have the ranks started here",
        )
        num_ranks = self.tensor_parallel_size
        self._check(1 <= num_ranks <= MAX_RANKS, "tensor_parallel_size", f"from 1 to {MAX_RANKS}")
        self._check(self.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda")
        dtypes = "auto", "float32", "bfloat16", "float16"
        named = f" (here it is {_DTYPES[self.dtype]})" if self.dtype in _DTYPES else ""
        self._check(self.dtype in dtypes, "dtype", f"auto, float32, bfloat16 or float16{named}")
        self._check(
            self.max_model_len is None or 2 <= self.max_model_len < 2**31,
            "max_model_len",
            "from 2 to 2**31 - 1",
        )
        self._check(self.kv_cache_dtype in ("auto", "fp8"), "kv_cache_dtype", "auto or fp8")
        self._check(self.quantization in (None, "fp8"), "quantization", "fp8; leave it out for none")
        self._check(self.load_format in ("auto", "dummy"), "load_format", "auto or dummy")
        self._check(0 <= self.seed <= MAX_SEED, "seed", "from 0 to 2**63 - 1")

    def _check_schedule(self) -> None:
        """How requests are put together, and how long may be waited for it."""
        slots, tokens = self.max_num_seqs, self.max_num_batched_tokens
        self._check(slots is None or 1 <= slots <= MAX_NUM_SEQS, "max_num_seqs", f"from 1 to {MAX_NUM_SEQS}")
        self._check(tokens is None or 1 <= tokens <= 2**20, "max_num_batched_tokens", f"from 1 to {2**20}")
        if slots is not None and tokens is not None and slots > tokens:
            raise ConfigError(
                f"max_num_seqs={slots} is more than max_num_batched_tokens={tokens}, and each request that "
                f"decodes takes one token of a step: raise max_num_batched_tokens to {slots} or more, or "
                f"lower max_num_seqs to {tokens} or less"
            )
        self._check(0 <= self.lookahead <= MAX_LOOKAHEAD, "lookahead", f"from 0 to {MAX_LOOKAHEAD}")
        self._check(
            1 <= self.block_size <= 256 and self.block_size & (self.block_size - 1) == 0,
            "block_size",
            "a power of two from 1 to 256",
        )
        if self.kv_events_config is not None and self.kv_events_config.is_on and not self.prefix_caching:
            raise ConfigError(
                "kv_events_config has no effect with prefix_caching=False (--no-prefix-caching): drop one"
            )
        blocks = self.num_kv_blocks
        self._check(blocks is None or 2 <= blocks <= 2**30, "num_kv_blocks", "at least 2")
        self._check(0.05 <= self.gpu_memory_utilization <= 1.0, "gpu_memory_utilization", "from 0.05 to 1")
        self._check(self.scheduling_policy in ("fcfs", "priority"), "scheduling_policy", "fcfs or priority")
        self._check(1 <= self.max_queue <= 2**20, "max_queue", f"from 1 to {2**20}")
        self._check(
            self.step_timeout is None or 0 < self.step_timeout <= 86400,
            "step_timeout",
            "above 0 and at most 86400 seconds; leave it out to have it chosen from what steps take",
        )
        self._check(0 < self.start_timeout <= 86400, "start_timeout", "above 0 and at most 86400 seconds")
        self._check(0 <= self.max_restarts <= 2**20, "max_restarts", f"from 0 to {2**20}")
        for name in ("target_itl", "target_ttft"):
            given = getattr(self, name)
            self._check(given is None or 0 < given <= 3600, name, "above 0 and at most 3600 seconds")
        self._check(0 < self.restart_window <= 1e6, "restart_window", "above 0 and at most 1000000 seconds")

    def _check_speculation(self) -> None:
        """Drafts: whether there are any, by which method, and how many."""
        method, drafts = self.speculative_method, self.num_speculative_tokens
        longest, shortest = self.prompt_lookup_max, self.prompt_lookup_min
        self._check(method in (None, "ngram", "mtp"), "speculative_method", "ngram, mtp or None")
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            said = f"{name}={shown(getattr(self, name))} has no effect"
            if getattr(self, name) is None:
                continue
            if method is None:
                raise ConfigError(
                    f"{said} without speculative_method: set that to ngram or mtp, or leave this out"
                )
            if method == "mtp" and name != "num_speculative_tokens":
                raise ConfigError(
                    f"{said} with speculative_method=mtp, which looks nothing up: leave it out, or set "
                    "speculative_method to ngram"
                )
        self._check(
            drafts is None or 1 <= drafts <= MAX_SPECULATIVE_TOKENS,
            "num_speculative_tokens",
            f"from 1 to {MAX_SPECULATIVE_TOKENS}; for none, leave speculative_method out",
        )
        for name, length in (("prompt_lookup_max", longest), ("prompt_lookup_min", shortest)):
            ok = length is None or 1 <= length <= MAX_PROMPT_LOOKUP
            self._check(ok, name, f"from 1 to {MAX_PROMPT_LOOKUP}")
        tokens = self.max_num_batched_tokens
        if method is not None and tokens is not None and tokens < 4:
            raise ConfigError(
                f"speculative_method={method} has no effect with max_num_batched_tokens={tokens}: drafts may "
                "take half of a step, so that one request with one draft needs 4; raise it, or leave "
                "speculative_method out"
            )
        if longest is not None and shortest is not None and shortest > longest:
            raise ConfigError(
                f"prompt_lookup_min={shortest} is more than prompt_lookup_max={longest}: raise "
                "prompt_lookup_max, or lower prompt_lookup_min"
            )
