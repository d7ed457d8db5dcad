"""What a user can set: the runtime's configuration and a request's sampling parameters.

Each is validated once, then frozen. Nothing here imports torch, so a bad option is refused in an
instant, before a process is started.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from tpworker.errors import ConfigError, InvalidRequest, shown

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
SchedulingPolicy = Literal["fcfs", "priority"]

MAX_LOOKAHEAD = 16
MAX_NUM_SEQS = 4096
MAX_STOP_IDS = 16  # per request, the model's end-of-sequence ids included: one row of a device table
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1
MAX_CHOICES = 128
MAX_PRIORITY = 2**31 - 1
MAX_SALT = 256  # characters
MAX_LOGPROBS = 20
MAX_BIAS = 1024
MAX_BAD_WORDS = 1024
MAX_WORD = 128  # characters

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "str | None": (str, type(None)),
    "DeviceName": (str,),
    "DtypeName": (str,),
    "LoadFormat": (str,),
    "SchedulingPolicy": (str,),
}
"""What a field of `RuntimeConfig` may be, by its annotation: an integer is no bool, and no float either."""


def is_utf8(text: str) -> bool:
    """Whether it can be written: bytes of a command line that are no UTF-8 come as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> Any:
    """What a scalar of an array library holds (numpy, torch; also an array of no dimensions), as Python's own
    type; anything else as it is."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else value


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    """A number of whatever type as an int, or, for `float`, as an int or a float; anything else, a bool above
    all, as it is."""
    value = _plain(value)
    if isinstance(value, (bool, str)) or getattr(value, "ndim", None):  # no array is a number
        return value
    try:
        if hasattr(value, "__index__"):
            return operator.index(value)
        if kind is float and hasattr(value, "__float__"):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    return value


_K = TypeVar("_K")
_V = TypeVar("_V")


class FrozenDict(Mapping[_K, _V]):
    """A mapping that stays as it is and has a hash. Unlike `MappingProxyType` it can be copied."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[_K, _V]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: _K) -> _V:
        return self._items[key]

    def __iter__(self) -> Iterator[_K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a request: the request's for the first, a hash of both for the others. So
    neither a request's choices nor those of requests with neighbouring seeds have anything in common."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a runtime is built.

    Every field is also a flag of `tpworker serve`, but for `num_kv_blocks` and `check_ranks_agree`.
    """

    model: str | None = None
    """A folder with config.json, safetensors and tokenizer.json, a hub name, or None: the default model."""
    tensor_parallel_size: int = 1
    """Number of TP ranks: one process each, one GPU each on CUDA."""
    device: DeviceName = "auto"
    """`auto`: GPUs, where there is one for each rank, else the CPU."""
    dtype: DtypeName = "auto"
    """Of weights, activations and KV cache. `auto` is what the checkpoint says."""
    max_model_len: int | None = None
    """Most tokens of one request, prompt and output together. None: what the model's config says."""
    max_num_seqs: int | None = None
    """Most requests that run at once: the number of slots. None: 256 on GPUs, 64 on the CPU, but no more than
    the token budget that is asked for."""
    max_num_batched_tokens: int | None = None
    """Token budget of one step: decoding requests count one each, the rest goes to prefill chunks. None: 2048
    on GPUs, 512 on the CPU, or as many as there are slots."""
    lookahead: int = 2
    """Steps launched beyond the oldest unanswered one. 0 is the plain schedule, without overlap."""
    block_size: int = 16
    """Tokens in one KV block."""
    num_kv_blocks: int | None = None
    """KV blocks of a rank. None: from the device's free memory."""
    gpu_memory_utilization: float = 0.9
    """Share, of the memory that is free once a rank has its weights, that its KV blocks may take: on a GPU
    of all that is free there, on the CPU of the rank's part of half of it. Graphs need some of the rest."""
    prefix_caching: bool = True
    """Share the KV blocks of equal prefixes between requests."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """`fcfs`: first come, first served. `priority`: who waits gets a slot in the order of
    `SamplingParams.priority`, of equals who came first; when KV blocks run out, who runs loses them in the
    reverse order. Nobody loses a slot to one who waits; and who waits may wait for ever, while others that go
    before keep coming."""
    max_queue: int = 1024
    """Most requests that wait for a slot, those still being tokenised included, beyond the ones that free
    slots are about to take; one more is refused with `QueueFull`. Each choice of a request counts."""
    step_timeout: float = 60.0
    """Seconds after which a step that is not answered, or a rank that has not come, ends the runtime."""
    start_timeout: float = 600.0
    """Seconds within which all ranks must have loaded the model."""
    load_format: LoadFormat = "auto"
    """`dummy`: random weights of the right shapes, for benchmarks."""
    chat_template: str | None = None
    """A file with a chat template (Jinja), which takes the place of the model's own."""
    seed: int = 0
    """Of dummy weights, and of the seeds drawn for requests that give none."""
    check_ranks_agree: bool = False
    """Debug mode: compare, at every step, what all ranks must compute alike, bit by bit."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, limit: str) -> None:
            if not ok:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: must be {limit}")

        for option in fields(self):
            given, kinds = getattr(self, option.name), _KINDS[str(option.type)]
            kind = next((kind for kind in (float, int) if kind in kinds), None)
            value = _plain(given) if kind is None else _number(given, kind)
            object.__setattr__(self, option.name, value)
            names = [k.__name__ for k in kinds if k is not type(None)] + ["None"] * (type(None) in kinds)
            check(type(value) in kinds, option.name, " or ".join(names))
        check(
            self.model != "" and is_utf8(self.model or ""),
            "model",
            "a folder or a name on the hub, in UTF-8; leave it out for the default model",
        )
        check(
            self.chat_template != "" and is_utf8(self.chat_template or ""),
            "chat_template",
            "a file, named in UTF-8; leave it out for the model's own",
        )
        check(1 <= self.tensor_parallel_size <= 64, "tensor_parallel_size", "from 1 to 64")
        check(self.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda")
        check(self.dtype in ("auto", "float32", "bfloat16", "float16"), "dtype",
              "auto, float32, bfloat16 or float16")  # fmt: skip
        check(
            self.max_model_len is None or 2 <= self.max_model_len < 2**31,
            "max_model_len",
            "from 2 to 2**31 - 1",
        )
        slots, tokens = self.max_num_seqs, self.max_num_batched_tokens
        check(slots is None or 1 <= slots <= MAX_NUM_SEQS, "max_num_seqs", f"from 1 to {MAX_NUM_SEQS}")
        check(tokens is None or 1 <= tokens <= 2**20, "max_num_batched_tokens", f"from 1 to {2**20}")
        if slots is not None and tokens is not None and slots > tokens:
            raise ConfigError(
                f"max_num_seqs={slots} is more than max_num_batched_tokens={tokens}, and each request that "
                f"decodes takes one token of a step: raise max_num_batched_tokens to {slots} or more, or "
                f"lower max_num_seqs to {tokens} or less"
            )
        check(0 <= self.lookahead <= MAX_LOOKAHEAD, "lookahead", f"from 0 to {MAX_LOOKAHEAD}")
        check(
            1 <= self.block_size <= 256 and self.block_size & (self.block_size - 1) == 0,
            "block_size",
            "a power of two from 1 to 256",
        )
        check(self.num_kv_blocks is None or 2 <= self.num_kv_blocks <= 2**30, "num_kv_blocks", "at least 2")
        check(0.05 <= self.gpu_memory_utilization <= 1.0, "gpu_memory_utilization", "from 0.05 to 1")
        check(self.scheduling_policy in ("fcfs", "priority"), "scheduling_policy", "fcfs or priority")
        check(1 <= self.max_queue <= 2**20, "max_queue", f"from 1 to {2**20}")
        check(0 < self.step_timeout <= 86400, "step_timeout", "above 0 and at most 86400 seconds")
        check(0 < self.start_timeout <= 86400, "start_timeout", "above 0 and at most 86400 seconds")
        check(self.load_format in ("auto", "dummy"), "load_format", "auto or dummy")
        check(0 <= self.seed <= MAX_SEED, "seed", "from 0 to 2**63 - 1")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends.

    A field left at None takes the default of the model's generation_config.json, or else the value
    named here. The same (prompt, seed, parameters) gives the same tokens in fp32, whatever else the
    runtime does at the time.
    """

    max_tokens: int | None = None
    """Most tokens generated. None: as many as fit into max_model_len. 0: none, e.g. for `prompt_logprobs`."""
    temperature: float | None = None
    """0 is greedy. Default 1.0."""
    top_p: float | None = None
    """Smallest set of tokens whose probabilities sum to at least top_p. Default 1.0: all."""
    top_k: int | None = None
    """The k most likely tokens. Default 0: all."""
    min_p: float | None = None
    """Only tokens at least min_p times as likely as the likeliest, after temperature, before top_k and top_p.
    Default 0: all."""
    repetition_penalty: float | None = None
    """Divides positive logits of tokens that prompt or output hold, and multiplies negative ones. Default 1:
    none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the output holds."""
    frequency_penalty: float = 0.0
    """The same, for each time that the output holds them."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids, before penalties."""
    allowed_token_ids: Sequence[int] | None = None
    """No other token is chosen. None: all are allowed."""
    bad_words: Sequence[str] = field(default=())
    """Texts that the output does not come to hold, tokenised as they are and, unless they begin with a space,
    behind one: a text's last token is not chosen where those before it stand. Other tokens that spell it are
    not barred."""
    logprobs: int | None = None
    """Outputs have `logprobs`: of each token, and of so many of the likeliest in its place."""
    prompt_logprobs: int | None = None
    """The first output has `prompt_logprobs`: the same for the tokens of the prompt. All of it is computed
    then, whatever the prefix cache holds."""
    seed: int | None = None
    """None: one is drawn for the request."""
    n: int = 1
    """Choices: so many outputs for the prompt, which is computed once. Each counts as a request: it takes a
    slot, or a place in the queue. Each has a seed of its own (see `of_choice`); greedy ones are all alike."""
    priority: int = 0
    """Lower is earlier. Other than 0 only where `RuntimeConfig.scheduling_policy` is `priority`."""
    cache_salt: str | None = None
    """KV blocks of equal prefixes are shared only with requests of the same salt: who does not know it cannot
    find out, by how quickly an answer comes, what others have asked. None is a salt too."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many tokens; a stop string that is complete within them
    is text."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence tokens."""
    stop: Sequence[str] = field(default=())
    """Strings that end the output; they are not part of it. The name of a special token in one stands for
    that token too."""
    stop_token_ids: Sequence[int] = field(default=())
    """Further token ids that end the output; like the model's own, they are not part of the text."""
    detokenize: bool = True
    """False: outputs carry token ids only, and `stop` must be empty."""
    skip_special_tokens: bool = True
    """False: special tokens are part of the text, by their names; the token that ends the output is not."""
    include_stop_str_in_output: bool = False
    """The text ends with the stop string that ended it, or with the token, if that is text."""

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, limit: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name}={shown(getattr(self, name))}: must be {limit}", parameter=name)

        def settle(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        def listed(name: str, limit: str) -> None:
            value = getattr(self, name)
            check(name, isinstance(value, str) or hasattr(value, "__iter__"), limit)
            check(name, getattr(value, "ndim", 1) == 1, limit)  # or an array cannot be gone through
            settle(name, (value,) if isinstance(value, str) else tuple(value))

        def integer(name: str, low: int, high: int, limit: str, optional: bool = True) -> None:
            settle(name, value := _number(getattr(self, name), int))
            check(name, (optional and value is None) or (type(value) is int and low <= value <= high), limit)

        def number(name: str, low: float, high: float, limit: str) -> None:
            settle(name, value := _number(getattr(self, name), float))
            check(name, value is None or (type(value) in (int, float) and low <= value <= high), limit)

        def boolean(name: str) -> None:
            settle(name, _plain(getattr(self, name)))
            check(name, isinstance(getattr(self, name), bool), "true or false")

        listed("stop", "a string, or a sequence of strings")
        listed("bad_words", "a string, or a sequence of strings")
        if self.allowed_token_ids is not None:
            listed("allowed_token_ids", "a sequence of token ids")
            settle("allowed_token_ids", tuple(_number(i, int) for i in self.allowed_token_ids))
        check("logit_bias", isinstance(self.logit_bias, Mapping), "a mapping of token ids to numbers")
        bias = {_number(i, int): _number(value, float) for i, value in self.logit_bias.items()}
        settle("logit_bias", FrozenDict(bias))
        listed("stop_token_ids", "a sequence of token ids")
        settle("stop_token_ids", tuple(_number(i, int) for i in self.stop_token_ids))

        integer("max_tokens", 0, 2**31 - 1, "an integer from 0 to 2**31 - 1")
        number("temperature", 0.0, 100.0, "a number from 0 to 100")
        number("top_p", 0.0, 1.0, "a number above 0 and at most 1")
        check("top_p", self.top_p is None or self.top_p > 0, "a number above 0 and at most 1")
        integer("top_k", -1, 2**31 - 1, "an integer from 0 to 2**31 - 1 (0 or -1: no limit)")
        number("min_p", 0.0, 1.0, "a number from 0 to 1")
        number("repetition_penalty", 0.01, 100.0, "a number from 0.01 to 100 (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            number(name, -2.0, 2.0, "a number from -2 to 2 (0: none)")
            check(name, getattr(self, name) is not None, "a number from -2 to 2 (0: none)")
        for name in ("logprobs", "prompt_logprobs"):
            integer(name, 0, MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}")
        check(
            "logit_bias",
            len(bias) <= MAX_BIAS
            and all(type(i) is int and i >= 0 for i in bias)
            and all(type(value) in (int, float) and -100 <= value <= 100 for value in bias.values()),
            f"at most {MAX_BIAS} token ids, each with a number from -100 to 100",
        )
        allowed = self.allowed_token_ids
        check(
            "allowed_token_ids",
            allowed is None or (len(allowed) > 0 and all(type(i) is int and i >= 0 for i in allowed)),
            "at least one token id, integers from 0 on; leave it out to allow all",
        )
        check(
            "bad_words",
            len(self.bad_words) <= MAX_BAD_WORDS
            and all(isinstance(s, str) and 0 < len(s) <= MAX_WORD and is_utf8(s) for s in self.bad_words),
            f"at most {MAX_BAD_WORDS} strings of 1 to {MAX_WORD} characters, in UTF-8",
        )
        integer("seed", -(2**63), MAX_SEED, "an integer of 64 bits")
        integer("n", 1, MAX_CHOICES, f"an integer from 1 to {MAX_CHOICES}", optional=False)
        limit = f"an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}"
        integer("priority", -MAX_PRIORITY, MAX_PRIORITY, limit, optional=False)
        check(
            "cache_salt",
            self.cache_salt is None
            or (
                isinstance(self.cache_salt, str)
                and 1 <= len(self.cache_salt) <= MAX_SALT
                and is_utf8(self.cache_salt)
            ),
            f"a string of 1 to {MAX_SALT} characters; leave it out for none",
        )
        integer("min_tokens", 0, 2**31 - 1, "an integer from 0 to 2**31 - 1", optional=False)
        check(
            "min_tokens",
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        boolean("ignore_eos")
        boolean("detokenize")
        boolean("skip_special_tokens")
        boolean("include_stop_str_in_output")
        check(
            "stop",
            len(self.stop) <= MAX_STOP_STRINGS and all(isinstance(s, str) and s for s in self.stop),
            f"at most {MAX_STOP_STRINGS} strings, none of them empty",
        )
        check("stop", self.detokenize or not self.stop, "empty when detokenize is false")
        is_plain = self.skip_special_tokens and not self.include_stop_str_in_output
        name = "include_stop_str_in_output" if self.skip_special_tokens else "skip_special_tokens"
        check(name, self.detokenize or is_plain, "left out when detokenize is false")
        check(
            "stop_token_ids",
            len(self.stop_token_ids) <= MAX_STOP_IDS
            and all(type(i) is int and i >= 0 for i in self.stop_token_ids),
            f"at most {MAX_STOP_IDS} token ids, integers from 0 on",
        )

    def of_choice(self, index: int) -> SamplingParams:
        """The parameters with which a request of its own gives what choice `index` of this one gives.

        Raises:
            InvalidRequest: there is no seed, so that nothing would be the same; or no such choice.
        """
        if self.seed is None:
            raise InvalidRequest("seed=None: no choice can be had again without one", "seed")
        if not 0 <= index < self.n:
            raise InvalidRequest(f"n={self.n}: the choices are 0 to {self.n - 1}, and not {index}", "n")
        return replace(self, n=1, seed=choice_seed(self.seed, index))
