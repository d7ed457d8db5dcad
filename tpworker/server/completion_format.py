"""What was generated, as /v1/completions writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tpworker.outputs import TokenLogprobs
from tpworker.server.formats import GOES_ON, Format
from tpworker.server.logprobs import Told
from tpworker.server.telling import Choice, quote


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
        rest = GOES_ON
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

    def _whole(self, text: str, choice: Choice) -> dict[str, Any]:
        return {"text": text, "finish_reason": choice.finish_reason}
