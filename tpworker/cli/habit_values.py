"""Values of options as other engines have them, and what holds here instead."""

from __future__ import annotations

from collections.abc import Mapping

from tpworker.cli.habits import DRAFT_MODEL, QUANTISED

VALUES: Mapping[str, Mapping[str, str]] = {
    "--dtype": {
        **dict.fromkeys(("half", "fp16"), "its name here is float16"),
        **dict.fromkeys(("float", "fp32"), "its name here is float32"),
        "bf16": "its name here is bfloat16",
        **dict.fromkeys(("fp8", "float8", "int8", "int4", "fp4"), QUANTISED),
    },
    "--kv-cache-dtype": {"fp8_e4m3": "its name here is fp8", "fp8_e5m2": "not supported: fp8 is E4M3 here"},
    "--quantization": {
        **dict.fromkeys(("compressed-tensors", "w8a8_fp8", "fbgemm_fp8", "fp8_e4m3"), "its name here is fp8"),
        **dict.fromkeys(
            ("awq", "gptq", "awq_marlin", "gptq_marlin", "bitsandbytes", "int8", "gguf"), QUANTISED
        ),
    },
    "--device": {
        **dict.fromkeys(("gpu", "nvidia"), "its name here is cuda"),
        **dict.fromkeys(
            ("tpu", "xpu", "hpu", "rocm", "mps", "npu"), "not supported: ranks run on cuda or cpu"
        ),
    },
    "--load-format": {
        **dict.fromkeys(("safetensors", "hf"), "that is auto: leave it out"),
        **dict.fromkeys(("pt", "gguf", "bitsandbytes", "npcache"), "not supported: weights are safetensors"),
    },
    "--scheduling-policy": {
        "lpm": "not supported: who came first is first, and finds what the prefix cache has",
        "fcfs+": "its name here is fcfs",
    },
    "--speculative-method": {
        **dict.fromkeys(("eagle", "eagle3", "medusa", "draft_model", "mlp_speculator"), DRAFT_MODEL),
        **dict.fromkeys(("nextn", "NEXTN", "deepseek_mtp", "glm4_moe_mtp"), "its name here is mtp"),
        **dict.fromkeys(("NGRAM", "[ngram]", "suffix"), "its name here is ngram"),
    },
    "--tool-call-parser": {
        **dict.fromkeys(("llama3", "llama4_json", "llama"), "its name here is llama3_json"),
        **dict.fromkeys(("qwen", "qwen25", "qwen3"), "its name here is hermes"),
        **dict.fromkeys(("glm", "glm4", "glm4_moe"), "its name here is glm45"),
    },
}
"""Of options that are here too: what others call a value, and what holds of it."""
