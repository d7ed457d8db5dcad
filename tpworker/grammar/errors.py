"""What is wrong with a grammar, in words for who wrote it."""

from __future__ import annotations

import re

LONGEST = 600  # characters of a message


class GrammarError(Exception):
    """A grammar cannot be compiled, or goes beyond its bounds. The message says what is wrong, and where."""


def cleaned(text: str) -> str:
    """What llguidance says of a grammar, without what is for its developers: state, grammar, backtrace."""
    for begin in ("\n<state>", "<state>", "\n\nStack backtrace", "\nStack backtrace", "stack backtrace:"):
        text = text.partition(begin)[0]
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    text = " ".join(line for line in lines if line)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
