"""How long prompts and outputs are: a number, a range, or a number and how much it varies."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tpworker.errors import ConfigError, shown

_MOST = 10_000_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, each length from `low` to `high` as likely as another."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str, least: int = 1) -> Lengths:
        """As `1024`, `512-2048` or `1024~10%`.

        Raises:
            ConfigError: it is none of these, or out of range.
        """
        if match := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})|~(\d{1,3})%)?", text):
            first = int(match[1])
            spread = first * int(match[3] or 0) // 100
            low, high = (first, int(match[2])) if match[2] else (first - spread, first + spread)
            if least <= low <= high <= _MOST:
                return cls(low, high)
        raise ConfigError(
            f"{option} {shown(text)}: must be tokens, as 1024, 512-2048 or 1024~10%, from {least} to {_MOST}"
        )

    def draw(self, source: random.Random) -> int:
        """One of them."""
        return source.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"
