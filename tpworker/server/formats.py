"""What was generated, as the two endpoints write it: whole, or in server-sent events.

An event is written by hand around one JSON-quoted text: there is one for every token of every stream.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any, ClassVar

from tpworker.outputs import RequestOutput

DONE = "data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=False).encode


def quote(text: str) -> str:
    """The text as JSON. Escapes also what clients that read line by line may take for the end of one."""
    quoted = _encode(text)
    if quoted.isascii():
        return quoted
    return quoted.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@dataclass
class Choice:
    """One prompt's output, so far."""

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


def usage(choices: list[Choice]) -> dict[str, Any]:
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

    def __init__(self, model: str, include_usage: bool) -> None:
        """
        Args:
            model: the name to be told.
            include_usage: whether a stream ends with the token counts.
        """
        self.request_id = f"{self._prefix}-{uuid.uuid4().hex}"
        self.include_usage = include_usage
        self._model = model
        self._created = int(time.time())
        self._head = f"data: {json.dumps(self._envelope(self._chunk_object))[:-1]}, "
        self._tail = ', "usage": null}\n\n' if include_usage else "}\n\n"

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self._created, "model": self._model}

    def opening(self, index: int) -> str:
        """The event before a choice's first text."""
        raise NotImplementedError

    def _written(self, text: str) -> str:
        """Some new text as fields of a choice in a chunk."""
        raise NotImplementedError

    def _whole(self, text: str) -> dict[str, Any]:
        """All the text as fields of a choice."""
        raise NotImplementedError

    def event(self, index: int, text: str, choice: Choice) -> str:
        """The event for some new text, or for the end."""
        reasons = '"finish_reason": null'
        if choice.finish_reason is not None:
            reasons = (
                f'"finish_reason": "{choice.finish_reason}", "stop_reason": {json.dumps(choice.stop_reason)}'
            )
        return self._event(index, self._written(text), reasons)

    def _event(self, index: int, content: str, reasons: str) -> str:
        choice = f'{{"index": {index}, {content}, "logprobs": null, {reasons}}}'
        return f'{self._head}"choices": [{choice}]{self._tail}'

    def usage_event(self, choices: list[Choice]) -> str:
        """The event after the last one, if it was asked for."""
        return f'{self._head}"choices": [], "usage": {json.dumps(usage(choices))}}}\n\n'

    def body(self, texts: list[str], choices: list[Choice]) -> str:
        """The whole answer."""
        written = [
            {
                "index": index,
                **self._whole(text),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, (text, choice) in enumerate(zip(texts, choices, strict=True))
        ]
        return _encode({**self._envelope(self._object), "choices": written, "usage": usage(choices)})


class CompletionFormat(Format):
    """/v1/completions."""

    _prefix = "cmpl"
    _object = _chunk_object = "text_completion"

    def opening(self, index: int) -> str:
        return ""

    def _written(self, text: str) -> str:
        return f'"text": {quote(text)}'

    def _whole(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatFormat(Format):
    """/v1/chat/completions."""

    _prefix = "chatcmpl"
    _object = "chat.completion"
    _chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> str:
        return self._event(index, '"delta": {"role": "assistant", "content": ""}', '"finish_reason": null')

    def _written(self, text: str) -> str:
        return f'"delta": {{"content": {quote(text)}}}' if text else '"delta": {}'

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}
