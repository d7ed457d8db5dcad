"""Figures of a level, from the records of its requests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tpworker.bench.load import Level, Measured
from tpworker.bench.records import Record

BUSY, LATE_SECONDS, LATE_SHARE = 0.8, 0.02, 0.5
"""Beyond these the client says that it was the bottleneck, or ran late: of a core that one of its processes
took, of the 99th percentile of the lags of its event loop, and of that as a share of the time between two
tokens."""


def quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of all samples do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    count: int

    @classmethod
    def of(cls, samples: Iterable[float | None]) -> Spread | None:
        """None: there are none."""
        ordered = sorted(one for one in samples if one is not None)
        if not ordered:
            return None
        p50, p90, p99 = (quantile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(sum(ordered) / len(ordered), p50, p90, p99, len(ordered))


@dataclass(frozen=True, slots=True)
class Goals:
    """What a request must keep to count as good. Seconds; None: nothing."""

    ttft: float | None = None
    tpot: float | None = None

    def __bool__(self) -> bool:
        return self.ttft is not None or self.tpot is not None

    def are_met(self, record: Record) -> bool:
        """By one that has not failed."""
        ttft, tpot = record.ttft, record.tpot
        return (self.ttft is None or (ttft is not None and ttft <= self.ttft)) and (
            self.tpot is None or tpot is None or tpot <= self.tpot
        )


@dataclass(frozen=True, slots=True)
class Client:
    """What the client itself took."""

    num_processes: int
    cpu: float
    """Share of a core that its busiest process took."""
    lag_p50: float
    """Seconds by which its event loop was late; as the next, of the process that was worst."""
    lag_p99: float
    late_p99: float
    """Seconds by which requests were sent later than they were due."""

    @classmethod
    def of(cls, measured: Sequence[Measured]) -> Client:
        """Of all its processes."""
        lags = [one.lags or [0.0] for one in measured]
        late = [max(0.0, record.sent - record.due) for one in measured for record in one.records]
        return cls(
            len(measured),
            max(one.cpu_seconds / max(1e-9, one.ended - one.began) for one in measured),
            max(quantile(one, 0.5) for one in lags),
            max(quantile(one, 0.99) for one in lags),
            quantile(late, 0.99) if late else 0.0,
        )

    def trouble(self, tpot: Spread | None) -> str:
        """Why the figures are the client's rather than the server's; '': they are not."""
        if self.cpu > BUSY:
            return (
                f"the client was the bottleneck: one of its processes took {self.cpu:.0%} of a core: more "
                "--processes"
            )
        if self.lag_p99 > LATE_SECONDS or (tpot is not None and self.lag_p99 > LATE_SHARE * tpot.p50):
            return (
                "the client ran late, and its figures with it: its event loop by "
                f"{1e3 * self.lag_p99:.1f} ms (p99) at {self.cpu:.0%} of a core. Something else takes its "
                "processor, perhaps the server"
            )
        return ""


@dataclass(frozen=True, slots=True)
class Summary:
    """Of a level."""

    load: str
    seconds: float
    """From the first request until the last has ended."""
    num_requests: int
    """Those included that failed."""
    errors: dict[str, int]
    """By kind, how many failed."""
    num_prompt: int
    """Tokens; as the two that follow, of requests that did not fail."""
    num_cached: int
    num_output: int
    num_short: int
    """Requests that ended before all tokens had come that were asked for."""
    is_counted: bool
    """Whether the server has told how many tokens there were."""
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    """Between two pieces of output."""
    e2e: Spread | None
    num_good: int | None
    """That met the goals; None: there are none."""
    client: Client

    @classmethod
    def of(cls, level: Level, measured: Sequence[Measured], goals: Goals) -> Summary:
        """Of all processes that had a share of the level."""
        records = [record for one in measured for record in one.records]
        good = [record for record in records if record.error is None]
        began, ended = min(one.began for one in measured), max(one.ended for one in measured)
        return cls(
            load=load_of(level),
            seconds=max(1e-9, ended - began),
            num_requests=len(records),
            errors=dict(Counter(record.error for record in records if record.error is not None)),
            num_prompt=sum(record.num_prompt for record in good),
            num_cached=sum(record.num_cached for record in good),
            num_output=sum(record.num_output for record in good),
            num_short=sum(record.num_output < record.num_wanted for record in good),
            is_counted=all(record.is_counted for record in good),
            ttft=Spread.of(record.ttft for record in good),
            tpot=Spread.of(record.tpot for record in good),
            itl=Spread.of(interval for record in good for interval in record.intervals),
            e2e=Spread.of(record.e2e for record in good),
            num_good=sum(map(goals.are_met, good)) if goals else None,
            client=Client.of(measured),
        )

    @property
    def num_failed(self) -> int:
        """Of the requests."""
        return sum(self.errors.values())

    @property
    def num_done(self) -> int:
        """The others."""
        return self.num_requests - self.num_failed

    @property
    def requests_per_second(self) -> float:
        """That did not fail."""
        return self.num_done / self.seconds

    @property
    def output_per_second(self) -> float:
        """Tokens."""
        return self.num_output / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of prompts and outputs."""
        return (self.num_prompt + self.num_output) / self.seconds

    @property
    def good_per_second(self) -> float | None:
        """Goodput: requests that met the goals."""
        return None if self.num_good is None else self.num_good / self.seconds


def load_of(level: Level) -> str:
    """A level in few words."""
    return f"{level.concurrency} at a time" if level.rate is None else f"{level.rate:.3g} a second"
