"""What was generated, as the endpoints write it: whole, or in server-sent events.

An event is written by hand around one JSON-quoted text: there is one for every token of every stream.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tpworker.outputs import RequestOutput, TokenLogprobs
from tpworker.server import request_ids
from tpworker.server.errors import ApiError
from tpworker.server.logprobs import LogprobWriter
from tpworker.server.telling import Choice, Telling, encode, quote, usage

if TYPE_CHECKING:
    from tpworker.text.tokenizer import Tokenizer

DONE = "data: [DONE]\n\n"
GOES_ON = '"finish_reason": null'


class Format:
    """How one endpoint writes one answer. See completion_format.py, chat_format.py and responses.py."""

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
        self.request_id = f"{self._prefix}-{request_ids.unique.get() or uuid.uuid4().hex}"
        self.telling = telling
        self._prompts = prompts
        self._model = model
        self._created = int(time.time())
        self._head = f"data: {json.dumps(self._envelope(self._chunk_object))[:-1]}, "
        self._tail = ', "usage": null}\n\n' if telling.usage else "}\n\n"
        self._is_plain = not (self.tells_tokens or telling.continuous_usage)
        self._frames: dict[int, tuple[str, str]] = {}  # by choice, see `_frame`

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

    def choice(self, keeps_tokens: bool) -> Choice:
        """What comes of a choice, before anything has."""
        return Choice(keeps_tokens)

    def opening(self, index: int, choices: Sequence[Choice]) -> str:
        """The event before a choice's first text."""
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[TokenLogprobs], choice: Choice) -> dict[str, Any]:
        """`logprobs` of a choice in an event, or of the whole one."""
        raise NotImplementedError

    def _written(self, text: str) -> str:
        """Some new text as fields of a choice in a chunk."""
        raise NotImplementedError

    def _whole(self, text: str, choice: Choice) -> dict[str, Any]:
        """All the text as fields of a choice, and why it ended."""
        raise NotImplementedError

    def event(self, index: int, output: RequestOutput, choices: Sequence[Choice]) -> str:
        """The event for what is new of a choice; '' where there is nothing that it tells."""
        if self._is_plain and output.finish_reason is None:
            if not output.text:
                return ""
            head, tail = self._frames.get(index) or self._frame(index, choices)
            return f"{head}{quote(output.text)}{tail}"
        if not (output.text or output.finish_reason or (self.tells_tokens and output.token_ids)):
            return ""
        rest = self._rest(output, output.finish_reason)
        logprobs = self._event_logprobs(output, choices[index])
        return self._event(index, self._written(output.text), rest, choices, logprobs=logprobs)

    def _frame(self, index: int, choices: Sequence[Choice]) -> tuple[str, str]:
        """What is around the text in an event of text alone: the same in each of a choice."""
        event = self._event(index, self._written("text"), GOES_ON, choices)
        head, _, tail = event.rpartition(quote("text"))
        self._frames[index] = head, tail
        return head, tail

    def _rest(self, output: RequestOutput, finish_reason: str | None) -> str:
        """Fields of a choice in a chunk, besides its text and its logprobs."""
        rest = GOES_ON
        if finish_reason is not None:
            stop_reason = json.dumps(output.stop_reason)
            rest = f'"finish_reason": "{finish_reason}", "stop_reason": {stop_reason}'
        return f'{rest}, "token_ids": {json.dumps(output.token_ids)}' if self.telling.token_ids else rest

    def _event_logprobs(self, output: RequestOutput, choice: Choice) -> str:
        if self.telling.logprobs is None:
            return "null"
        return quote(self._logprobs(output.logprobs or (), choice))

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
                **self._whole(texts[index], choices[index]),
                "logprobs": self._all_logprobs(index, choices[index]),
                "stop_reason": choices[index].stop_reason,
                **self._told_of(index, choices),
            }
            for place, index in enumerate(self._shown(choices))
        ]
        return encode(
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
