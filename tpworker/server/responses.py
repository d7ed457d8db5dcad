"""What was generated, as /v1/responses writes it: items, whole or in events with names and numbers.

created  in_progress                                             before anything
output_item.added  content_part.added                            before the first text of an item
output_text.delta …   or reasoning_text.delta …                  for each text
output_text.done  content_part.done  output_item.done            at its end
output_item.added  function_call_arguments.delta …  .done        for each call
completed, or incomplete                                         with the whole answer
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpworker.outputs import RequestOutput
from tpworker.parsing import CallArguments, CallBegan, Content, Event, Reasoning
from tpworker.server.errors import ApiError
from tpworker.server.formats import Format
from tpworker.server.items import Item
from tpworker.server.speech import PLAIN, ReadChoice, Reader, Speech
from tpworker.server.telling import Choice, Telling, quote


class ResponsesFormat(Format):
    """/v1/responses."""

    _prefix = "resp"
    _object = _chunk_object = "response"

    def __init__(self, model: str, asked: Mapping[str, Any], speech: Speech = PLAIN) -> None:
        """
        Args:
            model: the name to be told.
            asked: of the request, what the answer repeats.
            speech: how the output is read.
        """
        super().__init__(model, Telling())
        self._asked = asked
        self._speech = speech
        self._items: list[Item] = []
        self._num_events = 0

    def choice(self, keeps_tokens: bool) -> Choice:
        if self._speech.is_plain:
            return Choice(keeps_tokens)
        return ReadChoice(keeps_tokens, reader=Reader(self._speech), end_id=self._speech.end_id)

    def opening(self, index: int, choices: Sequence[Choice]) -> str:
        begun = self._response("in_progress", [])
        return self._named("response.created", {"response": begun}) + self._named(
            "response.in_progress", {"response": begun}
        )

    def event(self, index: int, output: RequestOutput, choices: Sequence[Choice]) -> str:
        choice = choices[index]
        events = self._told(choice, output.text)
        is_last = output.finish_reason is not None
        if is_last and isinstance(choice, ReadChoice):
            events += [self._tell(one, choice.reader) for one in choice.reader.finish()]
        if is_last:
            events.append(self._end(choice))
        return "".join(events)

    def _told(self, choice: Choice, text: str) -> list[str]:
        """The events for more text."""
        if not text:
            return []
        if isinstance(choice, ReadChoice):
            return [self._tell(one, choice.reader) for one in choice.reader.feed(text)]
        return [self._said(Item.message, "message", text)]

    def _tell(self, event: Event, reader: Reader) -> str:
        """The events for one thing that is said."""
        match event:
            case Content():
                return self._said(Item.message, "message", event.text)
            case Reasoning():
                return self._said(Item.reasoning, "reasoning", event.text)
            case CallBegan():
                return self._begin(Item.call(event.name, reader.call_ids[event.index]))
            case CallArguments():
                return self._delta(self._items[-1], event.text)

    def _said(self, make: Callable[[], Item], kind: str, text: str) -> str:
        """More text of a kind: of the last item, or of one that begins with it.

        Args:
            make: makes one.
        """
        begun = "" if self._items and self._items[-1].kind == kind else self._begin(make())
        return begun + self._delta(self._items[-1], text)

    def _begin(self, item: Item) -> str:
        """The events with which an item begins, behind those with which the one before it ends."""
        ended = self._done("completed") if self._items else ""
        self._items.append(item)
        place = len(self._items) - 1
        begun = {"output_index": place, "item": item.written("in_progress")}
        events = ended + self._named("response.output_item.added", begun)
        if item.part is not None:
            part = item.written_part("")
            events += self._named("response.content_part.added", {**self._place(item), "part": part})
        return events

    def _delta(self, item: Item, text: str) -> str:
        """Written by hand around the text: there is one for every token."""
        item.texts.append(text)
        kind = f"response.{item.delta}.delta"
        number, self._num_events = self._num_events, self._num_events + 1
        return (
            f'event: {kind}\ndata: {{"type": "{kind}", "sequence_number": {number}, '
            f'"item_id": "{item.id}", "output_index": {len(self._items) - 1}, '
            f'{item.delta_place}"delta": {quote(text)}{item.delta_rest}}}\n\n'
        )

    def _done(self, status: str) -> str:
        """The events with which the last item ends."""
        item = self._items[-1]
        item.status = status
        place = self._place(item)
        if item.part is None:
            told = {**place, "name": item.name, "arguments": item.text}
            events = self._named("response.function_call_arguments.done", told)
        else:
            more: dict[str, Any] = {"logprobs": []} if item.kind == "message" else {}
            events = self._named(f"response.{item.delta}.done", {**place, "text": item.text, **more})
            part = item.written_part(item.text)
            events += self._named("response.content_part.done", {**place, "part": part})
        done = {"output_index": place["output_index"], "item": item.written(status)}
        return events + self._named("response.output_item.done", done)

    def _end(self, choice: Choice) -> str:
        """The events with which the last item ends; an output without any is a message without text."""
        begun = "" if self._items else self._begin(Item.message())
        return begun + self._done(_status(choice))

    def closing(self, choices: Sequence[Choice]) -> str:
        whole = self._whole_response(choices[0])
        return self._named(f"response.{whole['status']}", {"response": whole})

    def failing(self, error: ApiError) -> str:
        detail = json.loads(error.as_json())["error"]
        return self._named("error", {name: detail[name] for name in ("code", "message", "param")})

    def body(self, texts: Sequence[str], choices: Sequence[Choice]) -> str:
        choice = choices[0]
        self._told(choice, texts[0])
        if isinstance(choice, ReadChoice):
            for one in choice.reader.finish():
                self._tell(one, choice.reader)
        self._end(choice)
        return quote(self._whole_response(choice))

    def _whole_response(self, choice: Choice) -> dict[str, Any]:
        return self._response(_status(choice), [item.written(item.status) for item in self._items], choice)

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

    def _place(self, item: Item) -> dict[str, Any]:
        place = {"item_id": item.id, "output_index": len(self._items) - 1}
        return place if item.part is None else {**place, "content_index": 0}

    def _named(self, kind: str, fields: Mapping[str, Any]) -> str:
        """An event, with its name and its number."""
        number, self._num_events = self._num_events, self._num_events + 1
        return f"event: {kind}\ndata: {quote({'type': kind, 'sequence_number': number, **fields})}\n\n"


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


def _usage(choice: Choice) -> dict[str, Any]:
    return {
        "input_tokens": choice.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": choice.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": choice.num_output_tokens,
        "output_tokens_details": {
            "reasoning_tokens": choice.num_thought if isinstance(choice, ReadChoice) else 0
        },
        "total_tokens": choice.num_prompt_tokens + choice.num_output_tokens,
    }
