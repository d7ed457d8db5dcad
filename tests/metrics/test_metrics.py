"""What a registry has of a runtime, without a server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from tests.metrics import vllm_names
from tests.metrics.test_recorder import record, step
from tests.server.fake_runtime import FakeRuntime
from tpworker import Runtime, SamplingParams
from tpworker.config import RuntimeConfig
from tpworker.ipc.board import BOUNDS_NS, Board, Field, Span
from tpworker.ipc.child import board_names
from tpworker.metrics import Metrics
from tpworker.metrics.processes import process_metrics
from tpworker.observe.looking import look
from tpworker.outputs import Stats
from tpworker.testing.fake_process import FAKE_RANKS, fake_model

LABELS = {"model_name": "fake-model", "engine": "0"}
DRAFTS = RuntimeConfig(speculative_method="ngram", num_speculative_tokens=3)


class Busy(FakeRuntime):
    """A runtime of which all is known."""

    def stats(self) -> Stats:
        return replace(
            super().stats(), running=3, waiting=2, free_blocks=75, prompt_tokens=50, cached_tokens=20,
            output_tokens=70, preemptions=4,
        )  # fmt: skip


def families(metrics: Metrics) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for metric in text_string_to_metric_families(metrics.text()):
        assert metric.name not in found, "its samples do not stand together"
        found[metric.name] = metric
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def runtime() -> Iterator[FakeRuntime]:
    made = Busy(configured=DRAFTS, draft_tokens=(9, 7, 2), accepted_tokens=(5, 3, 1))
    yield made
    assert made.the_tokenizer is not None
    made.the_tokenizer.close()


@pytest.fixture
def metrics(runtime: FakeRuntime) -> Metrics:
    return Metrics(runtime)  # type: ignore[arg-type]


def test_all_of_vllms_names_with_their_types_labels_and_bounds(metrics: Metrics) -> None:
    found = families(metrics)
    for kind, names in (
        ("gauge", vllm_names.GAUGES),
        ("counter", vllm_names.COUNTERS | vllm_names.WITH_DRAFTS),
    ):
        for name, labels in names.items():
            metric = found.pop(f"vllm:{name}")
            assert metric.type == kind, name
            assert all(set(sample.labels) == labels for sample in metric.samples), name
            assert metric.samples, name
    for name, bounds in vllm_names.HISTOGRAMS.items():
        metric = found.pop(f"vllm:{name}")
        assert metric.type == "histogram", name
        told = {float(s.labels["le"]) for s in metric.samples if s.name.endswith("_bucket")}
        assert told >= set(bounds), name
        assert all(set(s.labels) - {"le"} == vllm_names.BOTH for s in metric.samples), name
    config = found.pop("vllm:cache_config_info")
    assert config.type == "gauge"
    assert set(config.samples[0].labels) == vllm_names.CACHE_CONFIG
    assert not [name for name in found if name.startswith("vllm")], "the list is not whole"


def test_lengths_are_told_up_to_the_models(metrics: Metrics) -> None:
    told = [s for s in families(metrics)["vllm:request_prompt_tokens"].samples if "le" in s.labels]
    assert [s.labels["le"] for s in told][-2:] == ["500.0", "+Inf"], "it takes 512 tokens"


def test_no_series_occurs_twice_and_all_have_a_text(metrics: Metrics) -> None:
    found = families(metrics)
    series = Counter(
        (sample.name, tuple(sorted(sample.labels.items())))
        for metric in found.values()
        for sample in metric.samples
    )
    assert not [one for one, times in series.items() if times > 1]
    assert all(metric.documentation for metric in found.values())
    assert not [name for name, _ in series if name.endswith("_created")]


def test_the_stricter_format_that_scrapers_ask_for_is_right_too(metrics: Metrics) -> None:
    """OpenMetrics, in which `prometheus_client.start_http_server` answers Prometheus."""
    page = openmetrics(metrics.registry).decode()
    names = {metric.name for metric in openmetrics_families(page)}
    assert {"vllm:request_success", "vllm:iteration_tokens_total", "tpworker"} <= names


def test_vllms_gauges_and_counters(metrics: Metrics) -> None:
    expected: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
        ("num_requests_running", ()): 3,
        ("num_requests_waiting", ()): 2,
        ("num_requests_waiting_by_reason", (("reason", "capacity"),)): 2,
        ("kv_cache_usage_perc", ()): 0.25,
        ("prefix_cache_queries_total", ()): 50,
        ("prefix_cache_hits_total", ()): 20,
        ("prompt_tokens_by_source_total", (("source", "local_compute"),)): 30,
        ("prompt_tokens_by_source_total", (("source", "local_cache_hit"),)): 20,
        ("generation_tokens_total", ()): 70,
        ("num_preemptions_total", ()): 4,
        ("spec_decode_num_drafts_total", ()): 9,
        ("spec_decode_num_draft_tokens_total", ()): 18,
        ("spec_decode_num_accepted_tokens_total", ()): 9,
        ("spec_decode_num_accepted_tokens_per_pos_total", (("position", "0"),)): 5,
        ("spec_decode_num_accepted_tokens_per_pos_total", (("position", "2"),)): 1,
    }
    found = {key: value(metrics, f"vllm:{key[0]}", **LABELS, **dict(key[1])) for key in expected}
    assert found == expected


def test_what_a_runtime_tells_is_found_under_both_names(metrics: Metrics, runtime: FakeRuntime) -> None:
    (listener,) = runtime.listeners
    listener.on_first_tokens([0.25])
    listener.on_tokens([(1, 0.5)])
    listener.on_request_end(record())
    listener.on_request_end(record(finish_reason=None, error="it failed"))
    listener.on_step(step(0, 0, 0, 10**6))
    listener.on_step(step(1, 0, 10**6 + 2000, 2 * 10**6))
    expected = {
        "vllm:time_to_first_token_seconds": 0.25,
        "vllm:inter_token_latency_seconds": 0.5,
        "vllm:time_per_output_token_seconds": 0.5,
        "vllm:request_time_per_output_token_seconds": 0.5,
        "vllm:e2e_request_latency_seconds": 3.0,
        "vllm:request_queue_time_seconds": 0.25,
        "vllm:request_prefill_time_seconds": 0.25,
        "vllm:request_decode_time_seconds": 2.0,
        "vllm:request_inference_time_seconds": 2.25,
        "vllm:request_prompt_tokens": 10,
        "vllm:request_prefill_kv_computed_tokens": 6,
        "vllm:request_generation_tokens": 5,
        "vllm:request_max_num_generation_tokens": 10,  # of two requests
        "vllm:request_params_max_tokens": 7,
        "vllm:request_params_n": 2,  # the same
        "vllm:iteration_tokens_total": 8,
    }
    assert {name: value(metrics, f"{name}_sum", **LABELS) for name in expected} == expected
    for reason, count in (("stop", 1), ("length", 0), ("abort", 0), ("error", 1)):
        assert value(metrics, "vllm:request_success_total", **LABELS, finished_reason=reason) == count
    assert value(metrics, "tpworker_request_preparation_seconds_sum") == 0.5
    assert value(metrics, "tpworker_step_gap_seconds_bucket", le="2e-06") == 1
    assert value(metrics, "tpworker_step_gap_seconds_bucket", le="1e-06") == 0
    assert value(metrics, "tpworker_steps_ahead_bucket", le="1.0") == 1
    assert value(metrics, "tpworker_steps_ahead_bucket", le="0.0") == 0


def board_of(num_ranks: int, waits_ns: Sequence[int]) -> Board:
    """Of processes none of which is alive; rank 0 and the scheduler have taken so long, again and again."""
    board = Board.create(board_names(num_ranks))
    scheduler, *ranks = board.rows()
    for row in board.rows():
        row[Field.LAUNCHED], row[Field.COMPLETED] = 42, 40
    ranks[-1][Field.LAST_ARRIVALS] = 7
    for row, span in ((scheduler, Span.COMPOSE), (ranks[0], Span.PUBLISH), (ranks[0], Span.BARRIER)):
        for waited in waits_ns:
            row.took(span, waited)
    return board


def test_what_processes_say_on_the_board(metrics: Metrics, runtime: FakeRuntime) -> None:
    longer = 2 * BOUNDS_NS[-1]
    with closing(board_of(2, (500, 3000, 3500, longer))) as runtime.board:
        assert value(metrics, "tpworker_steps_in_flight") == 2
        assert value(metrics, "tpworker_barrier_last_arrivals_total", rank="0") == 0
        assert value(metrics, "tpworker_barrier_last_arrivals_total", rank="1") == 7
        for name, labels in (("barrier_wait", {"rank": "0"}), ("publish", {}), ("compose", {})):
            buckets = {
                le: value(metrics, f"tpworker_{name}_seconds_bucket", **labels, le=le)
                for le in ("1e-06", "2e-06", "4e-06", str(BOUNDS_NS[-1] / 1e9), "+Inf")
            }
            assert [*buckets.values()] == [1, 1, 3, 3, 4]
            assert value(metrics, f"tpworker_{name}_seconds_sum", **labels) == (7000 + longer) / 1e9
        assert value(metrics, "tpworker_barrier_wait_seconds_count", rank="1") == 0
    with closing(board_of(1, ())) as runtime.board:
        assert value(metrics, "tpworker_steps_in_flight") == 2
        assert "barrier" not in metrics.text(), "one rank waits for nobody"


def test_what_processes_use() -> None:
    with closing(board_of(2, ())) as board:
        seen = look(board)
    scheduler = replace(seen.scheduler, cpu_seconds=1.5, memory_bytes=1 << 20)
    ranks = seen.ranks[0], replace(seen.ranks[1], cpu_seconds=2.5, memory_bytes=1 << 21)
    found = {
        (sample.name, sample.labels["process"]): sample.value
        for metric in process_metrics(replace(seen, scheduler=scheduler, ranks=ranks))
        for sample in metric.samples
        if "process" in sample.labels
    }
    assert found == {
        ("tpworker_process_cpu_seconds_total", "tpworker-scheduler"): 1.5,
        ("tpworker_process_cpu_seconds_total", "tpworker-rank1"): 2.5,
        ("tpworker_process_resident_memory_bytes", "tpworker-scheduler"): 1 << 20,
        ("tpworker_process_resident_memory_bytes", "tpworker-rank1"): 1 << 21,
    }, "what has ended uses nothing"


def test_before_it_is_known_what_is_served_there_is_nothing_of_it() -> None:
    found = families(Metrics(FakeRuntime(state="starting", is_found=False)))  # type: ignore[arg-type]
    assert not [name for name in found if name.startswith(("vllm", "tpworker_info"))]
    assert "tpworker_runtime_state" in found


def test_a_registry_of_ones_own(runtime: FakeRuntime) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(runtime, "theirs", registry)  # type: ignore[arg-type]
    assert metrics.registry is registry
    assert value(metrics, "vllm:num_requests_running", model_name="theirs", engine="0") == 3
    assert "process_cpu_seconds_total" not in metrics.text(), "theirs may have them already"
    assert "process_cpu_seconds_total" in Metrics(FakeRuntime()).text()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        Metrics(FakeRuntime(), registry=registry)  # type: ignore[arg-type]
    metrics.close()
    assert not runtime.listeners
    assert not metrics.text()
    Metrics(FakeRuntime(), registry=registry)  # type: ignore[arg-type]


def test_they_need_nothing_of_a_server() -> None:
    code = (
        "import sys; from tpworker.metrics import Metrics; "
        "print(*{'fastapi', 'starlette', 'uvicorn', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_without_the_library_it_is_said_what_to_install() -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import tpworker.metrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("pip install 'tpworker[metrics]'")


def test_a_runtime_that_lives_is_scraped_from_another_thread(tmp_path: Path) -> None:
    """As docs/observability.md has it for embedders."""

    async def main() -> dict[str, Metric]:
        model = fake_model(tmp_path / "model", step_seconds=0.002)
        runtime = Runtime(model, tensor_parallel_size=2, **FAKE_RANKS)
        metrics = Metrics(runtime)
        server, thread = prometheus_client.start_http_server(0, "127.0.0.1", metrics.registry)
        try:
            async with runtime:
                sampling = SamplingParams(max_tokens=30, n=2, detokenize=False)
                async for _ in runtime.generate([1, 2, 3], sampling):
                    pass
                url = f"http://127.0.0.1:{server.server_port}/metrics"
                page = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read())
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
        assert "tpworker_barrier" not in metrics.text(), "they are gone"
        return {metric.name: metric for metric in text_string_to_metric_families(page.decode())}

    found = asyncio.run(asyncio.wait_for(main(), 60))

    def of(name: str, **labels: str) -> float:
        samples = [
            s.value
            for metric in found.values()
            for s in metric.samples
            if s.name == name and labels.items() <= s.labels.items()
        ]
        assert len(samples) == 1, name
        return float(samples[0])

    assert of("vllm:generation_tokens_total", model_name="model") == 60
    assert of("vllm:time_to_first_token_seconds_count") == 2
    assert of("vllm:inter_token_latency_seconds_count") == 58
    assert of("vllm:request_success_total", finished_reason="length") == 2
    assert of("vllm:request_prompt_tokens_sum") == 6
    assert of("vllm:prompt_tokens_total") == of("vllm:request_prefill_kv_computed_tokens_sum") == 3
    steps = of("tpworker_steps_total")
    assert steps >= 30
    assert of("tpworker_step_seconds_count") == steps
    assert steps - 1 <= of("tpworker_publish_seconds_count") <= steps, "it is counted once it is sent"
    assert of("tpworker_step_seconds_sum") >= 0.002 * steps
    assert 1 <= of("tpworker_compose_seconds_count") <= steps
    for rank in "01":
        assert of("tpworker_barrier_wait_seconds_count", rank=rank) >= steps
    assert sum(of("tpworker_barrier_last_arrivals_total", rank=rank) for rank in "01") > 0
    for process in ("scheduler", "rank0", "rank1"):
        assert of("tpworker_process_cpu_seconds_total", process=f"tpworker-{process}") < 60
        assert of("tpworker_process_resident_memory_bytes", process=f"tpworker-{process}") > 1 << 20
