"""What an output is held to: a JSON schema, a regular expression, some choices, a grammar.

Part of `SamplingParams`. Validated once, then frozen. How it becomes a grammar: tpworker.grammar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """What the model says before that what is held: as it thinks between two marks.

    Args:
        start, end: the marks, e.g. `<think>` and `</think>`.
        is_open: the prompt ends with the first one, or behind it. Else the output may begin with it, or not.
    """

    start: str
    end: str
    is_open: bool = False


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What an output is held to. Exactly one of the first six is given."""

    json: str | Mapping[str, Any] | None = None
    """A JSON schema."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """All of the output matches it."""
    choice: Sequence[str] = field(default=())
    """The output is one of these."""
    grammar: str | None = None
    """In Lark's syntax, as llguidance has it, or GBNF's."""
    structural_tag: str | Mapping[str, Any] | None = None
    """Text with tagged parts, each held to a schema."""
    behind: Thinking | None = None
    """It is what comes behind the model's thinking that is held to it."""
