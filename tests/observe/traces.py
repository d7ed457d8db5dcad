"""A trace as a viewer reads it, and what holds of each."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_SLACK = 0.002  # µs, in which files have their times


class Trace:
    """A file that is whole. Raises AssertionError if spans of a lane overlap, or arrows do not join.

    Args:
        text: JSON, an array of events.
    """

    def __init__(self, text: str) -> None:
        self.events: list[Event] = json.loads(text)
        self.processes = self._names("process_name", "pid")
        threads = self._names("thread_name", "tid")
        self.lanes: dict[str, list[Event]] = defaultdict(list)
        for event in self.events:
            if event["ph"] == "X":
                lane = f"{self.processes[event['pid']]}: {threads[event['tid']]}"
                self.lanes[lane].append(event)
        for lane, spans in self.lanes.items():
            for before, after in pairwise(spans):
                end = before["ts"] + before["dur"]
                assert end <= after["ts"] + _SLACK, f"{lane}: {after} begins before {before} ends"
        self.requests = self._async("request")

    @classmethod
    def of(cls, path: Path) -> Trace:
        return cls(path.read_text())

    def _names(self, kind: str, of: str) -> dict[int, str]:
        return {e[of]: e["args"]["name"] for e in self.events if e["ph"] == "M" and e["name"] == kind}

    def _async(self, category: str) -> list[Event]:
        """Spans that may overlap: the first event of each, with the names of all that is in it."""
        open_ones: dict[str, list[Event]] = {}
        done = []
        for event in self.events:
            if event.get("cat") != category or event["ph"] not in "be":
                continue
            stack = open_ones.setdefault(event["id"], [])
            if event["ph"] == "b":
                assert not stack or stack[-1]["ts"] <= event["ts"]
                stack.append(event)
            else:
                begun = stack.pop()
                assert begun["name"] == event["name"]
                assert begun["ts"] <= event["ts"] + _SLACK
                if stack:
                    stack[0].setdefault("phases", []).append(event["name"])
                else:
                    done.append(begun)
        assert not any(open_ones.values()), "spans that do not end"
        return done

    def named(self, lane: str, *names: str) -> list[tuple[int, int]]:
        """Generation and step of a lane's spans of some names; none: of all."""
        spans = [e for e in self.lanes[lane] if not names or e["name"] in names]
        return [(e["args"]["generation"], e["args"]["step"]) for e in spans]

    def instants(self) -> list[str]:
        return [event["name"] for event in self.events if event["ph"] == "i"]

    def arrows(self) -> dict[int, list[Event]]:
        """The parts of each arrow, by its number, in the order of time. Each stands in a span."""
        lanes = {spans[0]["tid"]: spans for spans in self.lanes.values()}
        arrows: dict[int, list[Event]] = defaultdict(list)
        for event in self.events:
            if event["ph"] in "stf":
                spans = lanes[event["tid"]]
                index = bisect_right(spans, event["ts"], key=lambda span: span["ts"] - _SLACK)
                event["span"] = span = spans[index - 1]
                assert index > 0, f"{event} points to nothing"
                assert event["ts"] <= span["ts"] + span["dur"] + 2 * _SLACK, f"{event} points to nothing"
                arrows[event["id"]].append(event)
        for parts in arrows.values():
            parts.sort(key=lambda event: (event["ts"], "stf".index(event["ph"])))
        return arrows
