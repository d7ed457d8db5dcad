"""A conversation whose last message is to be continued: its text ends where that message's text does.

As transformers has it: the last message gets a mark behind its text, and what is rendered is cut there. A
template that trims messages takes the space behind the mark away; then that before it does not stay either.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tpworker.errors import InvalidRequest


class Continuation:
    """The mark, of one conversation."""

    def __init__(self) -> None:
        self._mark = f"CONTINUE_{secrets.token_hex(8)}"  # that no client can have written

    def marked(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages, with the mark in the last one.

        Raises:
            InvalidRequest: it has no text.
        """
        *others, last = messages
        content = last.get("content")
        if isinstance(content, str) and content:
            return [*others, {**last, "content": f"{content}{self._mark} "}]
        if isinstance(content, Sequence) and content and isinstance(content[-1], Mapping):
            *parts, part = content
            if isinstance(part.get("text"), str):
                return [
                    *others,
                    {**last, "content": [*parts, {**part, "text": f"{part['text']}{self._mark} "}]},
                ]
        raise InvalidRequest("continue_final_message: the last message has no text to continue", "messages")

    def cut(self, text: str) -> str:
        """What was rendered of the marked messages, up to the mark.

        Raises:
            InvalidRequest: the template does not show the message.
        """
        before, mark, behind = text.rpartition(self._mark)
        if not mark:
            raise InvalidRequest(
                "continue_final_message: the model's chat template does not show the last message's text, so "
                "it cannot be continued",
                "messages",
            )
        return before if behind.startswith(" ") else before.rstrip()
