"""What the command line says of traces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpworker.errors import ConfigError, shown
from tpworker.values import is_server_url

if TYPE_CHECKING:
    from tpworker.runtime.runtime import Runtime

_GRPC_PORT = ":4317"


@dataclass(frozen=True)
class TraceOptions:
    """What is traced, and to where."""

    file: Path | None = None
    """Of the timeline; None: none is written."""
    otlp_endpoint: str | None = None
    """Where spans of requests are sent; None: nowhere."""


def add_trace_options(group: Any) -> None:
    """Adds the options to one of argparse's groups."""
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="write a timeline for Perfetto (https://ui.perfetto.dev) from the start on: what scheduler, "
        "ranks, devices and requests do, and when; up to 256 MiB. POST /stop_profile ends it, and "
        "/start_profile begins another one beside it, FILE-2 (default: none, and no such paths)",
    )
    group.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        help="send a span for each request to this OpenTelemetry collector, by OTLP over HTTP, as "
        "http://host:4318 (default: none)",
    )


def trace_options_in(given: dict[str, Any], serves: bool) -> TraceOptions:
    """Takes what argparse found of them.

    Args:
        given: by argparse's names; those that are taken are taken out.
        serves: whether there will be requests.

    Raises:
        ConfigError: it cannot be, or has no effect beside the others.
    """
    file, endpoint = given.pop("trace", None), given.pop("otlp_endpoint", None)
    for flag, value in (("--trace", file), ("--otlp-endpoint", endpoint)):
        if value is not None and not serves:
            raise ConfigError(f"{flag} has no effect with --ask, which serves nobody: leave it out")
    if file == "":
        raise ConfigError("--trace must not be empty: leave it out, or name a file")
    if endpoint is not None:
        _check(endpoint)
    return TraceOptions(None if file is None else Path(file), endpoint)


def _check(endpoint: str) -> None:
    if not is_server_url(endpoint) or re.search(r"[\s?#]", endpoint):
        raise ConfigError(
            f"--otlp-endpoint {shown(endpoint)}: must be the URL of a collector, as http://127.0.0.1:4318"
        )
    if endpoint.rstrip("/").endswith(_GRPC_PORT):
        raise ConfigError(
            f"--otlp-endpoint {shown(endpoint)}: port 4317 is that of OTLP over gRPC, and spans are sent "
            "over HTTP: take port 4318, or give a path (/v1/traces) if the collector speaks HTTP there"
        )


@contextmanager
def traced(runtime: Runtime, options: TraceOptions) -> Iterator[None]:
    """Meanwhile, and from the runtime's start on, it is traced as the options say.

    Raises:
        ConfigError: the file cannot be written, or what exports spans is not installed.
    """
    exporter = None
    if options.otlp_endpoint is not None:
        try:
            from tpworker.observe.otlp import Exporter, RequestSpans
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "opentelemetry":
                raise
            raise ConfigError(
                f"--otlp-endpoint needs the package {error.name}, which is not installed: "
                "pip install 'tpworker[otlp]'"
            ) from error
        exporter = Exporter(options.otlp_endpoint)
        runtime.add_listener(RequestSpans(exporter.tracer(), lambda: runtime.served_name))
    try:
        if options.file is not None:
            runtime.start_trace(options.file)
        yield
    finally:
        if exporter is not None:
            exporter.close()
