"""What a trace's file holds, without a process: bounded, whole, and readable while it is written."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.observe.traces import Trace
from tpworker.errors import ConfigError
from tpworker.ipc.trace import RECORDS, SCHEDULER_RING, Kind, Record, Rings, Teller, publisher_ring
from tpworker.observe.timeline import Timeline
from tpworker.observe.tracing import Tracing
from tpworker.outputs import RequestRecord, RuntimeEvent
from tpworker.sampling_params import SamplingParams


@pytest.fixture
def tracing() -> Iterator[Tracing]:
    tracing = Tracing(1)
    yield tracing
    tracing.close()


def teller(tracing: Tracing, ring: int = SCHEDULER_RING) -> Teller:
    return Rings.attach(tracing.fd, 1).teller(ring, 0)


def plan(teller: Teller, step: int) -> None:
    teller.begin(step)
    teller.mark()
    teller.end(Kind.PLANNED, 3 << 32 | 2, 100 + step, 1 << 32 | step)


def record(request_id: str, **changes: object) -> RequestRecord:
    now = time.monotonic()
    whole = RequestRecord(
        request_id, 0, "length", None, 3, 0, 5, 0, 0, 0, now - 5, now - 4, now - 3, now - 2, now - 1, now,
        SamplingParams(),
    )  # fmt: skip
    return whole._replace(**changes)  # type: ignore[arg-type]


def test_what_has_been_written_is_readable_before_the_end(tracing: Tracing, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    tracing.start(path)
    scheduler = teller(tracing)
    for step in range(50):
        plan(scheduler, step)
    eventually(lambda: '"step":49,' in path.read_text())
    text = path.read_text()  # as if the process had been killed
    assert text.endswith("},\n")
    assert len(Trace(f"{text[:-2]}]").named("scheduler: plans", "stream")) == 50
    tracing.stop()
    whole = Trace.of(path)
    assert whole.events[:-1] == json.loads(f"{text[:-2]}]")
    assert [e["args"] for e in whole.events if e.get("name") == "KV blocks"][:2] == [
        {"free": 100},
        {"free": 101},
    ]


@pytest.mark.parametrize("too_quick", [False, True])
def test_a_trace_is_bounded_and_says_what_is_missing(
    tracing: Tracing, tmp_path: Path, caplog: pytest.LogCaptureFixture, too_quick: bool
) -> None:
    caplog.set_level(logging.INFO)
    path, limit, now = tmp_path / "trace.json", 1 << 20, time.monotonic_ns()
    tracing.start(path, limit)
    scheduler = teller(tracing)
    for step in range(10 * RECORDS if too_quick else 0):  # JSON is not made as quickly
        plan(scheduler, step)
    for _ in range(0 if too_quick else 1000):
        tracing.span("HTTP", "x" * 500, now, now, {})
    if not too_quick:
        eventually(lambda: not tracing.is_on)
    summary = tracing.stop()
    assert summary is not None
    assert summary.is_full or too_quick
    assert ("is full" in caplog.text) == summary.is_full
    assert ("records were dropped" in caplog.text) != summary.is_full
    assert path.stat().st_size == summary.num_bytes <= limit
    assert summary.num_dropped > 0
    trace = Trace.of(path)
    assert summary.num_events == len(trace.events)
    if not too_quick:
        assert summary.num_dropped >= 1000 - sum(event["ph"] == "b" for event in trace.events)
    assert trace.events[-1]["args"] == {"dropped": summary.num_dropped}
    assert trace.instants()[-1] == ("trace is full" if summary.is_full else "trace ends")
    tracing.start(path)  # the next one has all of its room, and counts anew
    plan(scheduler, 0)
    again = tracing.stop()
    assert again is not None
    assert (again.num_dropped, again.is_full) == (0, False)


def test_requests_events_and_spans_of_others_stand_beside_the_steps(tracing: Tracing, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    tracing.start(path)
    tracing.on_request_end(record('odd "name"\n', index=1))
    tracing.on_request_end(record("refused", error="too late", finish_reason=None, started=None,
                                  first_token=None, last_token=None))  # fmt: skip
    tracing.cut(record("open"))
    for kind in ("lost", "recovering", "recovered"):
        tracing.on_event(RuntimeEvent(kind, 0.0, 1, "tpworker-rank1", "it died", None, 3))  # type: ignore[arg-type]
    now = time.monotonic_ns()
    tracing.span("HTTP", "POST /x", now, now + 5000, {"status": 200, "odd": Path("x")})
    tracing.span("HTTP", "no JSON", now, now, {"a": float("nan")})
    summary = tracing.stop()
    assert summary is not None
    assert summary.num_dropped == 1
    tracing.on_request_end(record("later"))
    trace = Trace.of(path)
    told = {
        e["args"]["request"]: (e["args"]["finish reason"], e["args"].get("error"), e["phases"])
        for e in trace.requests
    }
    phases = ["prepare", "queue", "prefill", "decode"]
    assert told == {
        'odd "name"\n': ("length", None, phases),
        "refused": ("failed", "too late", ["prepare", "queue"]),
        "open": ("open", None, phases),
    }
    ends = {  # of what was under way: with the trace
        e["args"]["request"]: [o["ts"] for o in trace.events if o["ph"] == "e" and o.get("id") == e["id"]][
            -2:
        ]
        for e in trace.requests
    }
    assert ends["open"][0] == ends["open"][1]
    assert ends['odd "name"\n'][0] < ends['odd "name"\n'][1]
    (http,) = (e for e in trace.events if e["ph"] == "b" and e.get("cat") == "POST /x")
    assert trace.processes[http["pid"]] == "HTTP"
    assert http["args"] == {"status": 200, "odd": "x"}
    assert [e["args"]["ended"] for e in trace.events if e["ph"] == "b" and e["name"] == "recovery"] == [
        "recovered"
    ]
    assert min(e["ts"] for e in trace.events if "ts" in e) == 0, "nothing is before the beginning"


def test_spans_of_a_lane_never_overlap_whatever_a_clock_says() -> None:
    timeline = Timeline(1, 1000)
    parts = [timeline.header(1)]
    times = [(0, 500), (1500, 2500), (2000, 2400), (2600, 2600), (9000, 8000)]
    for step, (started, ended) in enumerate(times):
        record = Record(publisher_ring(0), Kind.PUBLISHED, 0, step, (9000, 9500, started, ended))
        parts.append(timeline.of(record))
    parts.append(timeline.of(Record(0, 99, 0, 0, (0,) * 6)))  # of a kind that is not known
    parts.append(timeline.footer(9999, 0, False))
    trace = Trace("".join(parts))
    assert [e["ts"] for e in trace.lanes["rank 0: device"]] == [0, 0.5, 1.5, 1.6, 8]


def test_a_disk_that_fails_ends_the_trace_alone(tracing: Tracing, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        tracing.start("/dev/full")
        eventually(lambda: not tracing.is_on)
    assert "/dev/full ends, as it cannot be written: [Errno 28]" in caplog.text
    scheduler = teller(tracing)
    scheduler.begin(0)
    assert not scheduler.is_told
    tracing.stop()


def test_who_stops_and_starts_at_once_has_one_trace_at_a_time(tracing: Tracing, tmp_path: Path) -> None:
    """A stop takes a while, in a thread; what begins meanwhile must not be ended by it."""
    for number in range(5):
        path = tmp_path / f"{number}.json"
        tracing.start(path)
        stops = [threading.Thread(target=tracing.stop) for _ in range(2)]
        for stop in stops:
            stop.start()
        eventually(lambda n=number: _starts(tracing, tmp_path / f"{n}-again.json"))  # type: ignore[misc]
        for stop in stops:
            stop.join()
        assert tracing.is_on
        plan(teller(tracing), 7)
        tracing.stop()
        assert Trace.of(path).instants() == ["trace begins", "trace ends"]
        assert Trace.of(tmp_path / f"{number}-again.json").named("scheduler: plans", "compose") == [(0, 7)]


def _starts(tracing: Tracing, path: Path) -> bool:
    try:
        tracing.start(path)
    except ConfigError:
        return False
    return True
