"""Ids of calls, by which results are told apart: as OpenAI's API has them, or as a template wants them."""

from __future__ import annotations

import hashlib
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

_LETTERS = string.ascii_letters + string.digits
_LENGTH = 24


def new_call_id(length: int | None = None) -> str:
    """One that no other call has.

    Args:
        length: letters and digits, all of it; None: as OpenAI's API has them.
    """
    before, length = ("call_", _LENGTH) if length is None else ("", length)
    return before + "".join(secrets.choice(_LETTERS) for _ in range(length))


def with_ids_of(length: int, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages, as templates know them, whose calls have ids of so many letters and digits.

    One id becomes the same each time: results still have their calls, and conversations their prefixes.
    """
    shortened: list[Mapping[str, Any]] = []
    for message in messages:
        changed = dict(message)
        if "tool_call_id" in message:
            changed["tool_call_id"] = _shortened(message["tool_call_id"], length)
        if "tool_calls" in message:
            changed["tool_calls"] = [
                {**call, "id": _shortened(call["id"], length)} if "id" in call else call
                for call in message["tool_calls"]
            ]
        shortened.append(changed)
    return shortened


def _shortened(call_id: str, length: int) -> str:
    if len(call_id) == length and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:length]
