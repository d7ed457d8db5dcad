"""As much of PromQL as it takes to say which metrics and labels an expression asks for."""

from __future__ import annotations

import re
from typing import NamedTuple

_STRING = r'"(?:[^"\\]|\\.)*"'
_MATCHERS = re.compile(rf"\{{((?:[^{{}}\"]|{_STRING})*)\}}")
_MATCHER = re.compile(rf"(\w+)\s*(=~|!~|!=|=)\s*({_STRING})")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_NAME = re.compile(r"[a-zA-Z_:][\w:]*")
_WORDS = frozenset({"and", "or", "unless", "by", "without", "on", "ignoring", "bool", "offset"})


class Asked(NamedTuple):
    """What an expression asks for."""

    selectors: list[tuple[str, list[tuple[str, str, str]]]]
    """Names of metrics, each with its matchers: label, operator, value."""
    labels: set[str]
    """By which it groups or joins."""


def asked(expression: str) -> Asked:
    """Raises AssertionError where it is not understood."""
    labels = {
        label.strip()
        for group in _GROUPING.findall(_MATCHERS.sub("", expression))
        for label in group.split(",")
        if label.strip()
    }
    rest = _GROUPING.sub(" ", expression)
    rest = re.sub(r"\[[^\]]*\]", " ", rest)  # ranges
    selectors = []
    place = 0
    while name := _NAME.search(rest, place):
        place = name.end()
        behind = rest[place:].lstrip()
        if (
            behind.startswith("(")
            or name.group() in _WORDS
            or rest[name.start() - 1 : name.start()].isdigit()
        ):
            continue  # a function, a word of the language, the e of 1e9
        matchers: list[tuple[str, str, str]] = []
        if braces := _MATCHERS.match(rest, place):
            place = braces.end()
            found = _MATCHER.findall(braces.group(1))
            assert not _MATCHER.sub("", braces.group(1)).strip(" ,\n"), f"not understood: {braces.group()}"
            matchers = [(label, operator, value[1:-1]) for label, operator, value in found]
        selectors.append((name.group(), matchers))
    assert selectors, expression
    return Asked(selectors, labels)
