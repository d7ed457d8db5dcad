"""The decoder against transformers: every head layout, TP size and kind of batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Ernie4_5Config, Glm4MoeConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.model.helpers import (
    CPU,
    SPEC,
    Models,
    Rank,
    Reference,
    Work,
    edit_config,
    make_batch,
    references,
    run_ranks,
    shuffled_tables,
    tiny_model,
)
from tpworker.checkpoint.weights import dummy_weights
from tpworker.model.decoder import Decoder, KVCache
from tpworker.model.families import Llama3Scaling, MoeSpec, RopeSpec
from tpworker.model.rope import rope_tables
from tpworker.model.tp import Collectives, Shard
from tpworker.rank.collectives import SoleRank

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def heads(num_heads: int, num_kv_heads: int, head_dim: int = 16) -> dict[str, int]:
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
    }


CONFIGS: dict[str, Callable[[], Any]] = {
    "smollm2-shape": lambda: LlamaConfig(**BASE, **heads(9, 3), tie_word_embeddings=True),
    "multi-head": lambda: LlamaConfig(**BASE, **heads(4, 4)),
    "grouped": lambda: LlamaConfig(**BASE, **heads(8, 2), attention_bias=True),
    "multi-query": lambda: LlamaConfig(**BASE, **heads(8, 1), mlp_bias=True, tie_word_embeddings=True),
    "all-biases": lambda: LlamaConfig(**BASE, **heads(9, 3), attention_bias=True, mlp_bias=True),
    "llama3-rope": lambda: LlamaConfig(**BASE, **heads(4, 2), rope_parameters=LLAMA3),
    "head-dim-from-hidden": lambda: LlamaConfig(
        **BASE, num_attention_heads=6, num_key_value_heads=2, rope_parameters={"rope_theta": 77.0}
    ),
    "mistral": lambda: MistralConfig(**BASE, **heads(8, 4), sliding_window=None),
    "qwen2": lambda: Qwen2Config(**BASE, num_attention_heads=6, num_key_value_heads=3),
    "qwen3": lambda: Qwen3Config(**BASE, **heads(8, 2), tie_word_embeddings=True),
    "ernie4_5": lambda: Ernie4_5Config(**BASE, **heads(8, 2)),
    "ernie4_5-biased": lambda: Ernie4_5Config(**BASE, **heads(9, 3), use_bias=True),
    "qwen3-biased": lambda: Qwen3Config(**BASE, **heads(6, 3), attention_bias=True),
}
FULL_MATRIX = ("smollm2-shape", "multi-head", "grouped", "multi-query", "all-biases")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return references(CONFIGS, tmp_path_factory.mktemp)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", FULL_MATRIX)
def test_logits_are_transformers(models: Models, name: str, size: int) -> None:
    models(name).check(size)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FULL_MATRIX])
def test_logits_are_transformers_in_other_variants(models: Models, name: str, size: int) -> None:
    models(name).check(size)


YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    # rope_theta beside rope_scaling is transformers 4's way; rope_parameters are transformers 5's.
    "linear": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear-5": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "yarn": {"rope_theta": 500.0, "rope_scaling": YARN},
    "yarn-5": {"rope_parameters": YARN | {"rope_theta": 500.0}},
    "yarn-of-type": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "yarn-without-factor": {"rope_scaling": YARN | {"factor": None}},
    "yarn-attention-factor": {"rope_scaling": YARN | {"attention_factor": 1.7}},
    "yarn-mscale": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn-one-mscale": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0}},
    "yarn-betas": {"rope_scaling": YARN | {"beta_fast": 3, "beta_slow": 0.2, "truncate": False}},
    "yarn-ramp-of-no-length": {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 1, "truncate": False}},
    "yarn-original-length-outside": {"rope_scaling": YARN, "original_max_position_embeddings": 48},
    "llama3-without-original-length": {
        "rope_scaling": {key: value for key, value in LLAMA3.items() if "original" not in key}
    },
    "both": {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
    "both-and-theta": {"rope_theta": 500.0, "rope_scaling": YARN, "rope_parameters": {"rope_theta": 77.0}},
    "rope-scaling-is-empty": {"rope_scaling": {}, "rope_parameters": LLAMA3},
}
ROPE_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**BASE, **heads(4, 2)),
    "ernie4_5": lambda: Ernie4_5Config(**BASE, **heads(4, 2)),
    "glm": lambda: Glm4MoeConfig(
        **BASE, **heads(4, 2), first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("model", "rope"),
    [("llama", rope) for rope in ROPES] + [(m, r) for m in ("ernie4_5", "glm") for r in ("yarn", "linear-5")],
)
def test_scaled_rotary_positions_are_transformers(tmp_path: Path, model: str, rope: str, size: int) -> None:
    tiny_model(tmp_path, ROPE_MODELS[model]())
    edit_config(tmp_path, {"rope_parameters": None} | ROPES[rope])
    reference = Reference.of_folder(tmp_path)
    edit_config(tmp_path, {"rope_parameters": None, "rope_scaling": None})
    plain = Reference.of_folder(tmp_path)
    assert (reference.logits - plain.logits).abs().max() > 0.01 * plain.logits.abs().max()
    edit_config(tmp_path, {"rope_parameters": None} | ROPES[rope])
    reference.check(size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(models: Models, dtype: torch.dtype) -> None:
    model = models("grouped")

    for result, reference in zip(model.compute_on(2, dtype=dtype)[0], model.expected(), strict=True):
        assert result.dtype == torch.float32
        assert (result - reference).abs().max() < 0.05 * reference.abs().max()


def test_only_the_rows_asked_for_are_returned(models: Models) -> None:
    model = models("grouped")
    ids, logits = model.ids, model.logits

    def main(collectives: Collectives) -> Tensor:
        rank = Rank.load(model.folder, collectives)
        tables = shuffled_tables(2, 20, 4, 64)
        plan = [Work(0, 0, ids[0, :9].tolist()), Work(1, 0, ids[1, :5].tolist())]
        batch = make_batch(plan, tables, 4, sample_rows=[8, 13])
        return rank.decoder.logits(rank.decoder.forward(batch, rank.cache))[:, :131]

    (result,) = run_ranks(1, main)
    torch.testing.assert_close(result, torch.stack([logits[0, 8], logits[1, 4]]), rtol=1e-4, atol=1e-4)


def test_hidden_states_are_the_same_on_all_ranks(models: Models) -> None:
    folder, ids = models("smollm2-shape").folder, models("smollm2-shape").ids

    def main(collectives: Collectives) -> Tensor:
        rank = Rank.load(folder, collectives)
        batch = make_batch([Work(0, 0, ids[0, :9].tolist())], shuffled_tables(1, 20, 4, 64), 4)
        return rank.decoder.forward(batch, rank.cache)

    results = run_ranks(4, main)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_depend_on_the_batch(models: Models, dtype: torch.dtype) -> None:
    models("smollm2-shape").check_independence(dtype)


def test_what_a_block_held_before_does_not_matter(models: Models) -> None:
    """Blocks come with another request's keys and values, which may not even be finite."""
    model = models("grouped")

    def main(collectives: Collectives) -> list[Tensor]:
        rank = Rank.load(model.folder, collectives)
        for layer in (*rank.cache.keys, *rank.cache.values):
            layer[1:] = torch.nan
        return model.compute(rank)

    (results,) = run_ranks(1, main)
    for result, reference in zip(results, model.expected(), strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)


def test_rows_that_pad_a_batch_change_nothing(models: Models) -> None:
    folder, ids = models("grouped").folder, models("grouped").ids

    def main(collectives: Collectives) -> tuple[Tensor, Tensor, bool]:
        rank = Rank.load(folder, collectives)
        tables = [*shuffled_tables(2, 20, 4, 64), [0] * 5]
        rank.step([Work(0, 0, ids[0, :9].tolist()), Work(1, 0, ids[1, :5].tolist())], tables)
        plan = [Work(0, 9, ids[0, 9:10].tolist(), True), Work(1, 5, ids[1, 5:6].tolist(), True)]
        alone = rank.step(plan, tables)
        batch = make_batch([*plan, Work(2, 0, [0], True), Work(2, 0, [0], True)], tables, 4)
        batch.lengths[2:] = 0
        hidden = rank.decoder.forward(batch, rank.cache)
        return alone, rank.decoder.logits(hidden)[:2, :131], bool(hidden.isfinite().all())

    ((alone, padded, is_finite),) = run_ranks(1, main)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
    assert is_finite


@pytest.mark.parametrize("vocab_size", [64, 61, 9])
def test_padded_logits_are_minus_infinity(vocab_size: int) -> None:
    spec = dataclasses.replace(SPEC, vocab_size=vocab_size)

    def main(collectives: Collectives) -> tuple[int, Tensor]:
        shard = Shard.of(spec, collectives.rank, collectives.size)
        decoder = Decoder(spec, dummy_weights(spec, shard, torch.float32, CPU), shard, collectives, 32)
        return decoder.vocab_start, decoder.logits(torch.randn(5, spec.hidden_size))

    for start, logits in run_ranks(4, main):
        assert logits.dtype == torch.float32
        ids = torch.arange(start, start + logits.shape[1])
        assert torch.equal(logits.isfinite(), (ids < vocab_size).expand(5, -1))
        assert not logits.isnan().any()


@pytest.mark.parametrize(
    ("kinds", "kept"), [("d", [0]), ("ddddd", [0, 1]), ("dmmmm", [0, 1, 2]), ("dddmmmd", [0, 1, 3, 4, 6])]
)
def test_an_excerpt_has_each_kind_of_layer_behind_each(kinds: str, kept: list[int]) -> None:
    """d: dense, m: a mixture."""
    mixtures = tuple(number for number, kind in enumerate(kinds) if kind == "m")
    moe = MoeSpec(layers=mixtures, num_experts=4, experts_per_token=2, intermediate_size=16)
    family = "qwen3_moe"
    spec = dataclasses.replace(SPEC, family=family, num_layers=len(kinds), moe=moe)
    shard = Shard.of(spec, 0, 1)
    decoder = Decoder(spec, dummy_weights(spec, shard, torch.float32, CPU), shard, SoleRank(), 32)
    layers = decoder.weights.layers
    excerpt = [id(layer) for layer in decoder.excerpt().weights.layers]
    assert excerpt == [id(layers[number]) for number in kept]
    assert decoder.weights.layers is layers


def test_the_cache_says_how_large_a_block_is() -> None:
    shard = Shard.of(SPEC, 0, 1)
    cache = KVCache(SPEC, shard, 10, 16, torch.bfloat16, CPU)
    assert len(cache.keys) == len(cache.values) == SPEC.num_layers
    assert cache.keys[0].shape == (10, 16, SPEC.num_kv_heads, SPEC.head_dim)
    nbytes = sum(layer.nbytes for layer in (*cache.keys, *cache.values))
    assert 10 * KVCache.bytes_per_block(SPEC, shard, 16, torch.bfloat16) == nbytes
    larger = KVCache(SPEC, shard, 10, 16, torch.bfloat16, CPU, SPEC.num_layers + 1)
    assert len(larger.keys) == len(larger.values) == SPEC.num_layers + 1
    nbytes = sum(layer.nbytes for layer in (*larger.keys, *larger.values))
    assert 10 * KVCache.bytes_per_block(SPEC, shard, 16, torch.bfloat16, SPEC.num_layers + 1) == nbytes


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    plain = RopeSpec(theta=10000.0)
    scaling = Llama3Scaling(
        factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64
    )
    cos, sin = rope_tables(plain, 64, 100, CPU)
    scaled_cos, _ = rope_tables(RopeSpec(theta=10000.0, scaling=scaling), 64, 100, CPU)
    assert torch.equal(cos[:, 0], scaled_cos[:, 0])  # a wave of 6 positions
    torch.testing.assert_close(scaled_cos[80, 31], cos[10, 31])  # one of 47,000: 8 times as long
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))


# ------------------------------------------------------------------------------- the real model

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
)
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def real_answers(real_model: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids of each prompt and transformers' greedy continuation in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([ids]),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        answers.append((ids, output[0, len(ids) :].tolist()))
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_real_model_says_what_it_says_in_transformers(
    real_model: Path, real_answers: list[tuple[list[int], list[int]]], size: int
) -> None:
    """All prompts at once: prefill together, then decode together."""
    prompts = [ids for ids, _ in real_answers]

    def main(collectives: Collectives) -> list[list[int]]:
        rank = Rank.load(real_model, collectives, block_size=16, max_model_len=128)
        eos = rank.decoder.spec.eos_ids
        tables = shuffled_tables(len(prompts), 80, 16, 64)
        outputs: list[list[int]] = [[] for _ in prompts]
        plan = [Work(s, 0, ids) for s, ids in enumerate(prompts)]
        rows = [sum(map(len, prompts[: s + 1])) - 1 for s in range(len(prompts))]
        for _ in range(NUM_TOKENS):
            logits = rank.step(plan, tables)[rows]
            logits[:, list(eos)] = -torch.inf
            for output, token in zip(outputs, logits.argmax(-1).tolist(), strict=True):
                output.append(token)
            plan = [
                Work(s, len(prompts[s]) + len(outputs[s]) - 1, outputs[s][-1:], True)
                for s in range(len(prompts))
            ]
            rows = list(range(len(prompts)))
        return outputs

    for outputs in run_ranks(size, main):
        assert outputs == [answer for _, answer in real_answers]
