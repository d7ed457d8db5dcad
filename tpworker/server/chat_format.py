"""What was generated, as /v1/chat/completions writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tpworker.outputs import TokenLogprobs
from tpworker.server.formats import Format
from tpworker.server.telling import Choice, quote


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
