"""What was generated, as the endpoints write it: whole, or in server-sent events.

An event is written by hand around one JSON-quoted text: there is one for every token of every stream.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tpworker.outputs import RequestOutput
from tpworker.server.errors import ApiError

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


@dataclass
class Choice:
    """One prompt's output, so far."""

    keeps_ids: bool = False
    token_ids: list[int] = field(default_factory=list)
    """All of them, if they are to be kept."""
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
        if self.keeps_ids:
            self.token_ids += output.token_ids


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """The token counts of a request, all its choices together."""
    prompt = sum(choice.num_prompt_tokens for choice in choices)
    output = sum(choice.num_output_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in choices)},
    }


class Format:
    """How one endpoint writes one answer. Use `CompletionFormat` or `ChatFormat`."""

    _prefix: ClassVar[str]
    _object: ClassVar[str]
    _chunk_object: ClassVar[str]

    def __init__(self, model: str, telling: Telling, prompts: Sequence[Sequence[int]] = ()) -> None:
        """
        Args:
            model: the name to be told.
            telling: what else.
            prompts: their token ids, one for each choice; not needed unless they are told.
        """
        self.request_id = f"{self._prefix}-{uuid.uuid4().hex}"
        self.telling = telling
        self._prompts = prompts
        self._model = model
        self._created = int(time.time())
        self._head = f"data: {json.dumps(self._envelope(self._chunk_object))[:-1]}, "
        self._tail = ', "usage": null}\n\n' if telling.usage else "}\n\n"

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self._created, "model": self._model}

    def opening(self, index: int, choices: Sequence[Choice]) -> str:
        """The event before a choice's first text."""
        raise NotImplementedError

    def _written(self, text: str) -> str:
        """Some new text as fields of a choice in a chunk."""
        raise NotImplementedError

    def _whole(self, text: str) -> dict[str, Any]:
        """All the text as fields of a choice."""
        raise NotImplementedError

    def event(self, index: int, output: RequestOutput, choices: Sequence[Choice]) -> str:
        """The event for what is new of a choice; '' where there is nothing that it tells."""
        if not (output.text or output.finish_reason or (self.telling.token_ids and output.token_ids)):
            return ""
        rest = '"finish_reason": null'
        if output.finish_reason is not None:
            stop_reason = json.dumps(output.stop_reason)
            rest = f'"finish_reason": "{output.finish_reason}", "stop_reason": {stop_reason}'
        if self.telling.token_ids:
            rest += f', "token_ids": {json.dumps(output.token_ids)}'
        return self._event(index, self._written(output.text), rest, choices)

    def _event(
        self, index: int, content: str, rest: str, choices: Sequence[Choice], outside: str = ""
    ) -> str:
        """
        Args:
            content, rest: fields of the choice.
            outside: fields of the event besides it.
        """
        tail = self._tail
        if self.telling.continuous_usage:
            tail = f', "usage": {json.dumps(usage(choices))}}}\n\n'
        choice = f'{{"index": {index}, {content}, "logprobs": null, {rest}}}'
        return f'{self._head}"choices": [{choice}]{outside}{tail}'

    def closing(self, choices: Sequence[Choice]) -> str:
        """What ends a stream: the token counts, if they were asked for, and a mark."""
        if not self.telling.usage:
            return DONE
        return f'{self._head}"choices": [], "usage": {json.dumps(usage(choices))}}}\n\n{DONE}'

    def failing(self, error: ApiError) -> str:
        """What ends a stream in place of that, when something has failed."""
        return f"data: {error.as_json()}\n\n"

    def body(self, texts: Sequence[str], choices: Sequence[Choice]) -> str:
        """The whole answer."""
        written = [
            {
                "index": index,
                **self._whole(text),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                **self._ids_of(index, choice),
            }
            for index, (text, choice) in enumerate(zip(texts, choices, strict=True))
        ]
        return _encode(
            {
                **self._envelope(self._object),
                "choices": written,
                "usage": usage(choices),
                **self._ids_outside(),
            }
        )

    def _ids_of(self, index: int, choice: Choice) -> dict[str, Any]:
        """What a choice tells of token ids."""
        return {"token_ids": choice.token_ids} if self.telling.token_ids else {}

    def _ids_outside(self) -> dict[str, Any]:
        """What the whole answer tells of them."""
        return {}


class CompletionFormat(Format):
    """/v1/completions."""

    _prefix = "cmpl"
    _object = _chunk_object = "text_completion"

    def opening(self, index: int, choices: Sequence[Choice]) -> str:
        if not self.telling.token_ids:
            return ""
        rest = f'"finish_reason": null, "prompt_token_ids": {json.dumps(self._prompts[index])}'
        return self._event(index, self._written(""), rest + ', "token_ids": []', choices)

    def _ids_of(self, index: int, choice: Choice) -> dict[str, Any]:
        ids = super()._ids_of(index, choice)
        return ids and {"prompt_token_ids": list(self._prompts[index]), **ids}

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

    def _ids_outside(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self._prompts[0])} if self.telling.token_ids else {}

    def _written(self, text: str) -> str:
        return f'"delta": {{"content": {quote(text)}}}' if text else '"delta": {}'

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}
