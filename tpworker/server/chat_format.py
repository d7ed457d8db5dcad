"""What was generated, as /v1/chat/completions writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tpworker.outputs import RequestOutput, TokenLogprobs
from tpworker.parsing import CallArguments, CallBegan, Content, Event, Reasoning
from tpworker.server.formats import GOES_ON, Format
from tpworker.server.speech import ReadChoice, Reader, Speech, said_in
from tpworker.server.telling import Choice, quote


class ChatFormat(Format):
    """/v1/chat/completions."""

    _prefix = "chatcmpl"
    _object = "chat.completion"
    _chunk_object = "chat.completion.chunk"

    def opening(self, index: int, choices: Sequence[Choice]) -> str:
        delta = '"delta": {"role": "assistant", "content": ""}'
        ids = f', "prompt_token_ids": {json.dumps(self._prompts[0])}' if self.telling.token_ids else ""
        return self._event(index, delta, GOES_ON, choices, ids)

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

    def _whole(self, text: str, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "finish_reason": choice.finish_reason}


class SpokenFormat(ChatFormat):
    """The same, of outputs that are read: with what was thought, and what was called."""

    def __init__(self, *arguments: Any, speech: Speech) -> None:
        """
        Args:
            arguments: as of any format.
            speech: how outputs are read.
        """
        super().__init__(*arguments)
        self._speech = speech

    def choice(self, keeps_tokens: bool) -> ReadChoice:
        return ReadChoice(keeps_tokens, reader=Reader(self._speech), end_id=self._speech.end_id)

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        counts = super().usage(choices)
        if self._speech.thinking is not None and self._speech.end_id is not None:
            thought = sum(choice.num_thought for choice in choices if isinstance(choice, ReadChoice))
            counts["completion_tokens_details"] = {"reasoning_tokens": thought}
        return counts

    def event(self, index: int, output: RequestOutput, choices: Sequence[Choice]) -> str:
        """One for each thing that is said; the last of them tells the tokens, and the end."""
        choice = choices[index]
        assert isinstance(choice, ReadChoice)
        is_last = output.finish_reason is not None
        said = choice.reader.feed(output.text) if output.text else []
        if is_last:
            said += choice.reader.finish()
        deltas = [_delta(event, choice.reader) for event in said]
        if not deltas:
            if not is_last and not (self.tells_tokens and output.token_ids):
                return ""
            deltas = ["{}"]
        *others, last = deltas
        rest = self._rest(output, _finish_reason(choice))
        logprobs = self._event_logprobs(output, choice)
        return "".join(
            self._event(index, f'"delta": {delta}', GOES_ON, choices) for delta in others
        ) + self._event(index, f'"delta": {last}', rest, choices, logprobs=logprobs)

    def _whole(self, text: str, choice: Choice) -> dict[str, Any]:
        assert isinstance(choice, ReadChoice)
        said = said_in(choice.reader, text)
        has_more = bool(said.calls or said.reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if has_more and not said.content.strip() else said.content,
            "refusal": None,
        }
        if said.reasoning:  # clients read it by either name
            message |= {"reasoning_content": said.reasoning, "reasoning": said.reasoning}
        if said.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in said.calls
            ]
        return {"message": message, "finish_reason": _finish_reason(choice)}


def _finish_reason(choice: ReadChoice) -> str | None:
    """A call is a reason to stop."""
    has_called = choice.finish_reason == "stop" and choice.reader.call_ids
    return "tool_calls" if has_called else choice.finish_reason


def _delta(event: Event, reader: Reader) -> str:
    """What is said, as the delta of a chunk."""
    match event:
        case Content():
            return f'{{"content": {quote(event.text)}}}'
        case Reasoning():
            quoted = quote(event.text)
            return f'{{"reasoning_content": {quoted}, "reasoning": {quoted}}}'
        case CallBegan(index, name):
            function = f'{{"name": {quote(name)}, "arguments": ""}}'
            known = f'"index": {index}, "id": "{reader.call_ids[index]}", "type": "function"'
            call = f'{{{known}, "function": {function}}}'
        case CallArguments(index, text):
            call = f'{{"index": {index}, "function": {{"arguments": {quote(text)}}}}}'
    return f'{{"tool_calls": [{call}]}}'
