"""What is found in a model's output, as it comes.

    text, token by token ──► parser ──► Reasoning, Content, CallBegan, CallArguments, …

Texts of one kind belong together, in the order of their events. A call begins once, with its name; what
follows of its index, up to the next call or the end, is its arguments, as text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks, before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """What it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegan:
    """It calls a tool."""

    index: int  # among the calls of this output, from 0
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of a call: JSON, but for what the model got wrong."""

    index: int
    text: str


Event = Reasoning | Content | CallBegan | CallArguments
