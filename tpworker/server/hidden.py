"""Names of special tokens, taken out of a text that comes in pieces.

Where special tokens must be text, because some of them are marks, the others are taken out again. What may be
the beginning of a name is held back until more is known.
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache


class HiddenNames:
    """Which names are taken out.

    Args:
        names: all of them.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """Any of them, the longest first; None: there are none."""
        longest_first = sorted(filter(None, self._names), key=lambda name: (-len(name), name))
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def beginnings(self) -> frozenset[str]:
        """What any of them begins with, itself not included."""
        return frozenset(name[:length] for name in self._names for length in range(1, len(name)))

    @cached_property
    def longest(self) -> int:
        """Characters of the longest beginning."""
        return max(map(len, self.beginnings), default=0)


@lru_cache(maxsize=16)
def hidden_names(names: frozenset[str]) -> HiddenNames:
    """Made once of the same names."""
    return HiddenNames(names)


class Hiding:
    """The text of one output, in pieces, without some names. Of two that begin alike the shorter one is taken
    for a name where the text is cut behind it.

    Args:
        names: which.
    """

    def __init__(self, names: HiddenNames) -> None:
        self._names = names
        self._held = ""

    def feed(self, text: str) -> str:
        """What is known of it to be none of the names, and no beginning of one."""
        names = self._names
        if names.pattern is None:
            return text
        *others, last = names.pattern.split(self._held + text)  # what a name was between makes none together
        self._held = ""
        for length in range(min(names.longest, len(last)), 0, -1):
            if last[-length:] in names.beginnings:
                self._held, last = last[-length:], last[:-length]
                break
        return "".join(others) + last

    def finish(self) -> str:
        """What was held back: the text ends here."""
        held, self._held = self._held, ""
        return held
