"""What an answer tells, and what has come of each of its choices so far."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

from tpworker.outputs import RequestOutput, TokenLogprobs
from tpworker.server.logprobs import Offsets, Told

PromptLogprobs = tuple[TokenLogprobs | None, ...]

encode = json.JSONEncoder(ensure_ascii=False).encode


def quote(value: object) -> str:
    """As JSON. Escapes also what clients that read line by line may take for the end of one."""
    quoted = encode_basestring(value) if isinstance(value, str) else encode(value)
    if quoted.isascii():
        return quoted
    return quoted.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@dataclass(frozen=True)
class Telling:
    """What an answer tells besides its text, if it is asked to."""

    usage: bool = False
    """A stream ends with the token counts."""
    continuous_usage: bool = False
    """Each event has them, as they are by then."""
    token_ids: bool = False
    """Of the prompt, and of the output."""
    logprobs: int | None = None
    """Of the output, with so many of the likeliest."""
    prompt_logprobs: bool = False
    tokens_as_ids: bool = False
    """Logprobs name tokens by their ids."""
    echo: Sequence[str] | None = None
    """The prompts' texts, each before its choices' own."""
    shows_special: bool = False
    """Special tokens are text."""
    num_choices: int = 1
    """Of each prompt."""
    num_generated: int | None = None
    """Of which these are the likeliest; None: no more."""


@dataclass
class Choice:
    """One output of a prompt, so far."""

    keeps_tokens: bool = False
    token_ids: list[int] = field(default_factory=list)
    """All of them, if they are to be kept."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """The same."""
    prompt_logprobs: PromptLogprobs | None = None
    sum_logprobs: float = 0.0
    """Of all its tokens, where they are told."""
    offsets: Offsets = field(default_factory=Offsets)
    """Where its text stands, for logprobs."""
    told: list[Told] = field(default_factory=list)
    """Of its prompt's tokens, where they are echoed."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, output: RequestOutput) -> None:
        self.num_prompt_tokens = output.num_prompt_tokens
        self.num_cached_tokens = output.num_cached_tokens
        self.num_output_tokens = output.num_output_tokens
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
        if self.keeps_tokens:
            self.token_ids += output.token_ids
            self.logprobs += output.logprobs or ()
        if output.prompt_logprobs:
            self.prompt_logprobs = output.prompt_logprobs
        if output.logprobs:
            self.sum_logprobs += sum(one.logprob for one in output.logprobs)


def usage(choices: Sequence[Choice], num_choices: int = 1) -> dict[str, Any]:
    """The token counts of a request, all its choices together; a prompt counts once for its `num_choices`."""
    prompt = sum(_of_prompts(choices, num_choices, "num_prompt_tokens"))
    output = sum(choice.num_output_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {
            "cached_tokens": sum(_of_prompts(choices, num_choices, "num_cached_tokens"))
        },
    }


def _of_prompts(choices: Sequence[Choice], num_choices: int, name: str) -> Iterator[int]:
    """Of each prompt what any of its choices has been told."""
    for first in range(0, len(choices), num_choices):
        yield max(getattr(choice, name) for choice in choices[first : first + num_choices])
