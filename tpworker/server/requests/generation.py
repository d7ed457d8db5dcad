"""What all requests to generate take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from tpworker.errors import InvalidRequest, shown
from tpworker.sampling_params import (
    MAX_BAD_WORDS,
    MAX_BIAS,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_SALT,
    MAX_STOP_IDS,
    MAX_STOP_STRINGS,
    SamplingParams,
)
from tpworker.server.ignored import ignore
from tpworker.server.requests.fields import Body, Integer, TokenId, bounds
from tpworker.server.requests.held import HeldOutput, in_words_of
from tpworker.server.speech import PLAIN, Speech
from tpworker.server.telling import Telling
from tpworker.structured_outputs import PARAMETER, StructuredOutputs
from tpworker.values import MAX_SEED

Prompt = str | list[int]

MAX_STOP_CHARS = 1024
_INT_MAX = 2**31 - 1


class StreamOptions(Body):
    """`stream_options`."""

    place = "stream_options."

    include_usage: bool | None = None
    """Whether a last chunk without choices tells the token counts of the whole request."""
    continuous_usage_stats: bool | None = None
    """With include_usage: whether each chunk tells those that there are by then."""
    include_obfuscation: bool | None = None
    """Random padding against traffic analysis; none is sent, whatever is asked."""


def _checked_length(length: int | None) -> int | None:
    if length is not None and (length < -1 or not length or length > _INT_MAX):
        raise ValueError("it should be a number of tokens from 1 to 2**31 - 1, or -1: as many as fit")
    return length


StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
_STOP = {
    "title": "Stop",
    "anyOf": [
        {"type": "string", "maxLength": MAX_STOP_CHARS},
        {
            "type": "array",
            "maxItems": MAX_STOP_STRINGS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
        },
        {"type": "null"},
    ],
}


_TOKEN_ID = re.compile("[0-9]{1,10}")
_BIAS = {
    "title": "Logit bias",
    "description": "By token id.",
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": f"^{_TOKEN_ID.pattern}$"},
            "maxProperties": MAX_BIAS,
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        {"type": "null"},
    ],
}


def _by_id(bias: Any) -> Any:
    """JSON has no integers as names."""
    if not isinstance(bias, dict):
        return bias
    wrong = next((name for name in bias if not _TOKEN_ID.fullmatch(name)), None)
    if wrong is not None:
        raise ValueError(f"{shown(wrong)} is no token id: names should be integers from 0 on")
    return {int(name): value for name, value in bias.items()}


def _as_list(stop: Any) -> Any:
    """One string as a list of one. An empty one stops nothing."""
    if isinstance(stop, str):
        return [stop] if stop else []
    return stop


class GenerationRequest(HeldOutput):
    """What all requests to generate take."""

    default_max_tokens: ClassVar[int | None] = None
    """Where none are given; None: as many as fit."""
    prompt_name: ClassVar[str] = "prompt"
    """What the endpoint calls the prompt."""
    limit_name: ClassVar[str] = "max_tokens"
    """What the endpoint calls max_tokens, which it takes too."""
    accepted: ClassVar[frozenset[str]] = frozenset(
        [
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
        ]
    )

    model: str | None = None
    """The served model's name; may be left out."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = bounds(minimum=0, maximum=_INT_MAX)
    n: Integer | None = bounds(minimum=1, maximum=MAX_CHOICES)
    """Choices of each prompt."""
    temperature: float | None = bounds(minimum=0, maximum=100)
    top_p: float | None = bounds(exclusiveMinimum=0, maximum=1)
    top_k: Integer | None = bounds(minimum=-1, maximum=_INT_MAX)
    min_p: float | None = bounds(minimum=0, maximum=1)
    repetition_penalty: float | None = bounds(minimum=0.01, maximum=100)
    presence_penalty: float | None = bounds(minimum=-2, maximum=2)
    frequency_penalty: float | None = bounds(minimum=-2, maximum=2)
    logit_bias: Annotated[dict[TokenId, float] | None, BeforeValidator(_by_id), WithJsonSchema(_BIAS)] = None
    allowed_token_ids: list[TokenId] | None = bounds(minItems=1)
    bad_words: list[str] | None = bounds(maxItems=MAX_BAD_WORDS)
    priority: Integer | None = bounds(minimum=-MAX_PRIORITY, maximum=MAX_PRIORITY)
    """Lower is earlier; other than 0 only with --scheduling-policy priority."""
    cache_salt: str | None = bounds(minLength=1, maxLength=MAX_SALT)
    """KV blocks are shared only with requests of the same."""
    prompt_logprobs: Integer | None = bounds(minimum=0, maximum=MAX_LOGPROBS)
    return_tokens_as_token_ids: bool | None = None
    """Logprobs name tokens by their ids."""
    min_tokens: Integer | None = bounds(minimum=0, maximum=_INT_MAX)
    seed: Integer | None = bounds(minimum=-(2**63), maximum=MAX_SEED)
    stop: Annotated[list[StopString] | None, BeforeValidator(_as_list), WithJsonSchema(_STOP)] = None
    stop_token_ids: list[TokenId] | None = bounds(maxItems=MAX_STOP_IDS)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    """Whether the text ends with the stop string that ended it."""
    skip_special_tokens: bool | None = None
    """False: special tokens are part of the text."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds what the model expects around a text; null: as is usual here."""
    truncate_prompt_tokens: Annotated[Integer | None, AfterValidator(_checked_length)] = bounds(
        minimum=-1, maximum=_INT_MAX, **{"not": {"const": 0}}
    )
    """Of a longer prompt only so many tokens are used, its last; -1: as many as fit."""
    return_token_ids: bool | None = None
    """Whether the answer tells the token ids of prompt and output."""

    def telling(self, force_usage: bool = False) -> Telling:
        """What the answer tells; `force_usage`: the token counts even where nobody asks for them."""
        options = self.stream_options or StreamOptions()
        usage = force_usage or bool(options.include_usage)
        return Telling(
            usage,
            usage and bool(options.continuous_usage_stats),
            bool(self.return_token_ids),
            self._num_logprobs,
            self.prompt_logprobs is not None,
            bool(self.return_tokens_as_token_ids),
            shows_special=self.skip_special_tokens is False,
            num_choices=1 if self.n is None else self.n,
        )

    @property
    def num_choices(self) -> int:
        """That are generated for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def blamed_for_many(self) -> str:
        """The parameter that is at fault if these are more requests than can ever be open."""
        return self._own_names.get("n", "n") if self.num_choices > 1 else "prompt"

    @property
    def _num_logprobs(self) -> int | None:
        """Of the likeliest, for each token of the output; None: no logprobs."""
        return None

    @model_validator(mode="after")
    def _not_streamed(self) -> GenerationRequest:
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest(
                "prompt_logprobs are not streamed: leave out stream, or prompt_logprobs", "prompt_logprobs"
            )
        return self

    @model_validator(mode="after")
    def _only_with_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            ignore("stream_options")
        return self

    @property
    def num_output_reserved(self) -> int:
        """Tokens of the output that a prompt of any length must leave room for."""
        asked = self.default_max_tokens if self._limit is None else self._limit
        return max(1 if asked is None else asked, self.min_tokens or 0)

    @property
    def _limit(self) -> int | None:
        limit: int | None = getattr(self, self.limit_name)
        return self.max_tokens if limit is None else limit

    @model_validator(mode="after")
    def _one_limit(self) -> GenerationRequest:
        name, limit = self.limit_name, getattr(self, self.limit_name)
        if self.max_tokens is not None and limit not in (None, self.max_tokens):
            raise InvalidRequest(
                f"max_tokens={self.max_tokens} and {name}={limit} mean the same: give one", parameter=name
            )
        return self

    def sampling(self, detokenize: bool, speech: Speech = PLAIN) -> SamplingParams:
        """Raises InvalidRequest for a value out of range.

        Args:
            detokenize: false without a tokenizer.
            speech: how the output is read.
        """
        try:
            return self._sampling(detokenize, speech)
        except InvalidRequest as error:
            raise self.in_its_words(error) from error

    def in_its_words(self, error: InvalidRequest) -> InvalidRequest:
        """An error of the runtime, about what the endpoint may call by another name."""
        limit = "max_tokens" if getattr(self, self.limit_name) is None else self.limit_name
        message = str(error).replace("max_tokens", limit)
        held = "tools" if self.held is None else self.held.name
        message = in_words_of(held, message)
        names = {"prompt": self.prompt_name, "max_tokens": limit, PARAMETER: held, **self._own_names}
        name = names.get(error.parameter or "", error.parameter)
        if message.startswith(given := f"{error.parameter}="):
            message = f"{name}={message.removeprefix(given)}"
        return type(error)(message, name)

    @property
    def _own_names(self) -> Mapping[str, str]:
        """By which parameter of the endpoint's those of `SamplingParams` were given, where names differ."""
        return {}

    def _structured(self, speech: Speech) -> StructuredOutputs | None:
        """What the output is held to."""
        if speech.grammar is not None:
            return StructuredOutputs(grammar=speech.grammar, behind=speech.behind)
        return None if self.held is None else self.held.outputs(speech.behind)

    def _sampling(self, detokenize: bool, speech: Speech) -> SamplingParams:
        if self.stop and not detokenize:
            raise InvalidRequest(
                "stop strings are for text, and this model has no tokenizer: use stop_token_ids",
                parameter="stop",
            )
        is_text = {
            "skip_special_tokens": self.skip_special_tokens is False,
            "include_stop_str_in_output": bool(self.include_stop_str_in_output),
        }
        if self.held is not None:
            is_text[self.held.name] = True
        for name in (name for name, is_asked in is_text.items() if is_asked and not detokenize):
            raise InvalidRequest(f"{name} is for text, and this model has no tokenizer: leave it out", name)
        return SamplingParams(
            max_tokens=self._limit,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            allowed_token_ids=self.allowed_token_ids,
            bad_words=self.bad_words or (),
            logprobs=self._num_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            n=self.num_choices,
            priority=self.priority or 0,
            cache_salt=self.cache_salt,
            min_tokens=self.min_tokens or 0,
            seed=self.seed,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            detokenize=detokenize,
            skip_special_tokens=self.skip_special_tokens is not False,
            shown_special_tokens=speech.shown if self.skip_special_tokens is not False else (),
            structured_outputs=self._structured(speech),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
        )
