"""What the command line says of traces."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_cli import parse
from tpworker import ConfigError
from tpworker.cli.trace_options import TraceOptions


def test_traces_are_none_unless_asked_for() -> None:
    assert parse().traces == TraceOptions()
    given = parse("--trace", "a/b.json", "--otlp-endpoint", "http://host:4318").traces
    assert given == TraceOptions(Path("a/b.json"), "http://host:4318")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace", ""], "--trace must not be empty"),
        (["--trace", "x", "--ask", "a"], "--trace has no effect with --ask"),
        (["--otlp-endpoint", "http://a", "--ask", "a"], "--otlp-endpoint has no effect with --ask"),
        (["--otlp-endpoint", "host:4318"], "must be the URL of a collector"),
        (["--otlp-endpoint", "grpc://host"], "must be the URL of a collector"),
        (["--otlp-endpoint", "http://[::1"], "must be the URL of a collector"),
        (["--otlp-endpoint", "http://host:99999"], "must be the URL of a collector"),
        (["--otlp-endpoint", "http://host/v1?x=1"], "must be the URL of a collector"),
        (["--otlp-endpoint", "http://host:4317"], "port 4317 is that of OTLP over gRPC.*take port 4318"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(*arguments)


def test_a_collector_by_http_may_have_any_port() -> None:
    assert parse("--otlp-endpoint", "http://host:4317/v1/traces").traces.otlp_endpoint
