"""Requests as OpenTelemetry spans: one a choice, with its phases within.

    llm_request    from its arrival to its end; its parent is the current span of whoever consumes its outputs
    ├── queue      until its first step is launched
    ├── prefill    until its first token
    └── decode     until its last one

Names of attributes are vLLM's, and those of OpenTelemetry's conventions for GenAI. Spans are made when a
request has ended, of its record: while it runs they cost nothing. Needs the extra `otlp`.

`RequestSpans` takes any tracer, an embedder's own; `Exporter` is what the command line makes of a URL.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, get_current_span, set_span_in_context

from tpworker.outputs import Listener, RequestRecord
from tpworker.version import version

logger = logging.getLogger(__name__)

PATH = "/v1/traces"
END_SECONDS = 3.0
"""How long the last spans may take to leave."""
_AGAIN_SECONDS = 600.0
_TALKERS = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")
"""Loggers of the library that tell of a collector that is down, each time."""


class RequestSpans(Listener):
    """Makes spans of a runtime's requests: `runtime.add_listener(RequestSpans(tracer))`.

    Args:
        tracer: of OpenTelemetry.
        model: tells the model's name; None: none is told.
    """

    def __init__(self, tracer: Tracer, model: Callable[[], str] | None = None) -> None:
        self._tracer = tracer
        self._model = model

    def on_request_end(self, record: RequestRecord) -> None:
        """See `Listener`. It is called where the request was consumed, whose current span is the parent."""
        epoch = time.time_ns() - time.monotonic_ns()
        parent = get_current_span().get_span_context()
        is_ours = parent.is_valid and not parent.is_remote  # of a program that embeds the runtime
        span = self._tracer.start_span(
            "llm_request",
            kind=SpanKind.INTERNAL if is_ours else SpanKind.SERVER,
            attributes=self._attributes(record),
            start_time=epoch + _ns(record.arrived),
        )
        if not span.is_recording():
            return  # whoever sent it wants no span
        context = set_span_in_context(span)
        for name, begun, ended in record.phases()[1:]:  # vLLM has none for the preparation
            phase = self._tracer.start_span(name, context, start_time=epoch + _ns(begun))
            phase.end(epoch + _ns(ended))
        if record.error is not None:
            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(epoch + _ns(record.ended))

    def _attributes(self, record: RequestRecord) -> dict[str, Any]:
        sampling = record.sampling
        told: dict[str, Any] = _latencies(record) | {
            "gen_ai.request.id": record.request_id,
            "gen_ai.request.n": sampling.n,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.response.model": None if self._model is None else self._model(),
            "gen_ai.response.finish_reasons": (record.finish_reason or "error",),
            "gen_ai.usage.prompt_tokens": record.num_prompt_tokens,
            "gen_ai.usage.completion_tokens": record.num_output_tokens,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_output_tokens,
            "tpworker.choice": record.index,
            "tpworker.cached_tokens": record.num_cached_tokens,
            "tpworker.draft_tokens": record.num_draft_tokens,
            "tpworker.accepted_tokens": record.num_accepted_tokens,
            "tpworker.restarts": record.num_resumed,
        }
        return {name: value for name, value in told.items() if value is not None}


def _latencies(record: RequestRecord) -> dict[str, float]:
    """In seconds, as vLLM names them, of what has come to its end."""
    told = {"gen_ai.latency.e2e": record.ended - record.arrived}
    if record.started is not None:
        told["gen_ai.latency.time_in_queue"] = record.started - record.submitted
        if record.first_token is not None and record.last_token is not None:
            told["gen_ai.latency.time_to_first_token"] = record.first_token - record.arrived
            told["gen_ai.latency.time_in_model_prefill"] = record.first_token - record.started
            told["gen_ai.latency.time_in_model_decode"] = record.last_token - record.first_token
            told["gen_ai.latency.time_in_model_inference"] = record.last_token - record.started
    return told


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


class Exporter:
    """Sends spans to a collector, by OTLP over HTTP, from a thread of its own.

    For a process that is the server's own: what the library logs of a collector that is down, each time that
    it is, is one line here. Its own environment variables (OTEL_…) hold: headers, certificates, the service's
    name, how many are sampled.

    Args:
        endpoint: URL of the collector; without a path, as http://host:4318, PATH is added.
    """

    def __init__(self, endpoint: str) -> None:
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._talk = _Hushed()
        for name in _TALKERS:
            logging.getLogger(name).addFilter(self._talk)
        self._endpoint = endpoint
        self._told = _Told(OTLPSpanExporter(endpoint_url(endpoint)), endpoint, self._talk)
        self._batches = _Counted(self._told)
        self._provider.add_span_processor(self._batches)

    def tracer(self) -> Any:
        """A tracer, for `RequestSpans`."""
        return self._provider.get_tracer("tpworker", version())

    def close(self) -> None:
        """Sends what is left, for up to END_SECONDS; the log says how many spans have come to nothing."""
        closing = threading.Thread(target=self._provider.shutdown, name="tpworker-otlp", daemon=True)
        closing.start()
        closing.join(END_SECONDS)
        for name in _TALKERS if not closing.is_alive() else ():  # else there is more to be said
            logging.getLogger(name).removeFilter(self._talk)
        num_ended = self._batches.num_ended
        if lost := num_ended - self._told.num_sent:
            late = f"it has not answered within {END_SECONDS:g} s"
            logger.warning(
                "%d of %d spans have not reached %s by the end, and are lost (%s)",
                lost,
                num_ended,
                self._endpoint,
                late if closing.is_alive() else self._talk.last,
            )


def _resource() -> Resource:
    """Who sends the spans: as the environment names it, or by our own name."""
    found = Resource.create({"service.version": version()})
    if str(found.attributes["service.name"]).startswith("unknown_service"):
        return found.merge(Resource({"service.name": "tpworker"}))
    return found


def endpoint_url(endpoint: str) -> str:
    """With the path that OTLP has, where there is none."""
    scheme, _, rest = endpoint.partition("://")
    host, _, path = rest.partition("/")
    return endpoint if path else f"{scheme}://{host}{PATH}"


class _Hushed(logging.Filter):
    """Keeps what the library says from the log, and what it said last."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.last = " ".join(record.getMessage().split())[:300]
        return False


class _Counted(BatchSpanProcessor):  # type: ignore[misc]  # the library is not typed
    """Counts the spans that it is to send: those that its queue has no room for leave no other trace."""

    num_ended = 0

    def on_end(self, span: ReadableSpan) -> None:
        super().on_end(span)
        if span.context is not None and span.context.trace_flags.sampled:
            self.num_ended += 1


class _Told:
    """A SpanExporter around another one: logs that a collector cannot be reached, and that it can again."""

    def __init__(self, inner: Any, endpoint: str, talk: _Hushed) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._talk = talk
        self.num_sent = 0
        self._num_lost = 0
        self._told_at: float | None = None

    def export(self, spans: Sequence[Any]) -> Any:
        result = self._inner.export(spans)
        now = time.monotonic()
        if result is not SpanExportResult.SUCCESS:
            self._num_lost += len(spans)
            if self._told_at is None or now > self._told_at + _AGAIN_SECONDS:
                self._told_at = now
                logger.warning(
                    "%d spans could not be sent to %s, and are lost; requests are not affected (%s)",
                    self._num_lost,
                    self._endpoint,
                    self._talk.last,
                )
            return result
        self.num_sent += len(spans)
        if self._told_at is not None:
            logger.warning("spans reach %s again; %d were lost", self._endpoint, self._num_lost)
            self._num_lost, self._told_at = 0, None
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return bool(self._inner.force_flush(timeout_millis))
