"""What Prometheus can scrape of a runtime: the server's /metrics, and the same for whoever embeds one.

    metrics = Metrics(runtime)
    prometheus_client.start_http_server(9090, registry=metrics.registry)

It needs prometheus-client (the extra `metrics`, which `server` includes), and nothing of a server.
docs/observability.md has all names, and what they mean.
"""

try:
    from tpworker.metrics.metrics import Metrics
except ModuleNotFoundError as error:
    if error.name != "prometheus_client":
        raise
    raise ModuleNotFoundError(
        "metrics need the package prometheus-client, which is not installed: pip install 'tpworker[metrics]'",
        name=error.name,
    ) from error

__all__ = ["Metrics"]
