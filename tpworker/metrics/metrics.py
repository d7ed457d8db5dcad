"""The metrics of one runtime, put together when they are scraped."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from tpworker.metrics.gpus import gpu_metrics
from tpworker.metrics.own import draft_metrics, fault_metrics, load_metrics, recorded_metrics
from tpworker.metrics.processes import process_metrics
from tpworker.metrics.recorder import Recorder
from tpworker.metrics.vllm import engine_metrics
from tpworker.observe.looking import with_usage
from tpworker.version import version

if TYPE_CHECKING:
    from tpworker.runtime.runtime import Runtime


class Metrics:
    """What Prometheus can scrape of a runtime. Make it before the runtime starts, to have all from there on.

    It counts on the runtime's event loop; `registry` and `text` may be asked from any thread.

    Args:
        runtime: started or not.
        served_model_name: what clients call the model, for labels; None: what the runtime calls it.
        registry: to add the metrics to, such as `prometheus_client.REGISTRY`. None: one of its own, which has
            this process' CPU time, memory and descriptors too (`process_…`).

    Raises:
        ValueError: the registry has the metrics of another runtime: names would mean two things.
    """

    def __init__(
        self,
        runtime: Runtime,
        served_model_name: str | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        if registry is None:
            registry = CollectorRegistry()
            ProcessCollector(registry=registry)
        self.registry = registry
        self._runtime = runtime
        self._recorder = Recorder(runtime.events)
        self._collector = _RuntimeCollector(runtime, self._recorder, served_model_name)
        registry.register(self._collector)
        runtime.add_listener(self._recorder)

    def text(self) -> str:
        """The registry in Prometheus' text format, for a page that answers with its `CONTENT_TYPE_LATEST`. It
        takes some ms, and with GPUs a few more: for a thread, not for an event loop that streams."""
        return generate_latest(self.registry).decode()

    def close(self) -> None:
        """Counts no more, and takes its metrics out of the registry."""
        self._runtime.remove_listener(self._recorder)
        self.registry.unregister(self._collector)


class _RuntimeCollector(Collector):
    """Asks the runtime when it is scraped, and adds what was recorded."""

    def __init__(self, runtime: Runtime, recorder: Recorder, served_model_name: str | None) -> None:
        self._runtime = runtime
        self._recorder = recorder
        self._name = served_model_name

    def describe(self) -> Iterable[Metric]:
        """One name of ours: a registry knows a second one by it."""
        return [Metric("tpworker_runtime_state", "", "gauge")]

    def collect(self) -> Iterable[Metric]:
        for metric in self._metrics():
            yield metric
            # A page takes some ms to make. A thread that waits for the interpreter lock, such as an event
            # loop with tokens to deliver, gets it here.
            time.sleep(0)

    def _metrics(self) -> Iterable[Metric]:
        runtime, recorder = self._runtime, self._recorder
        stats = runtime.stats()
        num_drafts = runtime.speculation.num_drafts
        if runtime.device:  # else it is not known yet what will be served, and on what
            model = self._name or runtime.served_name
            yield self._info(model)
            yield from engine_metrics(
                stats,
                recorder,
                runtime.config,
                model=model,
                dtype=runtime.dtype,
                max_model_len=runtime.max_model_len,
                num_drafts=num_drafts,
            )
        yield from load_metrics(stats)
        yield from recorded_metrics(recorder, runtime.config.lookahead)
        yield from fault_metrics(runtime.health(), stats)
        if num_drafts:
            yield from draft_metrics(stats, recorder, num_drafts)
        yield from process_metrics(with_usage(runtime.snapshot(), {}))
        yield from gpu_metrics(runtime.gpus())

    def _info(self, model: str) -> Metric:
        """What is served, and on what, in labels."""
        runtime = self._runtime
        info = {
            "version": version(),
            "model": model,
            "tensor_parallel_size": str(runtime.config.tensor_parallel_size),
            "device": runtime.device,
            "quantization": runtime.quantization or "none",
            "speculative_method": runtime.speculation.method or "none",
        }
        return InfoMetricFamily("tpworker", "What is served, and on what.", info)
