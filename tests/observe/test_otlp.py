"""Spans of requests: what a collector gets, and what it costs if there is none."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra otlp is not installed (scripts/setup --dev does)")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otlp is not installed")

from opentelemetry.sdk.trace.export import SpanExportResult

from tests.conftest import eventually
from tests.observe.collector import collecting, values
from tests.observe.test_tracing import record
from tpworker.observe import otlp
from tpworker.observe.otlp import Exporter, RequestSpans, _Hushed, _Told, endpoint_url
from tpworker.sampling_params import SamplingParams
from tpworker.server.tracing import TraceContext

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_request_is_a_span_with_its_phases_and_vllms_attributes() -> None:
    with collecting() as collector:
        exporter = Exporter(collector.url)
        spans = RequestSpans(exporter.tracer(), lambda: "small")
        began = time.time()
        spans.on_request_end(record("mine", sampling=SamplingParams(max_tokens=9, temperature=0.5, n=2)))
        spans.on_request_end(record("refused", error="too late", finish_reason=None, started=None,
                                    first_token=None, last_token=None))  # fmt: skip
        exporter.close()
    assert collector.resources[0]["service.name"] == "tpworker"
    whole, failed = collector.named("llm_request")
    told = values(whole.attributes)
    latencies = {name: told.pop(name) for name in list(told) if name.startswith("gen_ai.latency.")}
    assert {name.removeprefix("gen_ai.latency."): round(value) for name, value in latencies.items()} == {
        "e2e": 5,
        "time_in_queue": 1,
        "time_to_first_token": 3,
        "time_in_model_prefill": 1,
        "time_in_model_decode": 1,
        "time_in_model_inference": 2,
    }
    assert told == {
        "gen_ai.request.id": "mine",
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.model": "small",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 5,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 5,
        "tpworker.choice": 0,
        "tpworker.cached_tokens": 0,
        "tpworker.draft_tokens": 0,
        "tpworker.accepted_tokens": 0,
        "tpworker.restarts": 0,
    }
    assert whole.kind == whole.SPAN_KIND_SERVER
    assert abs(whole.start_time_unix_nano / 1e9 - (began - 5)) < 1
    phases = [span for span in collector.spans if span.parent_span_id == whole.span_id]
    assert [span.name for span in sorted(phases, key=lambda span: span.start_time_unix_nano)] == [
        "queue",
        "prefill",
        "decode",
    ]
    for span in phases:
        assert span.trace_id == whole.trace_id
        assert whole.start_time_unix_nano <= span.start_time_unix_nano
        assert span.start_time_unix_nano < span.end_time_unix_nano <= whole.end_time_unix_nano
    assert (failed.status.code, failed.status.message) == (failed.status.STATUS_CODE_ERROR, "too late")
    assert [s.name for s in collector.spans if s.parent_span_id == failed.span_id] == ["queue"]
    assert "gen_ai.latency.time_in_queue" not in values(failed.attributes)


def test_a_request_belongs_to_the_trace_of_whoever_sent_it() -> None:
    """By its headers, or by the current span of a program that embeds the runtime."""
    with collecting() as collector:
        exporter = Exporter(collector.url)
        tracer = exporter.tracer()
        spans = RequestSpans(tracer)

        async def app(scope: object, receive: object, send: object) -> None:
            spans.on_request_end(record("by headers"))

        def headers(flags: str) -> list[tuple[bytes, bytes]]:
            return [(b"traceparent", f"00-{TRACE}-{PARENT}-{flags}".encode())]

        async def main() -> None:
            context = TraceContext(app)  # type: ignore[arg-type]
            for sent in (headers("01"), headers("00"), [(b"traceparent", b"nonsense")]):
                await context({"type": "http", "headers": sent}, None, None)  # type: ignore[arg-type]
            with tracer.start_as_current_span("theirs"):
                spans.on_request_end(record("embedded"))

        asyncio.run(main())
        exporter.close()
    by_headers, alone, embedded = collector.named("llm_request")  # and none of who wants no span
    assert (by_headers.trace_id.hex(), by_headers.parent_span_id.hex()) == (TRACE, PARENT)
    assert by_headers.kind == by_headers.SPAN_KIND_SERVER
    assert alone.trace_id.hex() != TRACE
    assert not alone.parent_span_id
    (theirs,) = collector.named("theirs")
    assert (embedded.trace_id, embedded.parent_span_id) == (theirs.trace_id, theirs.span_id)
    assert embedded.kind == embedded.SPAN_KIND_INTERNAL


def test_a_collector_that_is_down_costs_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.1")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # and nobody listens
        exporter = Exporter(f"http://127.0.0.1:{listener.getsockname()[1]}")
        spans = RequestSpans(exporter.tracer())
        with caplog.at_level(logging.INFO):
            for number in range(8):
                spans.on_request_end(record(str(number)))
            eventually(lambda: bool(caplog.records))
            exporter.close()
    line, last = [one.getMessage() for one in caplog.records]
    assert "spans could not be sent to http://127.0.0.1:" in line
    assert "requests are not affected (" in line
    assert last.startswith("32 of 32 spans have not reached http://127.0.0.1:")
    assert last.endswith("are lost (Failed to export spans batch due to timeout, max retries or shutdown.)")


def test_spans_that_a_collector_does_not_take_before_the_end_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the connection, and says nothing: who serves does not wait for it. Spans that the queue has no
    room for meanwhile count too."""
    monkeypatch.setattr(otlp, "END_SECONDS", 0.1)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        exporter = Exporter(f"http://127.0.0.1:{listener.getsockname()[1]}")
        spans = RequestSpans(exporter.tracer())
        for number in range(10):
            spans.on_request_end(record(str(number)))
        exporter.close()
        (line,) = [one.getMessage() for one in caplog.records]
        assert line.startswith("40 of 40 spans have not reached http://127.0.0.1:")
        assert line.endswith("are lost (it has not answered within 0.1 s)")


def test_how_many_spans_were_lost_is_told_of_each_time_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    class Collector:
        result = SpanExportResult.FAILURE

        def export(self, spans: object) -> SpanExportResult:
            return self.result

    collector = Collector()
    told = _Told(collector, "http://here", _Hushed())
    for spans in (2, 3):
        for collector.result in (
            SpanExportResult.FAILURE,
            SpanExportResult.FAILURE,
            SpanExportResult.SUCCESS,
        ):
            told.export(["span"] * spans)
    assert [one.getMessage().partition(";")[2].split(" (")[0] for one in caplog.records] == [
        " requests are not affected", " 4 were lost", " requests are not affected", " 6 were lost"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://a:4318", "http://a:4318/v1/traces"),
        ("http://a:4318/", "http://a:4318/v1/traces"),
        ("https://a/otlp/v1/traces", "https://a/otlp/v1/traces"),
    ],
)
def test_the_path_is_added_where_there_is_none(given: str, url: str) -> None:
    assert endpoint_url(given) == url
