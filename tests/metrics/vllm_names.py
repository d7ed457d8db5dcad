"""What vLLM 0.2x and 0.3x serve at /metrics, of what is here too: types, labels, bounds.

Names are without the `_total` of counters, as in `# TYPE` of the OpenMetrics format.
"""

from __future__ import annotations

BOTH = frozenset({"model_name", "engine"})

GAUGES = {
    "num_requests_running": BOTH,
    "num_requests_waiting": BOTH,
    "num_requests_waiting_by_reason": BOTH | {"reason"},
    "kv_cache_usage_perc": BOTH,
    "gpu_cache_usage_perc": BOTH,  # until 0.10
}
COUNTERS = {
    "prefix_cache_queries": BOTH,
    "prefix_cache_hits": BOTH,
    "gpu_prefix_cache_queries": BOTH,  # until 0.10
    "gpu_prefix_cache_hits": BOTH,  # until 0.10
    "num_preemptions": BOTH,
    "prompt_tokens": BOTH,
    "prompt_tokens_cached": BOTH,
    "prompt_tokens_by_source": BOTH | {"source"},
    "generation_tokens": BOTH,
    "request_success": BOTH | {"finished_reason"},
}
WITH_DRAFTS = {
    "spec_decode_num_drafts": BOTH,
    "spec_decode_num_draft_tokens": BOTH,
    "spec_decode_num_accepted_tokens": BOTH,
    "spec_decode_num_accepted_tokens_per_pos": BOTH | {"position"},
}
"""Counters."""

_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # and on, to max_model_len
_EACH_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
        *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
    ),
    "inter_token_latency_seconds": _EACH_TOKEN,
    "time_per_output_token_seconds": _EACH_TOKEN,  # until 0.12
    "request_time_per_output_token_seconds": _EACH_TOKEN,
    "e2e_request_latency_seconds": _REQUEST,
    "request_queue_time_seconds": _REQUEST,
    "request_prefill_time_seconds": _REQUEST,
    "request_decode_time_seconds": _REQUEST,
    "request_inference_time_seconds": _REQUEST,
    "request_prompt_tokens": _LENGTHS,
    "request_prefill_kv_computed_tokens": _LENGTHS,
    "request_generation_tokens": _LENGTHS,
    "request_max_num_generation_tokens": _LENGTHS,
    "request_params_max_tokens": _LENGTHS,
    "request_params_n": (1, 2, 5, 10, 20),
    "iteration_tokens_total": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
}
"""With the bounds of their buckets."""

CACHE_CONFIG = {"engine", "block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization",
                "num_gpu_blocks", "kv_cache_size_tokens"}  # fmt: skip
"""Labels of cache_config_info, which has no model_name."""
