"""What was generated, as /v1/responses writes it: one message, whole or in events with names and numbers.

created  in_progress  output_item.added  content_part.added      before the first text
output_text.delta …                                              for each text
output_text.done  content_part.done  output_item.done            at its end
completed, or incomplete                                         with the whole answer
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from tpworker.outputs import RequestOutput
from tpworker.server.errors import ApiError
from tpworker.server.formats import Format
from tpworker.server.telling import Choice, Telling, quote


class ResponsesFormat(Format):
    """/v1/responses."""

    _prefix = "resp"
    _object = _chunk_object = "response"

    def __init__(self, model: str, asked: Mapping[str, Any]) -> None:
        """
        Args:
            model: the name to be told.
            asked: of the request, what the answer repeats.
        """
        super().__init__(model, Telling())
        self._asked = asked
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._texts: list[str] = []
        self._num_events = 0

    def opening(self, index: int, choices: Sequence[Choice]) -> str:
        begun = self._response("in_progress", [])
        return (
            self._named("response.created", {"response": begun})
            + self._named("response.in_progress", {"response": begun})
            + self._named(
                "response.output_item.added", {"output_index": 0, "item": self._item("in_progress", [])}
            )
            + self._named("response.content_part.added", {**self._place(), "part": _part("")})
        )

    def event(self, index: int, output: RequestOutput, choices: Sequence[Choice]) -> str:
        text = ""
        if output.text:
            self._texts.append(output.text)
            text = self._delta(output.text)
        return text if output.finish_reason is None else text + self._done(choices[0])

    def _delta(self, text: str) -> str:
        """Written by hand around the text: there is one for every token."""
        kind = "response.output_text.delta"
        number, self._num_events = self._num_events, self._num_events + 1
        return (
            f'event: {kind}\ndata: {{"type": "{kind}", "sequence_number": {number}, '
            f'"item_id": "{self._item_id}", "output_index": 0, "content_index": 0, '
            f'"delta": {quote(text)}, "logprobs": []}}\n\n'
        )

    def _done(self, choice: Choice) -> str:
        text = "".join(self._texts)
        item = self._item(_status(choice), [_part(text)])
        return (
            self._named("response.output_text.done", {**self._place(), "text": text, "logprobs": []})
            + self._named("response.content_part.done", {**self._place(), "part": _part(text)})
            + self._named("response.output_item.done", {"output_index": 0, "item": item})
        )

    def closing(self, choices: Sequence[Choice]) -> str:
        whole = self._whole_response("".join(self._texts), choices[0])
        return self._named(f"response.{whole['status']}", {"response": whole})

    def failing(self, error: ApiError) -> str:
        detail = json.loads(error.as_json())["error"]
        return self._named("error", {name: detail[name] for name in ("code", "message", "param")})

    def body(self, texts: Sequence[str], choices: Sequence[Choice]) -> str:
        return quote(self._whole_response(texts[0], choices[0]))

    def _whole_response(self, text: str, choice: Choice) -> dict[str, Any]:
        return self._response(_status(choice), [self._item(_status(choice), [_part(text)])], choice)

    def _response(self, status: str, output: list[Any], choice: Choice | None = None) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": None,
            "store": False,  # whatever was asked for
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            **self._asked,
            "usage": None if choice is None else _usage(choice),
        }

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _named(self, kind: str, fields: Mapping[str, Any]) -> str:
        """An event, with its name and its number."""
        number, self._num_events = self._num_events, self._num_events + 1
        return f"event: {kind}\ndata: {quote({'type': kind, 'sequence_number': number, **fields})}\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


def _usage(choice: Choice) -> dict[str, Any]:
    return {
        "input_tokens": choice.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": choice.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": choice.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": choice.num_prompt_tokens + choice.num_output_tokens,
    }
