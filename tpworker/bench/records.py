"""What is known of each request when it has ended."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times are those of time.monotonic(), in seconds."""

    due: float
    """When it was to be sent."""
    sent: float = 0.0
    first: float | None = None
    """When the first of its output came."""
    last: float | None = None
    """When the last of it did."""
    ended: float = 0.0
    num_prompt: int = 0
    """Tokens, as the server counts them; as the two that follow."""
    num_cached: int = 0
    num_output: int = 0
    num_wanted: int = 0
    """Tokens of output that were asked for, at most."""
    intervals: list[float] = field(default_factory=list)
    """Seconds between two pieces of output; a piece may hold several tokens."""
    error: str | None = None
    """Of what kind, if it failed."""
    is_counted: bool = True
    """Whether the server has told how many tokens there were; else they are as many as pieces came."""

    @property
    def ttft(self) -> float | None:
        """Time to the first token, from when it was sent."""
        return None if self.first is None else self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token, of those behind the first; None: there are none."""
        if self.first is None or self.last is None or self.num_output < 2:
            return None
        return (self.last - self.first) / (self.num_output - 1)

    @property
    def e2e(self) -> float:
        """From sending to the end of the answer."""
        return self.ended - self.sent

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """What `to_json` has made."""
        return cls(**data)
