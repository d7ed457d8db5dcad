"""How the ranks' GPUs do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tpworker.observe.watch import GpuState

_LABELS = ("rank", "gpu", "uuid")


def gpu_metrics(states: Sequence[GpuState]) -> Iterable[Metric]:
    """A GPU that does not tell something has no sample of it."""
    if not states:
        return
    gauges: dict[str, tuple[str, Callable[[GpuState], float | None]]] = {
        "temperature_celsius": ("Temperature of the GPU.", lambda state: state.reading.temperature),
        "power_watts": ("Power that it draws.", lambda state: state.reading.power),
        "memory_used_bytes": ("Its memory in use, by all processes.", lambda s: s.reading.memory_used),
        "memory_bytes": ("Its memory in all.", lambda state: state.gpu.memory or None),
    }
    for name, (text, value) in gauges.items():
        gauge = GaugeMetricFamily(f"tpworker_gpu_{name}", text, labels=_LABELS)
        for state in states:
            if (number := value(state)) is not None:
                gauge.add_metric(_labels(state), number)
        yield gauge
    ecc = CounterMetricFamily(
        "tpworker_gpu_ecc_errors", "Memory errors since the driver was loaded.", labels=[*_LABELS, "kind"]
    )
    xid = CounterMetricFamily(
        "tpworker_gpu_xid_errors", "Critical errors (Xid) since the start; the log has them.", labels=_LABELS
    )
    for state in states:
        reading = state.reading
        for kind, count in (("corrected", reading.ecc_corrected), ("uncorrected", reading.ecc_uncorrected)):
            if count is not None:
                ecc.add_metric([*_labels(state), kind], count)
        if state.num_xids is not None:
            xid.add_metric(_labels(state), state.num_xids)
    yield ecc
    yield xid


def _labels(state: GpuState) -> list[str]:
    return [str(state.rank), str(state.gpu.index), state.gpu.uuid]
