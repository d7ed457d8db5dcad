"""Fields that people know from other engines, and what there is here instead: for RuntimeConfig and
SamplingParams, as cli/habits.py is for the command line.

From vLLM's `LLM` and `SamplingParams`, SGLang's `Engine` and its sampling parameters, TensorRT-LLM's and
transformers'. None of them is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

_ON = "always so: leave it out"
_STEPS = "not needed: steps on GPUs are always graph replays, and their sizes are chosen at the start"
_CHOSEN = "not needed: chosen by device and model"
_WITH_MODEL = "not supported: it is read from the model's folder, put another one there"
_ONE_KIND = "not supported yet: tensor parallelism (tensor_parallel_size) on one machine is all there is"
_QUANTISED = "not supported yet: weights and KV cache are float32, bfloat16 or float16 (dtype)"
_DRAFTS = "see speculative_method ('ngram' or 'mtp') and num_speculative_tokens"
_ADAPTERS = "not supported yet: merge the adapter into the weights"
_TEXT_ONLY = "not supported: models of text only"
_NO_CODE = "not supported: no code but tpworker's own runs in its processes"
_SERVER = "an option of `tpworker serve`, which a runtime does not need"
_SIZED = "num_kv_blocks, or the share gpu_memory_utilization"

OPTIONS = {
    **dict.fromkeys(("model_path", "model_name_or_path", "hf_model"), "the name here is model"),
    **dict.fromkeys(("tp", "tp_size", "num_gpus"), "the name here is tensor_parallel_size"),
    **dict.fromkeys(("context_length", "max_seq_len"), "the name here is max_model_len"),
    **dict.fromkeys(
        ("max_batch_size", "max_running_requests", "max_concurrent_requests"), "the name here is max_num_seqs"
    ),
    **dict.fromkeys(
        ("max_num_tokens", "chunked_prefill_size", "max_prefill_tokens"),
        "the name here is max_num_batched_tokens",
    ),
    **dict.fromkeys(
        ("mem_fraction_static", "free_gpu_memory_fraction", "kv_cache_config"),
        "gpu_memory_utilization here, a share of what is free beside the weights",
    ),
    **dict.fromkeys(("page_size", "tokens_per_block"), "the name here is block_size"),
    **dict.fromkeys(("num_gpu_blocks_override", "max_total_tokens", "kv_cache_memory_bytes"), _SIZED),
    "random_seed": "the name here is seed",
    "schedule_policy": "the name here is scheduling_policy, 'fcfs' or 'priority'",
    "max_queued_requests": "the name here is max_queue",
    "watchdog_timeout": "the name here is step_timeout",
    "enable_prefix_caching": "the name here is prefix_caching, and it is on",
    "disable_radix_cache": "prefix_caching=False here",
    "enable_chunked_prefill": _ON,
    "enable_mixed_chunk": _ON,
    "async_scheduling": "always so: steps are launched ahead of their results (lookahead; 0: they are not)",
    "disable_overlap_schedule": "lookahead=0 here",
    "num_scheduler_steps": "not needed: steps are launched ahead of their results (lookahead)",
    "speculative_config": _DRAFTS,
    "speculative_model": _DRAFTS,
    "speculative_algorithm": _DRAFTS,
    "trust_remote_code": "not needed: no code of a model's folder is ever run",
    "code_revision": "not needed: no code of a model's folder is ever run",
    "swap_space": "not needed: a request that is preempted is computed again, and nothing is swapped",
    "preemption_mode": "not needed: a request that is preempted is computed again, and nothing is swapped",
    "cpu_offload_gb": "not supported: weights and KV cache stay on the device",
    **dict.fromkeys(
        (
            "enforce_eager", "max_seq_len_to_capture", "compilation_config", "disable_cuda_graph",
            "cuda_graph_max_bs", "cuda_graph_config", "enable_torch_compile", "torch_compile_config",
        ),
        _STEPS,
    ),
    **dict.fromkeys(
        (
            "attention_backend", "sampling_backend", "moe_backend", "attn_backend", "backend",
            "disable_custom_all_reduce", "use_v2_block_manager", "disable_async_output_proc",
        ),
        _CHOSEN,
    ),
    "distributed_executor_backend": "not needed: ranks are processes of this machine, started by this one, "
    "or by others (join_address)",
    **dict.fromkeys(
        (
            "tokenizer", "tokenizer_path", "tokenizer_mode", "tokenizer_revision", "hf_overrides",
            "hf_config_path", "generation_config", "rope_scaling", "rope_theta", "config_format",
        ),
        _WITH_MODEL,
    ),
    "override_generation_config": "not supported: edit generation_config.json in the model's folder",
    "skip_tokenizer_init": "not needed: a model without a tokenizer takes token ids",
    "revision": "not supported: `hf download NAME --revision …`, then give its folder",
    "download_dir": "not an option: the environment variable HF_HOME says where the hub's models lie",
    "hf_token": "not an option: set HF_TOKEN or run `hf auth login`",
    **dict.fromkeys(("quant_config", "calculate_kv_scales"), _QUANTISED),
    **dict.fromkeys(
        (
            "pipeline_parallel_size", "data_parallel_size", "pp_size", "dp_size", "ep_size",
            "enable_expert_parallel", "nnodes", "node_rank", "dist_init_addr", "moe_expert_parallel_size",
        ),
        _ONE_KIND,
    ),
    **dict.fromkeys(("enable_lora", "max_loras", "max_lora_rank", "lora_paths", "lora_modules"), _ADAPTERS),
    **dict.fromkeys(
        ("limit_mm_per_prompt", "mm_processor_kwargs", "allowed_local_media_path", "enable_multimodal"),
        _TEXT_ONLY,
    ),
    **dict.fromkeys(("logits_processors", "worker_cls", "worker_extension_cls", "scheduler_cls"), _NO_CODE),
    **dict.fromkeys(("task", "runner", "convert", "is_embedding"), "not supported: text is generated"),
    **dict.fromkeys(
        ("host", "port", "api_key", "served_model_name", "chat_template_content_format"), _SERVER
    ),
    "max_logprobs": "not an option: requests may ask for the 20 likeliest",
    **dict.fromkeys(
        ("guided_decoding_backend", "structured_outputs_config", "grammar_backend"),
        "not needed: llguidance, which is part of it, does that",
    ),
    **dict.fromkeys(("enable_sleep_mode", "enable_memory_saver"), "always so: Runtime.sleep and wake_up"),
    "log_level": "not an option: logging.getLogger('tpworker').setLevel(…)",
    **dict.fromkeys(("disable_log_stats", "disable_log_requests"), "not needed: see Runtime.add_listener"),
}  # fmt: skip
"""Of RuntimeConfig, and so of Runtime."""

_BEAMS = "not supported: there is no beam search"
_HELD = "StructuredOutputs(json=…, regex=…, choice=… or grammar=…) in structured_outputs here"
_ONLY_SAMPLING = "not supported: temperature, top_p, top_k and min_p are what there is"
_WHOLE = "not needed: outputs are what is new, and SyncRuntime.complete gives all of it at once"

SAMPLING = {
    **dict.fromkeys(
        ("max_new_tokens", "max_completion_tokens", "max_gen_len", "max_length", "max_output_tokens"),
        "the name here is max_tokens",
    ),
    **dict.fromkeys(("min_new_tokens", "min_length"), "the name here is min_tokens"),
    **dict.fromkeys(("stop_words", "stop_sequences", "stop_strings"), "the name here is stop"),
    **dict.fromkeys(("eos_token_id", "end_id", "stop_ids"), "the name here is stop_token_ids"),
    **dict.fromkeys(("random_seed", "sampling_seed"), "the name here is seed"),
    **dict.fromkeys(("num_return_sequences", "num_outputs"), "the name here is n"),
    "best_of": "n choices, of which you keep the likeliest by their logprobs, as the server does for best_of",
    **dict.fromkeys(
        ("use_beam_search", "num_beams", "beam_width", "length_penalty", "early_stopping"), _BEAMS
    ),
    "do_sample": "temperature=0 is greedy",
    **dict.fromkeys(
        ("logits_processors", "logits_processor", "custom_logit_processor", "custom_params"),
        "not supported: logit_bias, allowed_token_ids, bad_words, penalties and structured_outputs are what "
        "changes logits",
    ),
    **dict.fromkeys(
        (
            "guided_decoding", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar",
            "json_schema", "regex", "ebnf", "structural_tag", "response_format",
        ),
        _HELD,
    ),
    **dict.fromkeys(
        ("typical_p", "tfs", "top_a", "mirostat", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size"),
        _ONLY_SAMPLING,
    ),
    **dict.fromkeys(("output_kind", "stream", "stream_interval"), _WHOLE),
    "truncate_prompt_tokens": "not supported: a prompt that does not fit is refused",
    "spaces_between_special_tokens": "not needed: text is what the tokenizer makes of the tokens",
    "no_stop_trim": "include_stop_str_in_output=True here",
    "return_logprob": "logprobs=0 here, or as many of the likeliest as are wanted",
    "top_logprobs_num": "the name here is logprobs",
    **dict.fromkeys(
        ("logprob_token_ids", "flat_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"),
        "not supported: logprobs are of the token and of the likeliest",
    ),
    "skip_reading_prefix_cache": "a cache_salt of its own finds nothing that others have left",
    "thinking_token_budget": "not supported: max_tokens is what bounds an output",
    "repetition_detection": "not supported: penalties are what there is against repetition",
    "request_id": "an argument of Runtime.generate",
    **dict.fromkeys(("lora_request", "extra_args"), "not supported"),
}  # fmt: skip
"""Of SamplingParams."""


class Named:
    """A dataclass whose unknown fields are answered by what is called so elsewhere."""

    _elsewhere: ClassVar[Mapping[str, str]] = {}
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        for name in named:
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"{cls.__name__} has no {name}: {_instead(cls, name)}")
        return super().__new__(cls)


def _instead(cls: type[Named], name: str) -> str:
    if name in cls._elsewhere:
        return cls._elsewhere[name]
    import difflib  # not before there is something to be said

    near = difflib.get_close_matches(name, [*cls.__dataclass_fields__], n=1, cutoff=0.7)
    return f"is {near[0]} meant?" if near else f"its fields are {', '.join(cls.__dataclass_fields__)}"
