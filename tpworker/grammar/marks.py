"""Marks in a grammar's text: what a model writes as one token of its own, or spells in several.

To llguidance a special token matches no text, and an added token that looks like `<this>` is special too,
whatever tokenizer.json says of it. Text that spells the same mark in several tokens is still possible, and
who reads the output's text takes one for the other. So where a mark is a token, rules have both: the text,
and `<[id]>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

ANY_TEXT = "/(?s:.*)/"


def literal(text: str) -> str:
    """A text in Lark's syntax."""
    return json.dumps(text)


class Marks:
    """Writes texts in which tokenizer's added tokens may stand as rules' parts."""

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self._ids = special_ids
        names = sorted(filter(None, special_ids), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None

    def spelled(self, text: str) -> str:
        """What matches a text, whatever of it is a token of its own. For the right side of a rule."""
        before, token, behind = self._split(text)
        if not token:
            return literal(text) if text else ""
        parts = (
            literal(before) if before else "",
            f"({literal(token)} | {self._token(token)})",
            self.spelled(behind),
        )
        return " ".join(filter(None, parts))

    def up_to(self, name: str, mark: str) -> str:
        """Rules, the first of them `name`, for any text up to the first mark, the mark included. The names of
        all of them begin with `name`, which is in lower case."""
        before, token, behind = self._split(mark)
        rules = f"{name}_text[lazy]: {name.upper()}_ANY {literal(mark)}\n{name.upper()}_ANY: {ANY_TEXT}\n"
        if not token:
            return f"{name}: {name}_text\n{rules}"
        before = f"{name.upper()}_ANY {literal(before)}" if before else f"{name.upper()}_ANY"
        rules += f"{name.upper()}_BEFORE: {before}\n"
        token_way = f"{name.upper()}_BEFORE {self._token(token)} {self.spelled(behind)}".rstrip()
        return f"{name}: {name}_text | {token_way}\n{rules}"

    def _split(self, text: str) -> tuple[str, str, str]:
        found = self._names.search(text) if self._names else None
        return (text[: found.start()], found[0], text[found.end() :]) if found else (text, "", "")

    def _token(self, name: str) -> str:
        return f"<[{self._ids[name]}]>"
