"""/metrics over HTTP, and what the front counts itself. The rest of its metrics: tests/metrics."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from tests.observe.fake_nvml import GIB, FakeGpu, FakeNvml
from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tpworker.config import RuntimeConfig
from tpworker.observe.nvml import Nvml, find_gpus
from tpworker.observe.watch import GpuState, GpuWatch
from tpworker.outputs import RequestOutput, RuntimeState, StepRecord
from tpworker.server.timing import OUTCOMES, FrontMetrics, Timing

Start = Callable[..., LiveServer]


def samples(registry: CollectorRegistry, name: str) -> float:
    value = registry.get_sample_value(name)
    assert value is not None
    return value


def test_the_page_tells_how_the_runtime_does(start: Start) -> None:
    server = start()
    server.post("/v1/completions", json={"prompt": ["abcd", "ef"], "max_tokens": 5})
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert list(text_string_to_metric_families(response.text))
    expected = {
        'tpworker_requests_total{outcome="ok"}': 1,
        "tpworker_prompt_tokens_total": 6,
        "tpworker_output_tokens_total": 10,
        "tpworker_cached_prompt_tokens_total": 7,
        "tpworker_preemptions_total": 3,
        "tpworker_finished_requests_total": 2,
        "tpworker_aborted_requests_total": 0,
        "tpworker_steps_total": 4,
        "tpworker_open_requests": 0,
        "tpworker_running_requests": 0,
        "tpworker_waiting_requests": 0,
        "tpworker_free_kv_blocks": 90,
        "tpworker_kv_blocks": 100,
        "tpworker_time_to_first_token_seconds_count": 2,
        "tpworker_time_per_output_token_seconds_count": 2,
        "tpworker_request_duration_seconds_count": 2,
    }
    assert {name: server.metric(name) for name in expected} == expected
    for outcome in OUTCOMES:
        assert f'tpworker_requests_total{{outcome="{outcome}"}} ' in response.text, "a first one is a change"


def test_faults_and_recoveries_are_counted(start: Start) -> None:
    server = start(FakeRuntime(lost=(("rank", 2), ("scheduler", 1)), resumed_requests=40))
    for _ in range(2):
        server.call(server.runtime.lose)
        assert server.metric('tpworker_runtime_state{state="recovering"}') == 1
        assert server.metric('tpworker_runtime_state{state="ready"}') == 0
        server.call(server.runtime.recover, 0.75)
        assert server.metric('tpworker_runtime_state{state="ready"}') == 1
    for _ in range(100):  # more than the runtime remembers, and nobody scrapes meanwhile
        server.call(server.runtime.recover, 2.5)
    expected = {
        "tpworker_restarts_total": 102,
        "tpworker_resumed_requests_total": 40,
        'tpworker_lost_processes_total{process="rank"}': 2,
        'tpworker_lost_processes_total{process="scheduler"}': 1,
        "tpworker_recovery_seconds_count": 102,
        "tpworker_recovery_seconds_sum": 251.5,
        'tpworker_recovery_seconds_bucket{le="0.5"}': 0,
        'tpworker_recovery_seconds_bucket{le="1.0"}': 2,
    }
    assert {name: server.metric(name) for name in expected} == expected
    page = server.get("/metrics").text
    for process in ("standby", "keeper"):
        assert f'tpworker_lost_processes_total{{process="{process}"}} 0.0\n' in page, (
            "a first one is a change"
        )
    assert page.count("tpworker_runtime_state{") == len(get_args(RuntimeState))


def test_what_is_served_and_on_what(start: Start) -> None:
    import tpworker

    told = (
        'device="cpu",model="fake-model",quantization="none",speculative_method="none",'
        'tensor_parallel_size="1",'
        f'version="{tpworker.__version__}"'
    )
    assert start().metric(f"tpworker_info{{{told}}}") == 1
    assert 'model="named"' in start(served_model_names=("named",)).get("/metrics").text
    assert "tpworker_info{" not in start(FakeRuntime(state="starting", is_found=False)).get("/metrics").text


def test_when_a_series_was_made_is_nobodys_business_but_other_registries(start: Start) -> None:
    server = start()
    server.post("/v1/completions", json={"prompt": "abcd", "max_tokens": 5})
    assert "_created" not in server.get("/metrics").text
    theirs = CollectorRegistry()
    Counter("theirs", "Of the program that embeds us.", registry=theirs).inc()
    assert theirs.get_sample_value("theirs_created") is not None


def test_without_drafts_there_is_nothing_of_them(start: Start) -> None:
    assert "draft" not in start().get("/metrics").text


def test_drafts_by_position(start: Start) -> None:
    runtime = FakeRuntime(configured=RuntimeConfig(speculative_method="ngram", num_speculative_tokens=3))
    server = start(runtime)
    assert 'speculative_method="ngram"' in server.get("/metrics").text
    assert server.metric('tpworker_draft_tokens_total{position="3"}') == 0, "from the start on"
    runtime.draft_tokens, runtime.accepted_tokens = (9, 7, 2), (5, 3, 1)
    expected = {
        'tpworker_draft_tokens_total{position="1"}': 9,
        'tpworker_draft_tokens_total{position="3"}': 2,
        'tpworker_accepted_draft_tokens_total{position="1"}': 5,
        'tpworker_accepted_draft_tokens_total{position="3"}': 1,
        "tpworker_step_drafts": 2,
    }
    for listener in runtime.listeners:
        server.call(listener.on_step, StepRecord(0, 0, 1, 0, 100, 900, 2))
    assert {name: server.metric(name) for name in expected} == expected


def gpu_states(library: FakeNvml) -> tuple[GpuState, ...]:
    watch = GpuWatch(find_gpus(Nvml(library), {}).gpus, Nvml(library))
    try:
        return watch.states()
    finally:
        watch.close()


def test_without_gpus_there_is_nothing_of_them(start: Start) -> None:
    assert "tpworker_gpu" not in start().get("/metrics").text


def test_the_ranks_gpus(start: Start) -> None:
    library = FakeNvml(["GPU-a", FakeGpu("GPU-b", temperature=70, ecc=(5, 1))])
    states = gpu_states(library)
    server = start(FakeRuntime(gpu_states=(states[0], replace(states[1], num_xids=2))))
    second = 'gpu="1",rank="1",uuid="GPU-b"'
    expected = {
        'tpworker_gpu_temperature_celsius{gpu="0",rank="0",uuid="GPU-a"}': 34,
        f"tpworker_gpu_temperature_celsius{{{second}}}": 70,
        f"tpworker_gpu_power_watts{{{second}}}": 75.5,
        f"tpworker_gpu_memory_used_bytes{{{second}}}": GIB,
        f"tpworker_gpu_memory_bytes{{{second}}}": 141 * GIB,
        'tpworker_gpu_ecc_errors_total{gpu="1",kind="corrected",rank="1",uuid="GPU-b"}': 5,
        'tpworker_gpu_ecc_errors_total{gpu="1",kind="uncorrected",rank="1",uuid="GPU-b"}': 1,
        f"tpworker_gpu_xid_errors_total{{{second}}}": 2,
    }
    assert {name: server.metric(name) for name in expected} == expected


def test_what_a_gpu_does_not_tell_has_no_sample(start: Start) -> None:
    refused = [
        f"nvml{what}"
        for what in (
            "DeviceGetPowerUsage",
            "DeviceGetTotalEccErrors",
            "DeviceGetMemoryInfo",
            "EventSetCreate",
        )
    ]
    server = start(FakeRuntime(gpu_states=gpu_states(FakeNvml(["GPU-a"], refused=refused))))
    names = set(re.findall(r"^tpworker_gpu_\w+", server.get("/metrics").text, re.MULTILINE))
    assert names == {"tpworker_gpu_temperature_celsius"}


def test_gpus_are_asked_beside_the_event_loop(start: Start) -> None:
    threads: list[threading.Thread] = []

    class Watched(FakeRuntime):
        def gpus(self) -> tuple[GpuState, ...]:
            threads.append(threading.current_thread())
            return ()

    server = start(Watched())
    server.get("/metrics")
    loop = server.call(threading.current_thread)
    assert threads[0] is not loop, "what follows there finds fresh readings"


def output(text: str, finish: str | None, count: int) -> RequestOutput:
    return RequestOutput("r", text, (1,), finish, None, 1, 0, count)  # type: ignore[arg-type]


def test_times_are_counted_once_a_choice() -> None:
    metrics = FrontMetrics()
    timing = Timing(metrics)
    for index in (0, 1):
        for count in range(1, 5):
            timing.add(index, output("x", "stop" if count == 4 else None, count))
    timing.add(2, output("x", "length", 1))  # one token has no time between tokens
    registry = CollectorRegistry()
    registry.register(metrics)
    assert samples(registry, "tpworker_time_to_first_token_seconds_count") == 3
    assert samples(registry, "tpworker_time_per_output_token_seconds_count") == 2
    assert samples(registry, "tpworker_request_duration_seconds_count") == 3
    first, whole = (
        samples(registry, f"tpworker_{name}_seconds_sum")
        for name in ("time_to_first_token", "request_duration")
    )
    assert 0 < first < whole


def test_the_time_per_token_is_that_of_each_where_several_come_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    metrics = FrontMetrics()
    timing = Timing(metrics)
    for finish, count in ((None, 1), (None, 5), ("length", 9)):
        timing.add(0, output("xxxx", finish, count))
    assert metrics.each_token.total == 2 / 8
