"""What look-ups would have drafted of outputs that are known: any number of drafts, any lengths of n-grams.

Outputs are the same with drafts as without, so one output tells of all settings. What is looked up here is
what model/ngram.py defines, by a table of all n-grams so far instead of a search in each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class LookUp(NamedTuple):
    """Lengths of n-grams that are looked up, tokens."""

    longest: int
    shortest: int

    def __str__(self) -> str:
        return f"{self.longest}/{self.shortest}"


@dataclass(slots=True)
class Tally:
    """What came of drafts: of requests, or of kinds of them, together."""

    tokens: int = 0
    """Without each request's first, which its prompt's step gives."""
    steps: int = 0
    """That gave them, of each request."""
    drafted: int = 0
    """Of these, how many had drafts."""
    drafts: Counter[int] = field(default_factory=Counter)
    """By position, how many there were."""
    accepted: Counter[int] = field(default_factory=Counter)
    """And how many of them were right, all before them too."""

    def __iadd__(self, other: Tally) -> Tally:
        self.tokens += other.tokens
        self.steps += other.steps
        self.drafted += other.drafted
        self.drafts += other.drafts
        self.accepted += other.accepted
        return self

    @property
    def tokens_a_step(self) -> float:
        """The accepted length."""
        return self.tokens / max(1, self.steps)

    @property
    def acceptance(self) -> list[float]:
        """By position: how often a draft was right where all before it were."""
        reached = [self.drafts[0], *(self.accepted[place] for place in range(len(self.drafts)))]
        return [self.accepted[place] / max(1, reached[place]) for place in sorted(self.drafts)]

    @property
    def precision(self) -> float:
        """Of all drafts, those that were right."""
        return self.accepted.total() / max(1, self.drafts.total())


class Repeats:
    """A sequence and its n-grams.

    Args:
        look_up: their lengths.
    """

    def __init__(self, look_up: LookUp) -> None:
        self._sizes = range(look_up.longest, look_up.shortest - 1, -1)
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # of those that end before the last token, the last time

    def append(self, token: int) -> None:
        """One more token."""
        last = len(self._tokens) - 1
        for size in self._sizes:
            if 0 < size <= len(self._tokens):
                self._ends[tuple(self._tokens[-size:])] = last
        self._tokens.append(token)

    def drafts(self, num_drafts: int) -> list[int]:
        """Of what comes next; none: the last tokens have not stood before."""
        last = len(self._tokens) - 1
        for size in self._sizes:
            if size <= last and (place := self._ends.get(tuple(self._tokens[-size:]))) is not None:
                period = last - place
                return [self._tokens[place + 1 + index % period] for index in range(num_drafts)]
        return []


def replay(prompt: Sequence[int], output: Sequence[int], look_up: LookUp, num_drafts: int) -> Tally:
    """The steps that an output would have taken, its first token being that of its prompt's step."""
    sequence, tally = Repeats(look_up), Tally()
    for token in (*prompt, *output[:1]):
        sequence.append(token)
    known = 1
    while known < len(output):
        tally.steps += 1
        drafts = sequence.drafts(num_drafts)
        if drafts:
            tally.drafted += 1
            tally.drafts.update(range(num_drafts))
        rest = output[known:]
        num_right = next(
            (place for place, draft in enumerate(drafts) if place >= len(rest) or draft != rest[place]),
            len(drafts),
        )
        count = min(1 + num_right, len(rest))
        tally.tokens += count
        tally.accepted.update(range(count - 1))
        for token in rest[:count]:
            sequence.append(token)
        known += count
    return tally
