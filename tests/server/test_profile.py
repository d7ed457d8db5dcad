"""Timelines by HTTP: on and off while the server runs, if its operator has said where."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.observe.traces import Trace
from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tpworker.observe.tracing import Tracing
from tpworker.outputs import TraceSummary

Start = Callable[..., LiveServer]


class TracedRuntime(FakeRuntime):
    """Has a timeline, without anything of its own on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tracing = Tracing(1)

    @property
    def is_tracing(self) -> bool:
        return self.tracing.is_on

    def start_trace(self, path: str | os.PathLike[str]) -> None:
        self.tracing.start(path)

    async def stop_trace(self) -> TraceSummary | None:
        return self.tracing.stop()

    def trace_span(self, group: str, name: str, begun: int, ended: int, args: Mapping[str, Any]) -> None:
        self.tracing.span(group, name, begun, ended, args)


def test_timelines_are_begun_and_ended_by_who_has_the_key(start: Start, tmp_path: Path) -> None:
    runtime = TracedRuntime()
    server = start(runtime, trace=tmp_path / "trace.json", api_key="secret", root_path="/llm")
    key = {"Authorization": "Bearer secret"}
    assert server.post("/start_profile").status_code == 401
    assert not list(tmp_path.iterdir())
    refused = server.post("/stop_profile", headers=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "profile")
    begun = server.post("/start_profile", headers=key)
    assert (begun.status_code, begun.json()) == (200, {"file": "trace-2.json"})
    assert "is being written already" in server.post("/start_profile", headers=key).json()["error"]["message"]
    body = {"prompt": "ab", "max_tokens": 3}
    answer = server.post("/v1/completions", json=body, headers={**key, "X-Request-Id": "mine"})
    assert answer.status_code == 200
    server.post("/llm/v1/completions", json={}, headers=key)
    server.post("/v1/completions", json=body)
    server.get("/health")
    ended = server.post("/stop_profile", headers=key).json()
    assert (ended["path"], ended["num_dropped"], ended["is_full"]) == ("trace-2.json", 0, False)
    trace = Trace.of(tmp_path / "trace-2.json")
    spans = [event for event in trace.events if event["ph"] == "b"]
    assert {trace.processes[span["pid"]] for span in spans} == {"HTTP"}
    told = [(span["name"], span["args"]["status"]) for span in spans]
    path = "POST /v1/completions"
    assert [one for one in told if one[0] == path] == [(path, 200), (path, 400), (path, 401)]
    assert "GET /health" not in {name for name, _ in told}
    assert spans[-3]["args"]["request"] == "mine"
    assert server.post("/start_profile", headers=key).json() == {"file": "trace-3.json"}
    runtime.tracing.close()


def test_a_file_that_cannot_be_written_is_said(start: Start, tmp_path: Path) -> None:
    server = start(TracedRuntime(), trace=tmp_path / "missing" / "trace.json")
    answer = server.post("/start_profile")
    assert answer.status_code == 409
    assert "No such file or directory" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/start_profile", "/stop_profile"])
def test_who_has_not_said_where_has_no_timelines(start: Start, path: str) -> None:
    answer = start().post(path)
    assert answer.status_code == 404
    assert "started without --trace FILE" in answer.json()["error"]["message"]
