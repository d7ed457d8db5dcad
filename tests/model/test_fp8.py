"""Weights in FP8: what they stand for, how they are made, and models of them against transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Ernie4_5_MoeConfig, Glm4MoeConfig, Qwen3Config

from tests.model.fp8_checkpoints import FORMS, publish
from tests.model.helpers import CPU, Rank, Reference, Work, run_ranks, tiny_model
from tpworker.checkpoint.weights import load_weights
from tpworker.errors import ConfigError
from tpworker.kernels.operands import Fp8Weight
from tpworker.model.decoder import Decoder, KVCache
from tpworker.model.families import FP8, read_spec
from tpworker.model.fp8 import E4M3, LARGEST, check_gpu, dequantise, quantise
from tpworker.model.linear import Linear
from tpworker.model.moe import experts
from tpworker.model.tp import Collectives, Shard
from tpworker.runtime.loading import load_tokenizer

TEXTS = Path(__file__).parents[2] / "benchmarks" / "speculation" / "texts"

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 72,  # two blocks of 32 and a quarter
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "dense": lambda: Qwen3Config(**SIZES),
    "glm": lambda: Glm4MoeConfig(
        **SIZES, moe_intermediate_size=40, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=2,
        attention_bias=True, use_qk_norm=True,
    ),
    # Neighbours are rotated: rows of query and key heads change places, with their scales.
    "ernie": lambda: Ernie4_5_MoeConfig(
        **SIZES | {"head_dim": 24, "num_attention_heads": 4}, moe_intermediate_size=40, moe_num_experts=4,
        moe_k=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_gpus_from_ada_on_have_fp8(
    capability: tuple[int, int], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this GPU")
    gpu = torch.device("cuda", 0)
    check_gpu(gpu, weights=False, cache=False)
    check_gpu(CPU, weights=True, cache=True)
    for weights, cache in ((True, False), (False, True), (True, True)):
        with pytest.raises(ConfigError) if is_refused else nullcontext():
            check_gpu(gpu, weights, cache)


def test_a_weight_is_values_times_the_scales_of_their_blocks() -> None:
    values = torch.randn(3, 5, 7).to(E4M3)
    scales = torch.rand(3, 3, 2) + 0.5
    weight = Fp8Weight(values, scales, (2, 4), torch.float32)
    for i, j, k in ((0, 0, 0), (1, 1, 3), (1, 2, 4), (2, 4, 6)):
        expected = values[i, j, k].float() * scales[i, j // 2, k // 4]
        assert dequantise(weight)[i, j, k] == expected
        assert dequantise(weight.of(i))[j, k] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_made_weights_are_within_half_a_step_of_what_they_are_made_of(dtype: torch.dtype) -> None:
    plain = (torch.randn(64, 96) * torch.logspace(-3, 2, 64)[:, None]).to(dtype)
    plain[5] = 0
    made = quantise(plain)
    assert (made.values.dtype, made.block, made.dtype) == (E4M3, (1, 96), dtype)
    assert made.values.float().abs().amax(dim=1).sub(LARGEST).abs().nonzero().tolist() == [[5]]
    error = (made.values.float() * made.scales - plain.float()).abs()
    # Three bits behind the first: 1 / 16 of the number; below 2 ** -6 steps are all alike.
    assert (error <= plain.float().abs() / 16 + made.scales * 2**-10).all()
    assert not dequantise(made)[5].any()


def test_products_are_those_with_what_the_weights_stand_for() -> None:
    weight = quantise(torch.randn(48, 32))
    x, bias = torch.randn(5, 32), torch.randn(48)
    linear = Linear(weight, bias)
    torch.testing.assert_close(linear(x), x @ dequantise(weight).T + bias)
    assert [t.dtype for t in linear.tensors()] == [E4M3, torch.float32, torch.float32]
    gate_up, down = quantise(torch.randn(3, 8, 6)), quantise(torch.randn(3, 6, 4))
    tokens = torch.randn(2, 6), torch.tensor([[0, 2], [1, 0]], dtype=torch.int32), torch.rand(2, 2)
    expected = experts(*tokens, dequantise(gate_up), dequantise(down))
    assert torch.equal(experts(*tokens, gate_up, down), expected)


@pytest.mark.parametrize(
    ("name", "form"), [("dense", "blocks"), ("glm", "channels"), ("ernie", "blocks"), ("ernie", "tensors")]
)
def test_models_of_published_weights_are_transformers_of_what_they_stand_for(
    tmp_path: Path, name: str, form: str
) -> None:
    assert form in FORMS
    tiny_model(tmp_path / "model", CONFIGS[name]())
    folder = publish(tmp_path / "model", tmp_path, form)
    reference = dataclasses.replace(Reference.of_folder(tmp_path / "plain"), folder=folder)
    for size in (1, 2, 4):
        reference.check(size)


def perplexity(folder: Path, ids: list[int], quantization: str | None) -> float:
    """Of token ids, in pieces of 512 of which each begins anew."""

    def main(collectives: Collectives) -> float:
        spec = read_spec(folder, quantization)
        shard = Shard.of(spec, 0, 1)
        weights = load_weights(folder, spec, shard, torch.float32, CPU)
        cache = KVCache(spec, shard, 34, 16, torch.float32, CPU, spec.num_layers)
        rank = Rank(Decoder(spec, weights, shard, collectives, 1024), cache, collectives)
        losses = list[torch.Tensor]()
        for start in range(0, len(ids) - 1, 512):
            piece = ids[start : start + 513]
            logits = rank.step([Work(0, 0, piece[:-1])], [list(range(1, 34))])
            losses.append(
                torch.nn.functional.cross_entropy(logits, torch.tensor(piece[1:]), reduction="none")
            )
        return float(torch.cat(losses).mean().exp())

    return run_ranks(1, main)[0]


def test_the_default_model_in_fp8_is_hardly_worse(real_model: Path) -> None:
    text = "\n".join((TEXTS / name).read_text() for name in ("chat.txt", "code.txt", "copying.txt"))
    tokenizer = load_tokenizer(real_model)
    assert tokenizer is not None
    ids = tokenizer.encode(text)[:1025]
    plain, made = (perplexity(real_model, ids, quantization) for quantization in (None, FP8))
    print(f"perplexity of {len(ids)} tokens: {plain:.3f}, in FP8 {made:.3f} ({made / plain:.4f})")
    assert plain != made
    assert made < 1.02 * plain
