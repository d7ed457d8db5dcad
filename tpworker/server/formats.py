"""What was generated, as the endpoints write it: whole, or in server-sent events.

An event is written by hand around one JSON-quoted text: there is one for every token of every stream.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tpworker.outputs import RequestOutput, TokenLogprobs
from tpworker.server.errors import ApiError
from tpworker.server.logprobs import LogprobWriter, Offsets, Told

if TYPE_CHECKING:
    from tpworker.text.tokenizer import Tokenizer

PromptLogprobs = tuple[TokenLogprobs | None, ...]

DONE = "data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=False).encode


def quote(value: object) -> str:
    """As JSON. Escapes also what clients that read line by line may take for the end of one."""
    quoted = _encode(value)
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
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.sum_logprobs += sum(one.logprob for one in output.logprobs or ())


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


class Format:
    """How one endpoint writes one answer. Use `CompletionFormat` or `ChatFormat`."""

    _prefix: ClassVar[str]
    _object: ClassVar[str]
    _chunk_object: ClassVar[str]

    def __init__(
        self,
        model: str,
        telling: Telling,
        prompts: Sequence[Sequence[int]] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """
        Args:
            model: the name to be told.
            telling: what else.
            prompts: their token ids; not needed unless they are told, or their logprobs.
            tokenizer: names the tokens in logprobs; None: by their ids.
        """
        self._writer = LogprobWriter(tokenizer, telling.tokens_as_ids, telling.shows_special)
        self.request_id = f"{self._prefix}-{uuid.uuid4().hex}"
        self.telling = telling
        self._prompts = prompts
        self._model = model
        self._created = int(time.time())
        self._head = f"data: {json.dumps(self._envelope(self._chunk_object))[:-1]}, "
        self._tail = ', "usage": null}\n\n' if telling.usage else "}\n\n"

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self._created, "model": self._model}

    @property
    def tells_tokens(self) -> bool:
        """Whether an answer tells more of its tokens than their text."""
        return self.telling.token_ids or self.telling.logprobs is not None

    @property
    def num_generated(self) -> int:
        """Choices that are generated for each prompt."""
        return self.telling.num_generated or self.telling.num_choices

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The token counts of the whole request."""
        return usage(choices, self.num_generated)

    def prompt_of(self, index: int) -> Sequence[int]:
        """The token ids of a choice's prompt."""
        return self._prompts[index // self.num_generated]

    def opening(self, index: int, choices: Sequence[Choice]) -> str:
        """The event before a choice's first text."""
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[TokenLogprobs], choice: Choice) -> dict[str, Any]:
        """`logprobs` of a choice in an event, or of the whole one."""
        raise NotImplementedError

    def _written(self, text: str) -> str:
        """Some new text as fields of a choice in a chunk."""
        raise NotImplementedError

    def _whole(self, text: str) -> dict[str, Any]:
        """All the text as fields of a choice."""
        raise NotImplementedError

    def event(self, index: int, output: RequestOutput, choices: Sequence[Choice]) -> str:
        """The event for what is new of a choice; '' where there is nothing that it tells."""
        if not (output.text or output.finish_reason or (self.tells_tokens and output.token_ids)):
            return ""
        rest = '"finish_reason": null'
        if output.finish_reason is not None:
            stop_reason = json.dumps(output.stop_reason)
            rest = f'"finish_reason": "{output.finish_reason}", "stop_reason": {stop_reason}'
        if self.telling.token_ids:
            rest += f', "token_ids": {json.dumps(output.token_ids)}'
        logprobs = "null"
        if self.telling.logprobs is not None:
            logprobs = quote(self._logprobs(output.logprobs or (), choices[index]))
        return self._event(index, self._written(output.text), rest, choices, logprobs=logprobs)

    def _event(
        self,
        index: int,
        content: str,
        rest: str,
        choices: Sequence[Choice],
        outside: str = "",
        logprobs: str = "null",
    ) -> str:
        """
        Args:
            content, rest, logprobs: fields of the choice.
            outside: fields of the event besides it.
        """
        tail = self._tail
        if self.telling.continuous_usage:
            tail = f', "usage": {json.dumps(self.usage(choices))}}}\n\n'
        choice = f'{{"index": {index}, {content}, "logprobs": {logprobs}, {rest}}}'
        return f'{self._head}"choices": [{choice}]{outside}{tail}'

    def closing(self, choices: Sequence[Choice]) -> str:
        """What ends a stream: the token counts, if they were asked for, and a mark."""
        if not self.telling.usage:
            return DONE
        return f'{self._head}"choices": [], "usage": {json.dumps(self.usage(choices))}}}\n\n{DONE}'

    def failing(self, error: ApiError) -> str:
        """What ends a stream in place of that, when something has failed."""
        return f"data: {error.as_json()}\n\n"

    def body(self, texts: Sequence[str], choices: Sequence[Choice]) -> str:
        """The whole answer."""
        written = [
            {
                "index": place,
                **self._whole(texts[index]),
                "logprobs": self._all_logprobs(index, choices[index]),
                "finish_reason": choices[index].finish_reason,
                "stop_reason": choices[index].stop_reason,
                **self._told_of(index, choices),
            }
            for place, index in enumerate(self._shown(choices))
        ]
        return _encode(
            {
                **self._envelope(self._object),
                "choices": written,
                "usage": self.usage(choices),
                **self._told_outside(choices),
            }
        )

    def _shown(self, choices: Sequence[Choice]) -> Iterator[int]:
        """Which choices are told of: all, or of each prompt the likeliest, by their mean logprob a token."""
        for first in range(0, len(choices), self.num_generated):
            of_prompt = range(first, first + self.num_generated)
            if self.telling.num_generated is None:
                yield from of_prompt
            else:
                ranked = sorted(of_prompt, key=lambda index: -_likelihood(choices[index]))
                yield from ranked[: self.telling.num_choices]

    def _all_logprobs(self, index: int, choice: Choice) -> dict[str, Any] | None:
        return None if self.telling.logprobs is None else self._logprobs(choice.logprobs, choice)

    def _told_prompt(self, choice: Choice) -> list[dict[str, Any] | None] | None:
        """`prompt_logprobs`, in vLLM's shape."""
        told = choice.prompt_logprobs
        return None if told is None else [one and self._writer.ranked(one) for one in told]

    def _told_of(self, index: int, choices: Sequence[Choice]) -> dict[str, Any]:
        """What else a choice tells, if it is asked to."""
        return {"token_ids": choices[index].token_ids} if self.telling.token_ids else {}

    def _told_outside(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What the whole answer tells."""
        return {}


def _likelihood(choice: Choice) -> float:
    """The mean logprob of its tokens."""
    return choice.sum_logprobs / max(1, choice.num_output_tokens)


class CompletionFormat(Format):
    """/v1/completions."""

    _prefix = "cmpl"
    _object = _chunk_object = "text_completion"

    def _echo(self, index: int) -> str:
        echo = self.telling.echo
        return "" if echo is None else echo[index // self.num_generated]

    def _prompt_told(self, index: int, choices: Sequence[Choice]) -> list[Told]:
        """Of the tokens of a prompt that is echoed."""
        if self.telling.echo is None:
            return []
        told = choices[index - index % self.num_generated].prompt_logprobs or ()
        return list(zip(self.prompt_of(index), told, strict=False))

    def opening(self, index: int, choices: Sequence[Choice]) -> str:
        if not self.telling.token_ids and self.telling.echo is None:
            return ""
        rest = '"finish_reason": null'
        if self.telling.token_ids:
            rest += f', "prompt_token_ids": {json.dumps(self.prompt_of(index))}, "token_ids": []'
        logprobs = "null"
        if self.telling.logprobs is not None and self.telling.echo is not None:
            told = self._prompt_told(index, choices)
            logprobs = quote(self._written_logprobs(told, choices[index], self._echo(index), len(told)))
        return self._event(index, self._written(self._echo(index)), rest, choices, logprobs=logprobs)

    def _logprobs(self, tokens: Sequence[TokenLogprobs], choice: Choice) -> dict[str, Any]:
        return self._written_logprobs([(one.token_id, one) for one in tokens], choice)

    def _written_logprobs(
        self, told: Sequence[Told], choice: Choice, echo: str = "", num_echoed: int = 0
    ) -> dict[str, Any]:
        has_top = bool(self.telling.logprobs)
        return self._writer.completion(told, choice.offsets, has_top, echo, num_echoed)

    def body(self, texts: Sequence[str], choices: Sequence[Choice]) -> str:
        whole = [self._echo(index) + text for index, text in enumerate(texts)]
        for index, choice in enumerate(choices):
            choice.told = self._prompt_told(index, choices) if self.telling.logprobs is not None else []
        return super().body(whole, choices)

    def _all_logprobs(self, index: int, choice: Choice) -> dict[str, Any] | None:
        if self.telling.logprobs is None:
            return None
        told = [*choice.told, *((one.token_id, one) for one in choice.logprobs)]
        return self._written_logprobs(told, choice, self._echo(index), len(choice.told))

    def _told_of(self, index: int, choices: Sequence[Choice]) -> dict[str, Any]:
        told = super()._told_of(index, choices)
        if self.telling.token_ids:
            told = {"prompt_token_ids": list(self.prompt_of(index)), **told}
        if self.telling.prompt_logprobs:
            told["prompt_logprobs"] = self._told_prompt(choices[index - index % self.num_generated])
        return told

    def _written(self, text: str) -> str:
        return f'"text": {quote(text)}'

    def _whole(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatFormat(Format):
    """/v1/chat/completions."""

    _prefix = "chatcmpl"
    _object = "chat.completion"
    _chunk_object = "chat.completion.chunk"

    def opening(self, index: int, choices: Sequence[Choice]) -> str:
        delta = '"delta": {"role": "assistant", "content": ""}'
        ids = f', "prompt_token_ids": {json.dumps(self._prompts[0])}' if self.telling.token_ids else ""
        return self._event(index, delta, '"finish_reason": null', choices, ids)

    def _logprobs(self, tokens: Sequence[TokenLogprobs], choice: Choice) -> dict[str, Any]:
        return self._writer.chat(tokens)

    def _told_outside(self, choices: Sequence[Choice]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if self.telling.token_ids:
            told["prompt_token_ids"] = list(self._prompts[0])
        if self.telling.prompt_logprobs:
            told["prompt_logprobs"] = self._told_prompt(choices[0])
        return told

    def _written(self, text: str) -> str:
        return f'"delta": {{"content": {quote(text)}}}' if text else '"delta": {}'

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}
