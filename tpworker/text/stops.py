"""Stop strings in a text that comes in parts (Knuth, Morris and Pratt 1977).

A text is a row of symbols: characters, which are shown, and special tokens, which are not. A stop string that
names a special token has two forms: its characters, as a model may spell them, and the token itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate


class _Pattern:
    """A form of a stop string, and how much of it the text ends with."""

    __slots__ = ("borders", "ids", "matched", "num_shown", "stop", "symbols")

    def __init__(self, stop: str, symbols: Sequence[str | int]) -> None:
        self.stop = stop
        self.symbols = symbols
        self.ids = frozenset(symbol for symbol in symbols if isinstance(symbol, int))
        self.num_shown = [0, *accumulate(int(isinstance(symbol, str)) for symbol in symbols)]
        """Of each prefix: how many of its symbols are characters."""
        self.borders = _borders(symbols)
        self.matched = 0


class StopStrings:
    """Finds the one that is complete first, and of several the longest.

    Args:
        stops: none of them empty.
        special: the ids of special tokens, by their names.
        is_included: whether what is shown ends with the characters of the stop string, or before them.
    """

    def __init__(self, stops: Sequence[str], special: Mapping[str, int], is_included: bool = False) -> None:
        self._is_included = is_included
        self._patterns = [_Pattern(stop, stop) for stop in stops]
        self._patterns += [
            _Pattern(stop, symbols) for stop in stops if (symbols := _with_ids(stop, special)) is not None
        ]
        self.ids = frozenset().union(*(pattern.ids for pattern in self._patterns))
        """The special tokens that `feed_special` wants to know of."""
        self._first = frozenset(pattern.symbols[0] for pattern in self._patterns)
        self._is_matching = False
        self.held = ""
        """The characters at the text's end that may belong to a stop string."""

    def feed(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """Returns the text that can be shown now, and the stop string that was found, if one was.

        Args:
            may_stop: whether one that ends in this part of the text counts.
        """
        if not self._is_matching and self._first.isdisjoint(text):
            return text, None
        whole = self.held + text
        for position, char in enumerate(text, start=len(self.held) + 1):
            found = self._advance(char, may_stop)
            if found is not None:
                return whole[: position if self._is_included else position - found.num_shown[-1]], found.stop
        return self._shown_of(whole), None

    def feed_special(
        self, token_id: int, finish: Callable[[], str], may_stop: bool = True
    ) -> tuple[str, str | None]:
        """As `feed`, of a special token, one of `ids`; `finish` gives the text that waits before it."""
        found = self._advance(token_id, may_stop)
        if found is None:
            return self._shown_of(self.held), None
        num_found = found.num_shown[-1]
        num_cut = 0 if self._is_included else num_found
        return self.held[: len(self.held) - num_cut] + ("" if num_found else finish()), found.stop

    def _advance(self, symbol: str | int, may_stop: bool) -> _Pattern | None:
        found: _Pattern | None = None
        for pattern in self._patterns:
            if isinstance(symbol, int) and symbol not in pattern.ids:
                continue  # no text, for this one
            symbols, borders, matched = pattern.symbols, pattern.borders, pattern.matched
            while matched and symbols[matched] != symbol:
                matched = borders[matched]
            if symbols[matched] == symbol:
                matched += 1
                if matched == len(symbols):
                    matched = borders[matched]
                    if may_stop and (found is None or len(pattern.stop) > len(found.stop)):
                        found = pattern
            pattern.matched = matched
        return found

    def _shown_of(self, whole: str) -> str:
        """What of a text can be shown; the rest is held."""
        self._is_matching = any(pattern.matched for pattern in self._patterns)
        num_shown = len(whole) - max(pattern.num_shown[pattern.matched] for pattern in self._patterns)
        self.held = whole[num_shown:]
        return whole[:num_shown]


def _with_ids(stop: str, special: Mapping[str, int]) -> list[str | int] | None:
    """The symbols of a stop string with special tokens in it; None if there is none."""
    names = sorted((name for name in special if name and name in stop), key=len, reverse=True)
    if not names:
        return None
    symbols: list[str | int] = []
    for part in re.split(f"({'|'.join(map(re.escape, names))})", stop):
        symbols += [special[part]] if part in special else part
    return symbols


def _borders(pattern: Sequence[str | int]) -> list[int]:
    """Of each prefix of the pattern the longest proper prefix that it also ends with: [length of prefix]."""
    borders = [0, 0]
    border = 0
    for symbol in pattern[1:]:
        while border and pattern[border] != symbol:
            border = borders[border]
        if pattern[border] == symbol:
            border += 1
        borders.append(border)
    return borders
