"""Traces of a real server: a timeline from its start on, and spans in the traces of its clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.conftest import eventually
from tests.integration.conftest import Server
from tests.observe.traces import Trace
from tests.runtime.test_trace import check_steps

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otlp is not installed")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.slow
def test_a_server_writes_timelines_and_sends_spans(
    start_server: Callable[..., Server], folder: Path, tmp_path: Path
) -> None:
    from tests.observe.collector import collecting, values

    first, second = tmp_path / "trace.json", tmp_path / "trace-2.json"
    with collecting() as collector:
        model = ["--model", str(folder), "--device", "cpu", "-tp", "2"]
        server = start_server(*model, "--trace", str(first), "--otlp-endpoint", collector.url)
        parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}

        def complete(max_tokens: int, stream: bool) -> None:
            body = {"prompt": [1, 2, 3], "max_tokens": max_tokens, "stream": stream, "ignore_eos": True}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=parent, timeout=60)
            assert answer.status_code == 200

        complete(40, stream=True)
        assert httpx.post(f"{server.url}/stop_profile", timeout=60).json()["num_dropped"] == 0
        complete(2, stream=False)
        assert httpx.post(f"{server.url}/start_profile", timeout=60).json() == {"file": second.name}
        complete(30, stream=False)
        assert server.stop() == 0
    for file, num_tokens in ((first, 40), (second, 30)):
        trace = Trace.of(file)
        check_steps(trace, 2)
        (request,) = trace.requests
        assert request["args"]["output tokens"] == num_tokens
        assert request["phases"] == ["prepare", "queue", "prefill", "decode"]
        http = [event for event in trace.events if event["ph"] == "b" and "completions" in event["name"]]
        assert [event["args"]["status"] for event in http] == [200]
    spans = collector.named("llm_request")
    assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in spans} == {(TRACE, PARENT)}
    told = [values(span.attributes) for span in spans]
    assert [one["gen_ai.usage.completion_tokens"] for one in told] == [40, 2, 30]
    assert {one["gen_ai.response.model"] for one in told} == {folder.name}
    eventually(lambda: len(collector.spans) == 3 * 4)
