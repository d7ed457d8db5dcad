"""/metrics, and the two models endpoints' like."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tpworker.outputs import RequestOutput, StepRecord
from tpworker.server.metrics import Metrics, Timing, step_gaps

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
        'tpworker_step_gap_seconds{quantile="0.5"}': 2e-7,
        "tpworker_time_to_first_token_seconds_count": 2,
        "tpworker_time_per_output_token_seconds_count": 2,
        "tpworker_request_duration_seconds_count": 2,
    }
    assert {name: server.metric(name) for name in expected} == expected


def output(text: str, finish: str | None, count: int) -> RequestOutput:
    return RequestOutput("r", text, (1,), finish, None, 1, 0, count)  # type: ignore[arg-type]


def test_times_are_counted_once_a_choice() -> None:
    metrics = Metrics(FakeRuntime())  # type: ignore[arg-type]
    timing = Timing(metrics)
    for index in (0, 1):
        for count in range(1, 5):
            timing.add(index, output("x", "stop" if count == 4 else None, count))
    timing.add(2, output("x", "length", 1))  # one token has no time between tokens
    registry = metrics.registry
    assert samples(registry, "tpworker_time_to_first_token_seconds_count") == 3
    assert samples(registry, "tpworker_time_per_output_token_seconds_count") == 2
    assert samples(registry, "tpworker_request_duration_seconds_count") == 3
    first, whole = (
        samples(registry, f"tpworker_{name}_seconds_sum")
        for name in ("time_to_first_token", "request_duration")
    )
    assert 0 < first < whole


def test_step_gaps_are_those_with_work_to_do() -> None:
    def step(number: int, num_decodes: int, started: int, ended: int) -> StepRecord:
        return StepRecord(number, 0, num_decodes, 0, started, ended)

    steps = [
        step(1, 0, 0, 100),
        step(2, 1, 130, 200),
        step(3, 1, 210, 300),
        step(4, 0, 9000, 9100),  # nobody was there to decode: the device was idle, not late
        step(7, 1, 9900, 9950),  # not the next one
    ]
    assert step_gaps(steps) == [10e-9, 30e-9]
    assert step_gaps([]) == []
