"""The body of /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, WithJsonSchema, model_validator

from tpworker.errors import InvalidRequest
from tpworker.sampling_params import MAX_CHOICES, MAX_LOGPROBS, SamplingParams
from tpworker.server.requests.fields import TOKEN_ID, Integer, bounds
from tpworker.server.requests.generation import GenerationRequest, Prompt
from tpworker.server.requests.unsupported import COMPLETION
from tpworker.server.speech import Speech
from tpworker.server.telling import Telling

MAX_PROMPTS = 2048


def _as_prompts(prompt: Any) -> list[Prompt]:
    """One or several prompts, as text or as token ids, each checked to be one of these."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if (ids := _as_ids(prompt)) is not None:
            return [ids]
        if len(prompt) > MAX_PROMPTS:
            raise ValueError(
                f"{len(prompt)} prompts are more than the {MAX_PROMPTS} that one request may have"
            )
        if all(isinstance(p, str) for p in prompt):
            return prompt
        lists = [_as_ids(p) if isinstance(p, list) else None for p in prompt]
        if all(ids is not None for ids in lists):
            return lists  # type: ignore[return-value]
    raise ValueError("it should be a string, a list of strings, a list of token ids, or a list of such lists")


def _as_ids(values: list[Any]) -> list[int] | None:
    """Integers, some of them perhaps written as 4.0; None: not all are integers."""
    kinds = set(map(type, values))
    if kinds <= {int}:
        return values
    if kinds <= {int, float} and all(float(value).is_integer() for value in values):
        return [int(value) for value in values]
    return None


_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "minItems": 1, "items": TOKEN_ID}
_PROMPT = {
    "title": "Prompt",
    "anyOf": [
        _TEXT,
        _IDS,
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TEXT},
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _IDS},
    ],
}


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    unsupported = COMPLETION
    default_max_tokens: ClassVar[int | None] = 16  # the OpenAI API's own

    prompt: Annotated[Any, BeforeValidator(_as_prompts), WithJsonSchema(_PROMPT)]
    """Text or token ids; a list of either gives `n` choices for each."""
    logprobs: Integer | None = bounds(minimum=0, maximum=MAX_LOGPROBS)
    """The answer tells the logprobs of its tokens, and of so many of the likeliest in each one's place."""
    echo: bool | None = None
    """The prompt is part of the text, and of the logprobs."""
    best_of: Integer | None = bounds(minimum=1, maximum=MAX_CHOICES)
    """So many choices are generated, and the `n` likeliest of them told."""

    @property
    def _num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_choices(self) -> int:
        return super().num_choices if self.best_of is None else self.best_of

    @property
    def _own_names(self) -> Mapping[str, str]:
        return {} if self.best_of is None else {"n": "best_of"}

    @model_validator(mode="after")
    def _best_of_fits(self) -> CompletionRequest:
        told = super().num_choices
        if self.num_choices < told:
            raise InvalidRequest(f"best_of={self.best_of}: must be at least n ({told})", "best_of")
        if self.num_choices > told and self.stream:
            raise InvalidRequest(
                "the best of several are known at their end: leave out stream, or best_of", "best_of"
            )
        return self

    def telling(self, force_usage: bool = False) -> Telling:
        told = super().telling(force_usage)
        return replace(told, num_generated=self.num_choices if self.num_choices > told.num_choices else None)

    def _sampling(self, detokenize: bool, speech: Speech) -> SamplingParams:
        sampling = super()._sampling(detokenize, speech)
        if self.num_choices > super().num_choices and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)  # to rank them
        if self.echo and self.logprobs is not None and sampling.prompt_logprobs is None:
            sampling = replace(sampling, prompt_logprobs=self.logprobs)
        return sampling

    @property
    def prompts(self) -> list[Prompt]:
        prompts: list[Prompt] = self.prompt
        return prompts

    @property
    def num_chars(self) -> int:
        """Of all texts together."""
        return sum(len(prompt) for prompt in self.prompts if isinstance(prompt, str))

    @property
    def is_prepared(self) -> bool:
        """Whether the prompts are tokenised, and cut, before they are given to the runtime."""
        # Several: all of them before any is begun. One that is too long refuses the request with its status.
        is_special = self.truncate_prompt_tokens is not None or self.add_special_tokens is False
        return len(self.prompts) > 1 or is_special or bool(self.return_token_ids) or bool(self.echo)
