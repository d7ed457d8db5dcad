"""Histograms that cost what they must: a bisection and two additions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString


class Histogram:
    """How often what was observed fell between which bounds, in plain numbers: prometheus_client's own takes
    a lock, and several µs, for each observation.

    One thread writes it and any may read it, who may find a value counted that is not in the sum yet.

    Args:
        bounds: up to where the buckets reach, rising. What is above the last is counted too.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """By bucket; the last has what is above all bounds."""
        self.total = 0.0
        """The sum of what was observed."""

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value that came so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def series(self, labels: Mapping[str, str] | None = None, most: float | None = None) -> Series:
        """As it is now.

        Args:
            labels: its.
            most: nothing is above it, so that no bound above it need be told.
        """
        bounds = self.bounds if most is None else [bound for bound in self.bounds if bound <= most]
        return Series(labels or {}, bounds, self.counts[:], self.total)


class Series(NamedTuple):
    """One histogram of a family."""

    labels: Mapping[str, str]
    bounds: Sequence[float]
    counts: Sequence[int]
    """By bucket. Those above the last of the bounds are told as one."""
    total: float


def family(name: str, text: str, series: Iterable[Series]) -> HistogramMetricFamily:
    """A family of histograms whose labels have the same names."""
    series = list(series)
    made = HistogramMetricFamily(name, text, labels=list(series[0].labels) if series else [])
    for one in series:
        below = list(accumulate(one.counts))
        names = [_shown(bound) for bound in one.bounds]
        buckets = [*zip(names, below, strict=False), ("+Inf", below[-1])]
        made.add_metric(list(one.labels.values()), buckets, one.total)
    return made


def _shown(bound: float) -> str:
    """As prometheus_client writes it: other programs ask for the label by that."""
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]
