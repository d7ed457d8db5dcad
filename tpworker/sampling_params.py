"""What a user can set of a request: how its tokens are chosen, what is told of them, and when it ends.

Validated once, then frozen, like the configuration of a runtime (config.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tpworker.errors import InvalidRequest, shown
from tpworker.keywords import SAMPLING, Named
from tpworker.structured_outputs import StructuredOutputs, structured_outputs
from tpworker.values import MAX_SEED, FrozenDict, is_utf8, number, plain, string

MAX_STOP_IDS = 16  # per request, the model's end-of-sequence ids included: one row of a device table
MAX_STOP_STRINGS = 16
MAX_SHOWN = 64  # special tokens
MAX_CHOICES = 128
MAX_PRIORITY = 2**31 - 1
MAX_SALT = 256  # characters
MAX_LOGPROBS = 20
MAX_BIAS = 1024
MAX_BAD_WORDS = 1024
MAX_WORD = 128  # characters


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a request: the request's for the first, a hash of both for the others. So
    neither a request's choices nor those of requests with neighbouring seeds have anything in common."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Named):
    """How one request's tokens are chosen and when it ends.

    A field left at None takes the default of the model's generation_config.json, or else the value
    named here. The same (prompt, seed, parameters) gives the same tokens in fp32, whatever else the
    runtime does at the time.
    """

    _elsewhere = SAMPLING

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
    shown_special_tokens: Sequence[str] = field(default=())
    """Names of special tokens that are part of the text where others are not, as the marks of a format."""
    include_stop_str_in_output: bool = False
    """The text ends with the stop string that ended it, or with the token, if that is text."""
    structured_outputs: StructuredOutputs | None = None
    """What the output is held to: a schema, a regular expression, some choices, a grammar. A mapping of its
    fields is one too. The output ends where that is complete. `min_tokens` holds for as long as there is
    something else to say; stop strings and stop token ids end the output before it is complete, and so does
    `max_tokens`. Not together with `allowed_token_ids`, `bad_words` and `ignore_eos`."""

    def __post_init__(self) -> None:
        checks = _Checks(self)
        self._check_lists(checks)
        self._check_end(checks)
        self._check_choosing(checks)
        self._check_rules(checks)
        self._check_request(checks)
        self._check_structured(checks)

    def _check_lists(self, checks: _Checks) -> None:
        """First, so that the others find tuples."""
        checks.listed("stop", "a string, or a sequence of strings")
        checks.listed("shown_special_tokens", "a string, or a sequence of strings")
        checks.listed("bad_words", "a string, or a sequence of strings")
        checks.ids("stop_token_ids")
        if self.allowed_token_ids is not None:
            checks.ids("allowed_token_ids")

    def _check_end(self, checks: _Checks) -> None:
        """When the output ends, and what is told of its end."""
        checks.integer("max_tokens", 0, 2**31 - 1, "an integer from 0 to 2**31 - 1")
        checks.integer("min_tokens", 0, 2**31 - 1, "an integer from 0 to 2**31 - 1", optional=False)
        checks.that(
            "min_tokens",
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            checks.boolean(name)
        checks.that(
            "stop",
            len(self.stop) <= MAX_STOP_STRINGS and all(isinstance(s, str) and s for s in self.stop),
            f"at most {MAX_STOP_STRINGS} strings, none of them empty",
        )
        checks.that("stop", self.detokenize or not self.stop, "empty when detokenize is false")
        shown = self.shown_special_tokens
        checks.that(
            "shown_special_tokens",
            len(shown) <= MAX_SHOWN and all(isinstance(s, str) and s for s in shown),
            f"at most {MAX_SHOWN} strings, none of them empty",
        )
        checks.that(
            "shown_special_tokens",
            (self.detokenize and self.skip_special_tokens) or not shown,
            "empty when detokenize or skip_special_tokens is false",
        )
        is_plain = self.skip_special_tokens and not self.include_stop_str_in_output
        name = "include_stop_str_in_output" if self.skip_special_tokens else "skip_special_tokens"
        checks.that(name, self.detokenize or is_plain, "left out when detokenize is false")
        checks.that(
            "stop_token_ids",
            len(self.stop_token_ids) <= MAX_STOP_IDS and _are_ids(self.stop_token_ids),
            f"at most {MAX_STOP_IDS} token ids, integers from 0 on",
        )

    def _check_choosing(self, checks: _Checks) -> None:
        """How a token is chosen by its score."""
        checks.number("temperature", 0.0, 100.0, "a number from 0 to 100")
        checks.number("top_p", 0.0, 1.0, "a number above 0 and at most 1")
        checks.that("top_p", self.top_p is None or self.top_p > 0, "a number above 0 and at most 1")
        checks.integer("top_k", -1, 2**31 - 1, "an integer from 0 to 2**31 - 1 (0 or -1: no limit)")
        checks.number("min_p", 0.0, 1.0, "a number from 0 to 1")
        checks.integer("seed", -(2**63), MAX_SEED, "an integer of 64 bits, from -2**63 to 2**63 - 1")

    def _check_rules(self, checks: _Checks) -> None:
        """What changes the scores."""
        checks.number("repetition_penalty", 0.01, 100.0, "a number from 0.01 to 100 (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            checks.number(name, -2.0, 2.0, "a number from -2 to 2 (0: none)")
            checks.that(name, getattr(self, name) is not None, "a number from -2 to 2 (0: none)")
        checks.that("logit_bias", isinstance(self.logit_bias, Mapping), "a mapping of token ids to numbers")
        bias = FrozenDict({number(i, int): number(v, float) for i, v in self.logit_bias.items()})
        checks.settle("logit_bias", bias)
        checks.that(
            "logit_bias",
            len(bias) <= MAX_BIAS
            and _are_ids(bias)
            and all(type(value) in (int, float) and -100 <= value <= 100 for value in bias.values()),
            f"at most {MAX_BIAS} token ids, each with a number from -100 to 100",
        )
        allowed = self.allowed_token_ids
        checks.that(
            "allowed_token_ids",
            allowed is None or (len(allowed) > 0 and _are_ids(allowed)),
            "at least one token id, integers from 0 on; leave it out to allow all",
        )
        checks.that(
            "bad_words",
            len(self.bad_words) <= MAX_BAD_WORDS
            and all(isinstance(s, str) and 0 < len(s) <= MAX_WORD and is_utf8(s) for s in self.bad_words),
            f"at most {MAX_BAD_WORDS} strings of 1 to {MAX_WORD} characters, in UTF-8",
        )

    def _check_request(self, checks: _Checks) -> None:
        """What is told, how often, and when."""
        for name in ("logprobs", "prompt_logprobs"):
            checks.integer(name, 0, MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}")
        checks.integer("n", 1, MAX_CHOICES, f"an integer from 1 to {MAX_CHOICES}", optional=False)
        limit = f"an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}"
        checks.integer("priority", -MAX_PRIORITY, MAX_PRIORITY, limit, optional=False)
        checks.settle("cache_salt", salt := string(self.cache_salt))
        checks.that(
            "cache_salt",
            salt is None or (isinstance(salt, str) and 1 <= len(salt) <= MAX_SALT and is_utf8(salt)),
            f"a string of 1 to {MAX_SALT} characters; leave it out for none",
        )

    def _check_structured(self, checks: _Checks) -> None:
        """What the output is held to, and what does not go with that."""
        checks.settle("structured_outputs", structured_outputs(self.structured_outputs))
        if self.structured_outputs is None:
            return
        why = "left out with structured_outputs, which says what may be chosen: both could leave nothing"
        checks.that("allowed_token_ids", self.allowed_token_ids is None, why)
        checks.that("bad_words", not self.bad_words, why)
        why = "false with structured_outputs: the output ends where what it is held to is complete"
        checks.that("ignore_eos", not self.ignore_eos, why)

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


def checked(params: SamplingParams | None) -> SamplingParams:
    """What a caller gives as parameters; None: the defaults. Raises TypeError for anything else."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling is {type(params).__name__}: give SamplingParams(max_tokens=…) or None")
    return params


class _Checks:
    """Checks fields of frozen parameters, and makes their values Python's own. Raises InvalidRequest."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params

    def that(self, name: str, ok: bool, limit: str) -> None:
        """Whether a value is what it must be."""
        if not ok:
            value = shown(getattr(self._params, name))
            raise InvalidRequest(f"{name}={value}: must be {limit}", parameter=name)

    def settle(self, name: str, value: object) -> None:
        """From now on it is this."""
        object.__setattr__(self._params, name, value)

    def listed(self, name: str, limit: str) -> None:
        """One string, or a sequence, as a tuple."""
        value = string(getattr(self._params, name))
        if isinstance(value, str):
            value = (value,)
        is_sequence = hasattr(value, "__iter__") and not isinstance(value, (bytes, bytearray, Mapping))
        self.that(name, is_sequence and getattr(value, "ndim", 1) == 1, limit)
        self.settle(name, tuple(map(string, value)))

    def ids(self, name: str) -> None:
        """A sequence of token ids as a tuple of integers."""
        self.listed(name, "a sequence of token ids")
        self.settle(name, tuple(number(i, int) for i in getattr(self._params, name)))

    def integer(self, name: str, low: int, high: int, limit: str, optional: bool = True) -> None:
        """An integer of any library."""
        self.settle(name, value := number(getattr(self._params, name), int))
        self.that(name, (optional and value is None) or (type(value) is int and low <= value <= high), limit)

    def number(self, name: str, low: float, high: float, limit: str) -> None:
        """A number of any library, or None."""
        self.settle(name, value := number(getattr(self._params, name), float))
        self.that(name, value is None or (type(value) in (int, float) and low <= value <= high), limit)

    def boolean(self, name: str) -> None:
        """True or false."""
        self.settle(name, plain(getattr(self._params, name)))
        self.that(name, isinstance(getattr(self._params, name), bool), "true or false")


def _are_ids(values: Iterable[object]) -> bool:
    return all(type(i) is int and i >= 0 for i in values)
