"""Marks in a grammar's text: what a model writes as one token of its own, or spells in several.

To llguidance a special token matches no text, and an added token that looks like `<this>` is special too,
whatever tokenizer.json says of it. Text that spells the same mark in several tokens is still possible, and
who reads the output's text takes one for the other. So where a mark is a token,
rules have both: text, and `<[id]>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

TEXT = "/(?s:.*)/"


def added_tokens(tokenizer_json: str) -> dict[str, int]:
    """The ids of a tokenizer's added tokens, special or not, by their names.

    Args:
        tokenizer_json: the text of a tokenizer.json.
    """
    return {token["content"]: token["id"] for token in json.loads(tokenizer_json).get("added_tokens", ())}


def literal(text: str) -> str:
    """A text in Lark's syntax."""
    return json.dumps(text)


def mark_rule(name: str, mark: str, special_ids: Mapping[str, int]) -> str:
    """A rule that is the mark."""
    if mark in special_ids:
        return f"{name}: {literal(mark)} | <[{special_ids[mark]}]>\n"
    return f"{name}: {literal(mark)}\n"


def text_up_to_rules(name: str, mark: str, special_ids: Mapping[str, int]) -> str:
    """Rules for any text up to the first mark, which is part of it. What `name` begins is taken."""
    any_text = f"{name.upper()}_ANY"
    lazy = f"{name}_text[lazy]: {any_text} {literal(mark)}\n{any_text}: {TEXT}\n"
    if mark in special_ids:
        token = f"{name}_token: {any_text} <[{special_ids[mark]}]>\n"
        return f"{name}: {name}_text | {name}_token\n{lazy}{token}"
    return f"{name}: {name}_text\n{lazy}"
