"""What is counted as it happens, through times that are known."""

from __future__ import annotations

import random
from bisect import bisect_left

import pytest

from tpworker import RequestRecord, RuntimeEvent, SamplingParams, StepRecord
from tpworker.metrics.histogram import Histogram, family
from tpworker.metrics.recorder import Recorder


def counted(histogram: Histogram) -> tuple[int, float]:
    return sum(histogram.counts), pytest.approx(histogram.total)


def record(**changes: object) -> RequestRecord:
    """A request of 10 tokens, 4 of them cached, that waited 0.25 s and had 5 tokens in 2 s."""
    values = {
        "request_id": "r", "index": 0, "finish_reason": "stop", "error": None,
        "num_prompt_tokens": 10, "num_cached_tokens": 4, "num_output_tokens": 5,
        "num_draft_tokens": 0, "num_accepted_tokens": 0, "num_resumed": 0,
        "arrived": 100.0, "submitted": 100.5, "started": 100.75, "first_token": 101.0, "last_token": 103.0,
        "ended": 109.0, "sampling": SamplingParams(max_tokens=7),
    }  # fmt: skip
    return RequestRecord(**{**values, **changes})  # type: ignore[arg-type]


def test_a_histogram_is_prometheus_own() -> None:
    """Bounds belong to the bucket below; buckets are cumulative; the last is +Inf."""
    histogram, random_ = Histogram((0.5, 1, 2)), random.Random(1)
    values = [0.5, 1.0, 2.0, 2.0001, *(random_.uniform(0, 3) for _ in range(50))]
    for value in values:
        histogram.observe(value)
    histogram.observe(0.75, 3)
    values += [0.75] * 3
    made = family("x_seconds", "Text.", [histogram.series({"rank": "1"})])
    found = {s.labels["le"]: s.value for s in made.samples if s.name == "x_seconds_bucket"}
    assert list(found) == ["0.5", "1.0", "2.0", "+Inf"]
    assert found == {le: sum(value <= float(le) for value in values) for le in found}
    rest = {s.name: s.value for s in made.samples if "bucket" not in s.name}
    assert rest == {"x_seconds_count": len(values), "x_seconds_sum": pytest.approx(sum(values))}
    assert {s.labels["rank"] for s in made.samples} == {"1"}


def test_bounds_that_nothing_reaches_are_not_told() -> None:
    histogram = Histogram((1, 2, 5, 10))
    for value in (1, 5, 7):
        histogram.observe(value)
    at_most_5 = family("x", "Text.", [histogram.series(most=5)])
    assert [s.labels["le"] for s in at_most_5.samples if "le" in s.labels] == ["1.0", "2.0", "5.0", "+Inf"]
    made = family("x", "Text.", [histogram.series(most=7)])
    assert [(s.labels["le"], s.value) for s in made.samples if "le" in s.labels] == [
        ("1.0", 1), ("2.0", 1), ("5.0", 2), ("+Inf", 3)
    ]  # fmt: skip


def test_the_times_of_a_request() -> None:
    recorder = Recorder()
    recorder.on_request_end(record())
    assert counted(recorder.whole) == (1, 3.0), "to its last token, however late that was taken"
    assert counted(recorder.preparation) == (1, 0.5)
    assert counted(recorder.queue) == (1, 0.25)
    assert counted(recorder.prefill) == (1, 0.25)
    assert counted(recorder.decode) == (1, 2.0)
    assert counted(recorder.inference) == (1, 2.25)
    assert counted(recorder.token_mean) == (1, 0.5)
    assert counted(recorder.prompt_length) == (1, 10)
    assert counted(recorder.computed_length) == (1, 6)
    assert counted(recorder.output_length) == (1, 5)
    assert counted(recorder.max_tokens) == (1, 7)
    assert recorder.ends == {"stop": 1, "length": 0, "abort": 0, "error": 0}
    recorder.on_request_end(record(num_output_tokens=1, sampling=SamplingParams(max_tokens=None)))
    assert counted(recorder.token_mean)[0] == 1, "one token has no time between tokens"
    assert counted(recorder.max_tokens)[0] == 1, "it had none"


@pytest.mark.parametrize(
    "changes",
    [
        {"finish_reason": "abort"},
        {"finish_reason": None, "error": "it ends the processes"},
        {"finish_reason": "abort", "started": None, "first_token": None, "last_token": None},
    ],
    ids=str,
)
def test_of_what_did_not_come_to_its_end_only_that_counts(changes: dict[str, object]) -> None:
    recorder = Recorder()
    recorder.on_request_end(record(**changes))
    assert recorder.ends[changes["finish_reason"] or "error"] == sum(recorder.ends.values()) == 1  # type: ignore[index]
    for histogram in (recorder.whole, recorder.queue, recorder.output_length, recorder.prompt_length):
        assert counted(histogram) == (0, 0.0)


def test_choices_are_requests_and_what_they_share_counts_once() -> None:
    recorder, params = Recorder(), SamplingParams(n=3)
    ends = ((0, 4, "stop"), (2, 9, "abort"), (1, 6, "length"))
    for index, tokens, reason in ends:
        assert counted(recorder.choices)[0] == 0
        recorder.on_request_end(
            record(index=index, num_output_tokens=tokens, finish_reason=reason, sampling=params)
        )
    assert counted(recorder.choices) == (1, 3)
    assert counted(recorder.longest_output) == (1, 9)
    assert counted(recorder.output_length) == (2, 10)
    assert counted(recorder.computed_length) == (2, 6), "the prompt was computed by the first"
    assert not recorder._siblings


def test_tokens_of_one_step_share_its_time() -> None:
    recorder = Recorder()
    recorder.on_first_tokens([0.25, 4.0])
    recorder.on_tokens([(1, 0.004), (3, 0.006), (1, 0.004)])
    recorder.on_tokens([(1, 100.0)])
    assert counted(recorder.first_token) == (2, 4.25)
    between = recorder.between_tokens
    assert counted(between) == (6, 100.014)
    assert between.counts[bisect_left(between.bounds, 0.002)] == 3
    assert between.counts[bisect_left(between.bounds, 0.004)] == 2
    assert between.counts[-1] == 1


def step(number: int, launched: int, started: int, ended: int, num_decodes: int = 1) -> StepRecord:
    return StepRecord(number, 3, num_decodes, launched, started, ended)


def test_gaps_and_how_far_ahead_steps_were_launched() -> None:
    recorder = Recorder()
    recorder.on_step(step(0, 0, 1_000, 5_000, num_decodes=0))
    recorder.on_step(step(1, 2_000, 5_000, 9_000))  # while one ran
    recorder.on_step(step(2, 3_000, 9_500, 12_000))  # while one ran, and one waited
    recorder.on_step(step(3, 12_000, 15_500, 16_500))  # when all had ended
    recorder.on_step(step(4, 10**9, 10**9, 10**9 + 5, num_decodes=0))  # nobody was there to decode before
    assert counted(recorder.gap) == (3, 4e-6)
    assert recorder.ahead.counts[:4] == [1, 1, 1, 0]
    assert counted(recorder.step) == (5, 11.505e-6)
    assert counted(recorder.step_tokens) == (5, 5 * 3 + 3)


def test_clocks_that_differ_by_nanoseconds_are_no_gap() -> None:
    recorder = Recorder()
    recorder.on_step(step(0, 0, 0, 1_000))
    recorder.on_step(step(1, 0, 990, 2_000))
    assert counted(recorder.gap) == (1, 0.0)


def test_a_recovery_is_no_gap() -> None:
    def event(kind: str, seconds: float | None = None) -> RuntimeEvent:
        return RuntimeEvent(kind, 0.0, 1, "tpworker-rank1", "was killed", seconds)  # type: ignore[arg-type]

    recorder = Recorder([event("lost"), event("recovering"), event("recovered", 0.75)])
    recorder.on_step(step(0, 0, 0, 1_000))
    recorder.on_event(event("lost"))
    recorder.on_event(event("recovered", 2.5))
    recorder.on_step(step(1, 2 * 10**9, 2 * 10**9, 2 * 10**9 + 5))
    assert counted(recorder.gap) == (0, 0.0)
    assert counted(recorder.ahead) == (0, 0.0)
    assert counted(recorder.recovery) == (2, 3.25)
    for kind in ("sleeping", "updating"):  # and no recovery, either
        recorder.on_event(event(kind, 1.5))
        recorder.on_step(step(2, 3 * 10**9, 3 * 10**9, 3 * 10**9 + 5))
    assert (counted(recorder.gap), counted(recorder.recovery)) == ((0, 0.0), (2, 3.25))
