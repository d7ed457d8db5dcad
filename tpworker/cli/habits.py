"""Options that people know from other engines, and what holds here instead. How it is told: explain.py.

From the command lines of vLLM, SGLang, TensorRT-LLM and FastDeploy. None of them is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NAMES = {
    "-m": "--model",
    "--ssl-key": "--ssl-keyfile",
    "--ssl-cert": "--ssl-certfile",
    "--model-path": "--model",
    "--model-name-or-path": "--model",
    "--tp": "-tp or --tensor-parallel-size",
    "--tp-size": "-tp or --tensor-parallel-size",
    "--tensor-parallel": "-tp or --tensor-parallel-size",
    "--max-batch-size": "--max-num-seqs",
    "--max-running-requests": "--max-num-seqs",
    "--max-concurrent-requests": "--max-num-seqs",
    "--max-num-tokens": "--max-num-batched-tokens",
    "--chunked-prefill-size": "--max-num-batched-tokens",
    "--max-prefill-tokens": "--max-num-batched-tokens",
    "--long-prefill-token-threshold": "--max-num-batched-tokens",
    "--context-length": "--max-model-len",
    "--max-seq-len": "--max-model-len",
    "--max-input-len": "--max-model-len, for prompt and output together",
    "--mem-fraction-static": "--gpu-memory-utilization, a share of what is free beside the weights",
    "--free-gpu-memory-fraction": "--gpu-memory-utilization, a share of what is free beside the weights",
    "--kv-cache-free-gpu-memory-fraction": (
        "--gpu-memory-utilization, a share of what is free beside the weights"
    ),
    "--page-size": "--block-size",
    "--tokens-per-block": "--block-size",
    "--random-seed": "--seed",
    "--schedule-policy": "--scheduling-policy, fcfs or priority",
    "--enable-priority-scheduling": "--scheduling-policy priority",
    "--max-queued-requests": "--max-queue",
    "--watchdog-timeout": "--step-timeout",
    "--graceful-timeout": "--shutdown-timeout",
    "--otlp-traces-endpoint": "--otlp-endpoint, by OTLP over HTTP (port 4318, not 4317)",
    "--profiler-config": "--trace FILE, a timeline",
    "--timeout-graceful-shutdown": "--shutdown-timeout",
    "--migration-limit": "--max-restarts, of the ranks and not of a request: all that is open goes on",
    "--disable-radix-cache": "--no-prefix-caching",
    "--no-enable-prefix-caching": "--no-prefix-caching",
    "--disable-overlap-schedule": "--no-enable-overlap-schedule",
    "--no-async-scheduling": "--no-enable-overlap-schedule",
    "--speculative-algorithm": "--speculative-method, ngram (NGRAM) or mtp (NEXTN)",
    "--speculative-num-steps": "--num-speculative-tokens",
    "--speculative-num-draft-tokens": "--num-speculative-tokens, one less: the token before them is none",
    "--speculative-ngram-max-match-window-size": "--prompt-lookup-max",
    "--speculative-ngram-min-match-window-size": "--prompt-lookup-min",
    "--ngram-prompt-lookup-max": "--prompt-lookup-max",
    "--ngram-prompt-lookup-min": "--prompt-lookup-min",
    "--uvicorn-log-level": "--log-level",
    "--log-level-http": "--log-level",
    "--disable-log-requests": "--no-log-requests",
    "--no-enable-log-requests": "--no-log-requests",
    "--max-log-len": "--log-prompts CHARS",
    "--log-requests-level": "--log-prompts, without which no text of requests is logged",
    "--enable-memory-saver": "--enable-sleep-mode",
    "--tool-parser": "--tool-call-parser",
    "--spec-method": "--speculative-method",
    "-q": "--quantization",
    "--spec-tokens": "--num-speculative-tokens",
}
"""What has another name here."""

_ON = "always on: leave it out"
_STEPS = "not needed: steps on GPUs are always graph replays, and their sizes are chosen at the start"
_EACH = "always on (--no-log-requests switches it off): leave it out"
_PROBES = "not needed: probes and pages are logged with --log-level debug alone"
_STATISTICS = "not needed: each request has a line in the log, and /metrics has the rest"
_OUTPUTS = "not supported: what models answer is not logged"
_CHOSEN = "not needed: chosen by device and model"
_LOCAL = "not needed: ranks are processes of this machine, started by this one, or by others (--join-address)"
_PORTS = "not needed: processes talk without ports, and /metrics is on --port"
_WITH_MODEL = "not supported: it is read from the model's folder, put another one there"
_ONE_KIND = "not supported yet: tensor parallelism (-tp) on one machine is all there is"
QUANTISED = (
    "not supported: weights are in float32, bfloat16 or float16 (--dtype), or in FP8 (--quantization fp8)"
)
DRAFT_MODEL = (
    "not supported: drafts come from n-grams (--speculative-method ngram) or from the model's own next-token "
    "layer (--speculative-method mtp)"
)
_DRAFT_TREE = "not needed: drafts are a sequence, of up to --num-speculative-tokens"
_DRAFT_HISTORY = "not needed: n-grams are looked up in the request's own prompt and output"
_ACCEPTED = "not needed: outputs are those without drafts, whatever the sampling"
_ADAPTIVE = "not needed: how many drafts a step has is chosen by what they cost and how many are right"
_ADAPTERS = "not supported yet: merge the adapter into the weights"
_TOOLS = "always on, for requests with tools (--tool-call-parser none switches it off): leave it out"
_LLGUIDANCE = "not needed: llguidance, which is part of it, does that"
_RECOVERS = "always on (--max-restarts 0 switches it off): ranks that are lost come back, and requests go on"
_SIZED = "not an option: KV blocks take the share that --gpu-memory-utilization gives"
_NO_CODE = "not supported: no code but tpworker's own runs in its processes"
_LOADED = "not needed: safetensors are read by slice, each rank its own"
_EMBEDDED = "not an option: a field of RuntimeConfig, for programs that embed tpworker"

FACTS = {
    "--enable-fault-tolerance": _RECOVERS,
    "--fault-tolerance-config": _RECOVERS,
    "--soft-watchdog-timeout": "not needed: the log has the stacks of a process that hangs (--step-timeout)",
    "--enable-prefix-caching": "always on (--no-prefix-caching switches it off): leave it out",
    "--enable-chunked-prefill": _ON,
    "--enable-mixed-chunk": _ON,
    "--async-scheduling": "always on (--no-enable-overlap-schedule switches it off): leave it out",
    "--enable-metrics": _ON,
    "--enable-request-id-headers": "always on: answers have X-Request-Id",
    "--enable-tokenizer-info-endpoint": _ON,
    "--enable-server-load-tracking": _ON,
    "--trust-request-chat-template": "not supported: conversations are rendered by the model's template, or "
    "by the server's (--chat-template)",
    "--ssl-ca-certs": "not supported: clients are known by --api-key",
    "--ssl-cert-reqs": "not supported: clients are known by --api-key",
    "--enable-ssl-refresh": "not supported: start the server again for a new certificate",
    "--no-enable-chunked-prefill": "not supported: prompts are always computed in chunks, of up to "
    "--max-num-batched-tokens",
    "--disable-chunked-prefill": "not supported: prompts are always computed in chunks, of up to "
    "--max-num-batched-tokens",
    "--collect-detailed-traces": "not an option: --trace FILE writes what scheduler, ranks and devices do",
    "--enable-trace": "not an option: --otlp-endpoint URL sends spans, --trace FILE writes a timeline",
    "--trust-remote-code": "not needed: no code of a model's folder is ever run",
    "--swap-space": "not needed: a request that is preempted is computed again, and nothing is swapped",
    "--enable-log-requests": _EACH,
    "--log-requests": _EACH,
    "--disable-log-stats": _STATISTICS,
    "--disable-uvicorn-access-log": _PROBES,
    "--disable-access-log-for-endpoints": _PROBES,
    "--enable-log-outputs": _OUTPUTS,
    "--enable-log-deltas": _OUTPUTS,
    "--log-config-file": "not supported: --log-level and --log-format say what there is to say",
    "--enforce-eager": _STEPS,
    "--disable-cuda-graph": _STEPS,
    "--cuda-graph-max-bs": _STEPS,
    "--cuda-graph-sizes": _STEPS,
    "--cudagraph-capture-sizes": _STEPS,
    "--use-cudagraph": _STEPS,
    "--graph-optimization-config": _STEPS,
    "--compilation-config": _STEPS,
    "--enable-torch-compile": _STEPS,
    "--max-seq-len-to-capture": _STEPS,
    "--num-scheduler-steps": "not needed: steps are launched ahead of their results (--lookahead)",
    "--num-continuous-decode-steps": "not needed: steps are launched ahead of their results (--lookahead)",
    "--attention-backend": _CHOSEN,
    "--sampling-backend": _CHOSEN,
    "--moe-backend": _CHOSEN,
    "--disable-custom-all-reduce": _CHOSEN,
    "--backend": _CHOSEN,
    "--use-v2-block-manager": _CHOSEN,
    "--distributed-executor-backend": _LOCAL,
    "--worker-use-ray": _LOCAL,
    "--engine-worker-queue-port": _PORTS,
    "--cache-queue-port": _PORTS,
    "--metrics-port": _PORTS,
    "--controller-port": _PORTS,
    "--nccl-port": _PORTS,
    "--tokenizer": _WITH_MODEL,
    "--tokenizer-path": _WITH_MODEL,
    "--tokenizer-mode": _WITH_MODEL,
    "--generation-config": _WITH_MODEL,
    "--hf-config-path": _WITH_MODEL,
    "--hf-overrides": _WITH_MODEL,
    "--rope-scaling": _WITH_MODEL,
    "--override-generation-config": "not supported: it is read from the model's folder, edit "
    "generation_config.json there",
    "--skip-tokenizer-init": "not needed: a model without a tokenizer takes token ids",
    "--revision": "not supported: `hf download NAME --revision …`, then --model FOLDER",
    "--download-dir": "not an option: the environment variable HF_HOME says where the hub's models lie",
    "--cpu-offload-gb": "not supported: weights and KV cache stay on the device",
    "--pipeline-parallel-size": _ONE_KIND,
    "-pp": _ONE_KIND,
    "--pp": _ONE_KIND,
    "--pp-size": _ONE_KIND,
    "--data-parallel-size": _ONE_KIND,
    "-dp": _ONE_KIND,
    "--dp": _ONE_KIND,
    "--dp-size": _ONE_KIND,
    "--expert-parallel-size": _ONE_KIND,
    "--ep": _ONE_KIND,
    "--ep-size": _ONE_KIND,
    "--enable-expert-parallel": _ONE_KIND,
    "--enable-dp-attention": _ONE_KIND,
    "--nnodes": _ONE_KIND,
    "--node-rank": _ONE_KIND,
    "--dist-init-addr": _ONE_KIND,
    "--splitwise-role": "not supported yet: prompts and decoding share the ranks",
    "--disaggregation-mode": "not supported yet: prompts and decoding share the ranks",
    "--decode-log-interval": _STATISTICS,
    "--middleware": "not supported: embed tpworker.Runtime in an app of your own",
    "--response-role": "not supported: answers are the assistant's",
    "--chat-template-content-format": "not needed: read off the chat template itself",
    "--return-tokens-as-token-ids": "not an option: requests ask for it (return_tokens_as_token_ids)",
    "--enable-prompt-tokens-details": "always on: usage tells cached_tokens",
    "--hf-token": "not an option: set HF_TOKEN or run `hf auth login`",
    "--allow-credentials": "not an option: --allowed-origins is what there is of CORS",
    "--allowed-methods": "not an option: --allowed-origins is what there is of CORS",
    "--allowed-headers": "not an option: --allowed-origins is what there is of CORS",
    "--api-server-count": "not supported: one process serves HTTP",
    "--headless": _ONE_KIND,
    "--disable-frontend-multiprocessing": _LOCAL,
    "--tokenizer-worker-num": "not needed: prompts are tokenised in threads",
    "--task": "not supported: text is generated, and nothing else",
    "--runner": "not supported: text is generated, and nothing else",
    "--schedule-conservativeness": "not needed: a request without a KV block is computed again later",
    "--preemption-mode": "not needed: a request that is preempted is computed again, and nothing is swapped",
    "--max-num-partial-prefills": "not needed: --max-num-batched-tokens bounds a step's chunks",
    "--stream-interval": "not needed: what has come by then is sent together",
    "--max-parallel-loading-workers": "not needed: weights are read by several threads of each rank",
    "--skip-server-warmup": _STEPS,
    "--json-model-override-args": _WITH_MODEL,
    "--structured-outputs-config": _LLGUIDANCE,
    "--mm-processor-kwargs": "not supported: prompts are text or token ids",
    "--kv-transfer-config": "not supported yet: prompts and decoding share the ranks",
    "--disable-hybrid-kv-cache-manager": _CHOSEN,
    "--file-storage-path": "not supported: there are no files, and no batches of them",
    "--speculative-model": DRAFT_MODEL,
    "--spec-model": DRAFT_MODEL,
    "--speculative-draft-model-path": DRAFT_MODEL,
    "--speculative-draft-model-revision": DRAFT_MODEL,
    "--speculative-token-map": DRAFT_MODEL,
    "--speculative-draft-tensor-parallel-size": DRAFT_MODEL,
    "--speculative-eagle-topk": _DRAFT_TREE,
    "--speculative-ngram-min-bfs-breadth": _DRAFT_TREE,
    "--speculative-ngram-max-bfs-breadth": _DRAFT_TREE,
    "--speculative-ngram-match-type": _DRAFT_TREE,
    "--speculative-ngram-branch-length": _DRAFT_HISTORY,
    "--speculative-ngram-max-trie-depth": _DRAFT_HISTORY,
    "--speculative-ngram-capacity": _DRAFT_HISTORY,
    "--speculative-accept-threshold-single": _ACCEPTED,
    "--speculative-accept-threshold-acc": _ACCEPTED,
    "--spec-decoding-acceptance-method": _ACCEPTED,
    "--typical-acceptance-sampler-posterior-threshold": _ACCEPTED,
    "--typical-acceptance-sampler-posterior-alpha": _ACCEPTED,
    "--speculative-disable-by-batch-size": _ADAPTIVE,
    "--speculative-adaptive": _ADAPTIVE,
    "--speculative-adaptive-config": _ADAPTIVE,
    "--extra-llm-api-options": "not an option: --config FILE has options by their names here",
    "--enable-lora": _ADAPTERS,
    "--lora-modules": _ADAPTERS,
    "--lora-paths": _ADAPTERS,
    "--enable-auto-tool-choice": _TOOLS,
    "--enable-reasoning": "always on, for models that think (--reasoning-parser none switches it off): leave "
    "it out",
    "--exclude-tools-when-tool-choice-none": "not supported: the chat template shows tools whatever "
    "tool_choice says",
    "--tool-parser-plugin": "not supported: --tool-call-parser has the formats that there are",
    "--reasoning-parser-plugin": "not supported: --reasoning-parser has the formats that there are",
    "--tool-server": "not supported: tools are the client's, who runs them",
    "--enable-logprob": _ON,
    "--max-logprobs": "not an option: requests may ask for the 20 likeliest",
    "--guided-decoding-backend": _LLGUIDANCE,
    "--grammar-backend": _LLGUIDANCE,
    "--limit-mm-per-prompt": "not supported: models of text only",
    "--num-gpu-blocks-override": _SIZED,
    "--max-total-tokens": _SIZED,
    "--num-kv-blocks": _EMBEDDED,
    "--check-ranks-agree": _EMBEDDED,
    "--uds": "not supported: the server listens on --host and --port",
    "--grpc-mode": "not supported: the server speaks HTTP",
    "--disable-fastapi-docs": "not supported: /docs and /openapi.json tell nothing of requests",
    "--h11-max-incomplete-event-size": "not needed: what a request may take is bounded by --max-model-len",
    "--h11-max-header-count": "not needed: what a request may take is bounded by --max-model-len",
    "--logprobs-mode": "not an option: logprobs are of the logits as the model gives them (raw_logprobs)",
    "--enable-prompt-embeds": "not supported: prompts are text or token ids",
    "--logits-processors": _NO_CODE,
    "--logits-processor-pattern": _NO_CODE,
    "--enable-custom-logit-processor": _NO_CODE,
    "--worker-cls": _NO_CODE,
    "--worker-extension-cls": _NO_CODE,
    "--scheduler-cls": _NO_CODE,
    "--io-processor-plugin": _NO_CODE,
    "--custom-weight-loader": _NO_CODE,
    "--model-impl": "not needed: models are tpworker's own, by the architecture in config.json",
    "--config-format": _WITH_MODEL,
    "--code-revision": "not needed: no code of a model's folder is ever run",
    "--model-loader-extra-config": _LOADED,
    "--safetensors-load-strategy": _LOADED,
    "--ignore-patterns": _LOADED,
    "--pt-load-map-location": _LOADED,
    "--weight-loader-disable-mmap": _LOADED,
    "--use-tqdm-on-load": "always on, on a terminal: leave it out",
    "--disable-sliding-window": "not supported: windows are as config.json says",
    "--disable-cascade-attn": _CHOSEN,
    "--override-attention-dtype": QUANTISED,
    "--kv-cache-memory-bytes": _SIZED,
    "--prefix-caching-hash-algo": "not needed: the cache compares tokens, not hashes of them",
    "--radix-eviction-policy": "not an option: what was used longest ago is evicted first",
    "--enable-cache-report": "always on: usage tells cached_tokens",
    "--enable-deterministic-inference": "not needed with --dtype float32: a request with a seed "
    "gives the same whatever else runs",
    "--preferred-sampling-params": "not supported: edit generation_config.json in the model's folder",
    "--allow-auto-truncate": "not supported: a prompt that does not fit is refused",
    "--constrained-json-whitespace-pattern": _LLGUIDANCE,
    "--disable-outlines-disk-cache": _LLGUIDANCE,
    "--sleep-on-idle": "always on: waiting costs nothing",
    "--base-gpu-id": "not an option: the environment variable CUDA_VISIBLE_DEVICES says which GPUs",
    "--gpu-id-step": "not an option: the environment variable CUDA_VISIBLE_DEVICES says which GPUs",
    "--num-postprocess-workers": "not needed: text is made by one thread, a bounded time a token",
    "--max-beam-width": "not supported: there is no beam search",
    "--max-long-partial-prefills": "not needed: --max-num-batched-tokens bounds a step's chunks",
    "--fail-fast-on-attention-window-too-large": "not needed: what does not fit is refused at the start",
    "-O": _STEPS,
    "-cc": _STEPS,
    "-ac": _CHOSEN,
    "-asc": "not supported: one process serves HTTP",
    "-n": _ONE_KIND,
    "-r": _ONE_KIND,
}
"""What is always so here, is not needed, or is not supported (yet), and what to do about it."""

FAMILIES: Mapping[str, Sequence[str]] = {
    _ONE_KIND: (
        "--data-parallel-", "--dp-", "-dp", "--pipeline-", "--decode-context-", "-dcp", "--prefill-context-",
        "-pcp", "--dcp-", "--cp-", "--master-", "--dist-", "--nccl-", "--gpus-per-node", "--cluster-",
    ),
    "not supported: models of text only": (
        "--mm-", "--image-", "--video-", "--media-", "--allowed-local-media-", "--allowed-media-",
        "--enable-mm-", "--enable-multimodal", "--keep-mm-", "--skip-mm-", "--interleave-mm-",
        "--disable-fast-image-", "--disable-chunked-mm-", "--disable-mm-",
    ),
    _ADAPTERS: ("--lora-", "--max-lora", "--max-cpu-lora", "--fully-sharded-lora", "--default-mm-lora"),
    "not supported yet: prompts and decoding share the ranks": (
        "--disaggregation-", "--kv-transfer-", "--ec-transfer-", "--disagg-", "--pdlb-", "--server-role",
    ),
    "not supported: weights and KV cache stay on the device": (
        "--hicache-", "--enable-hierarchical-cache", "--enable-lmcache", "--kv-offloading-", "--cpu-offload-",
        "--offload-",
    ),
    "not needed: experts are split over the TP ranks, each along its width": (
        "--expert-", "--moe-", "--ep-", "--eplb-", "--enable-eplb", "--enable-ep-", "--deepep-",
        "--enable-deepep-", "--all2all-", "--dbo-", "--enable-dbo", "--enable-two-batch-", "--tbo-",
        "--init-expert-", "--disable-shared-experts-",
    ),
    "not supported: models of attention alone": ("--mamba-", "--enable-mamba-"),
    _STEPS: (
        "--cuda-graph-", "--cudagraph-", "--disable-cuda-graph-", "--max-cudagraph-", "--torch-compile-",
        "--enable-torch-compile-", "--piecewise-", "--disable-piecewise-", "--optimization-",
    ),
    _CHOSEN: (
        "--attention-", "--prefill-attention-", "--decode-attention-", "--triton-", "--flashinfer-",
        "--enable-flashinfer-", "--disable-flashinfer-", "--enable-nccl-", "--enable-symm-",
        "--enable-mscclpp", "--enable-torch-symm-", "--enable-p2p-", "--fp8-", "--fp4-", "--kernel-",
    ),
    QUANTISED: ("--quantization-", "--torchao-", "--modelopt-", "--kv-cache-scheme", "--calculate-kv-"),
    "not supported: text is generated, and nothing else": ("--pooler-", "--is-embedding", "--convert"),
    "not an option: --speculative-method and --num-speculative-tokens say all there is to say": (
        "--speculative-", "--spec-",
    ),
    _LOCAL: ("--ray-",),
    _WITH_MODEL: ("--tokenizer-", "--hf-"),
}  # fmt: skip
"""The same for all options that begin so, and are not in `NAMES` or `FACTS`."""


COMMANDS = {
    **dict.fromkeys(
        ("vllm", "sglang", "trtllm-serve", "launch_server", "run", "start", "server", "launch"), ""
    ),
    **dict.fromkeys(("chat", "complete", "generate"), "; `tpworker serve MODEL --ask TEXT` answers once"),
    "run-batch": "; batches are requests to the server",
}
"""Words that others begin with."""
