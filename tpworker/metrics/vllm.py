"""vLLM's metrics, by its names: its dashboards, alerts, routers and autoscalers ask for these.

docs/observability.md says what each means here. Older names that are still asked for are here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tpworker.config import RuntimeConfig
from tpworker.metrics.histogram import Histogram, family
from tpworker.metrics.recorder import Recorder
from tpworker.outputs import Stats


def engine_metrics(
    stats: Stats,
    recorder: Recorder,
    config: RuntimeConfig,
    *,
    model: str,
    dtype: str,
    max_model_len: int,
    num_drafts: int,
) -> Iterable[Metric]:
    """All of them.

    Args:
        model: its name, for the label `model_name`.
        dtype: of the KV cache.
        max_model_len: lengths of prompts and outputs go up to it.
        num_drafts: of a request in a step, at most; 0: there are none, and no metrics of them.
    """
    labels = {"model_name": model, "engine": "0"}
    yield from _load(stats, labels)
    yield from _ends(recorder, labels)
    yield from _times(recorder, labels)
    yield from _lengths(recorder, labels, max_model_len)
    if num_drafts:
        yield from _drafts(stats, labels, num_drafts)
    yield _cache_config(stats, config, dtype)


def _load(stats: Stats, labels: Mapping[str, str]) -> Iterable[Metric]:
    used = 1 - stats.free_blocks / stats.total_blocks if stats.total_blocks else 0.0
    computed = stats.prompt_tokens - stats.cached_tokens
    gauges = {
        "num_requests_running": ("Requests that have a slot.", stats.running),
        "num_requests_waiting": ("Requests that wait for a slot.", stats.waiting),
        "kv_cache_usage_perc": ("Share of KV blocks that are in use, from 0 to 1.", used),
        "gpu_cache_usage_perc": ("As kv_cache_usage_perc; its name in older versions.", used),
    }
    counters = {
        "num_preemptions": ("Requests put back into the queue for want of KV blocks.", stats.preemptions),
        "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
        "prompt_tokens_cached": ("Tokens of prompts found in the prefix cache.", stats.cached_tokens),
        "generation_tokens": ("Tokens generated.", stats.output_tokens),
    }
    for prefix in ("", "gpu_"):
        counters[f"{prefix}prefix_cache_queries"] = (
            "Tokens looked for in the prefix cache.",
            stats.prompt_tokens,
        )
        counters[f"{prefix}prefix_cache_hits"] = ("Tokens found in the prefix cache.", stats.cached_tokens)
    names, values = list(labels), list(labels.values())
    for name, (text, number) in gauges.items():
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=names)
        gauge.add_metric(values, number)
        yield gauge
    for name, (text, count) in counters.items():
        counter = CounterMetricFamily(f"vllm:{name}", text, labels=names)
        counter.add_metric(values, count)
        yield counter
    waiting = GaugeMetricFamily(
        "vllm:num_requests_waiting_by_reason", "Requests that wait, and for what.", labels=[*names, "reason"]
    )
    waiting.add_metric([*values, "capacity"], stats.waiting)
    yield waiting
    source = CounterMetricFamily(
        "vllm:prompt_tokens_by_source",
        "Tokens of prompts, by where their KV is from.",
        labels=[*names, "source"],
    )
    source.add_metric([*values, "local_compute"], computed)
    source.add_metric([*values, "local_cache_hit"], stats.cached_tokens)
    yield source


def _ends(recorder: Recorder, labels: Mapping[str, str]) -> Iterable[Metric]:
    ends = CounterMetricFamily(
        "vllm:request_success", "Requests that ended, by why.", labels=[*labels, "finished_reason"]
    )
    for reason, count in recorder.ends.items():
        ends.add_metric([*labels.values(), reason], count)
    yield ends


def _times(recorder: Recorder, labels: Mapping[str, str]) -> Iterable[Metric]:
    each_token = "From each token after the first to the next."
    histograms: dict[str, tuple[str, Histogram]] = {
        "time_to_first_token": ("From a request's arrival to its first token.", recorder.first_token),
        "inter_token_latency": (each_token, recorder.between_tokens),
        "time_per_output_token": (
            "As inter_token_latency_seconds; its name in older versions.",
            recorder.between_tokens,
        ),
        "request_time_per_output_token": (
            "Mean time of a request's tokens after the first.",
            recorder.token_mean,
        ),
        "e2e_request_latency": ("From a request's arrival to its last token.", recorder.whole),
        "request_queue_time": ("From a request's queuing to its first step.", recorder.queue),
        "request_prefill_time": ("From a request's first step to its first token.", recorder.prefill),
        "request_decode_time": ("From a request's first token to its last.", recorder.decode),
        "request_inference_time": ("From a request's first step to its last token.", recorder.inference),
    }
    for name, (text, histogram) in histograms.items():
        yield family(f"vllm:{name}_seconds", text, [histogram.series(labels)])


def _lengths(recorder: Recorder, labels: Mapping[str, str], max_model_len: int) -> Iterable[Metric]:
    histograms: dict[str, tuple[str, Histogram]] = {
        "request_prompt_tokens": ("Tokens of a request's prompt.", recorder.prompt_length),
        "request_prefill_kv_computed_tokens": (
            "Tokens of a request's prompt that were not in the prefix cache.",
            recorder.computed_length,
        ),
        "request_generation_tokens": ("Tokens of a request's output.", recorder.output_length),
        "request_max_num_generation_tokens": (
            "Tokens of the longest of a request's outputs.",
            recorder.longest_output,
        ),
        "request_params_max_tokens": ("A request's max_tokens, where it has one.", recorder.max_tokens),
    }
    for name, (text, histogram) in histograms.items():
        yield family(f"vllm:{name}", text, [histogram.series(labels, most=max_model_len)])
    yield family("vllm:request_params_n", "A request's n.", [recorder.choices.series(labels)])
    yield family(
        "vllm:iteration_tokens_total",
        "Tokens of a step: of prompts, and one for each request that decodes.",
        [recorder.step_tokens.series(labels)],
    )


def _drafts(stats: Stats, labels: Mapping[str, str], num_drafts: int) -> Iterable[Metric]:
    counters = {
        "num_drafts": ("Requests and steps that had drafts.", next(iter(stats.draft_tokens), 0)),
        "num_draft_tokens": ("Drafts that steps have checked.", sum(stats.draft_tokens)),
        "num_accepted_tokens": ("Drafts that were right, and all before them.", sum(stats.accepted_tokens)),
    }
    for name, (text, count) in counters.items():
        counter = CounterMetricFamily(f"vllm:spec_decode_{name}", text, labels=list(labels))
        counter.add_metric(list(labels.values()), count)
        yield counter
    by_position = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Drafts that were right, by their position, the first of which is 0.",
        labels=[*labels, "position"],
    )
    for position, count in zip_longest(range(num_drafts), stats.accepted_tokens, fillvalue=0):
        by_position.add_metric([*labels.values(), str(position)], count)
    yield by_position


def _cache_config(stats: Stats, config: RuntimeConfig, dtype: str) -> Metric:
    """It has no label `model_name`: vLLM's has none."""
    labels = {
        "engine": "0",
        "block_size": str(config.block_size),
        "cache_dtype": dtype,
        "enable_prefix_caching": str(config.prefix_caching),
        "gpu_memory_utilization": str(config.gpu_memory_utilization),
        "num_gpu_blocks": str(stats.total_blocks),
        "kv_cache_size_tokens": str(stats.total_blocks * config.block_size),
    }
    gauge = GaugeMetricFamily("vllm:cache_config_info", "The KV cache, in labels.", labels=list(labels))
    gauge.add_metric(list(labels.values()), 1)
    return gauge
