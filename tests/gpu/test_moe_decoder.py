"""Decoders with mixtures of experts on CUDA, eager and captured, against the CPU's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Ernie4_5_MoeConfig, Glm4MoeConfig

from tests.gpu.test_kernels import DEVICE, batch_to, captured, near
from tests.model.helpers import CPU, Work, make_batch, shuffled_tables, tiny_model
from tpworker import Runtime, SamplingParams
from tpworker.checkpoint.weights import load_weights
from tpworker.model.decoder import Decoder, KVCache
from tpworker.model.families import read_spec
from tpworker.model.moe import Moe, Router
from tpworker.model.tp import Shard
from tpworker.observe.gpus import count_gpus
from tpworker.rank.collectives import SoleRank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
VOCAB = 1031
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 520,
    "num_hidden_layers": 4,
    "head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 96,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "glm": lambda: Glm4MoeConfig(
        **BASE, n_routed_experts=32, num_experts_per_tok=6, n_group=4, topk_group=2, attention_bias=True
    ),
    "ernie": lambda: Ernie4_5_MoeConfig(**BASE, moe_num_experts=16, moe_k=4, tie_word_embeddings=False),
}
Choices = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Decoder, KVCache]:
    spec = read_spec(folder)
    shard = Shard.of(spec, 0, 1)
    weights = load_weights(folder, spec, shard, dtype, device)
    return Decoder(spec, weights, shard, SoleRank(), 256), KVCache(spec, shard, 64, 16, dtype, device)


def replace_routers(decoder: Decoder, new: Callable[[Router], Router]) -> None:
    for layer in decoder.weights.layers:
        if isinstance(layer.mlp, Moe):
            layer.mlp.router = new(layer.mlp.router)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_with_mixtures(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A prompt in chunks and decode steps, by a captured graph in bfloat16.

    The CPU's decoder takes the experts that were chosen on CUDA, since rounding turns nearly even choices;
    what it would have chosen itself is compared with them.
    """
    tiny_model(tmp_path, CONFIGS[name]())
    ids = torch.randint(0, VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    decoder, cache = make(tmp_path, DEVICE, dtype)
    reference, reference_cache = make(tmp_path, CPU, torch.float32)
    tables = shuffled_tables(2, 60, 16, 64)
    choices: Choices = []
    agreed: list[Tensor] = []

    def recorded(router: Router) -> Router:
        def route(x: Tensor) -> tuple[Tensor, Tensor]:
            choices.append(router(x))
            return choices[-1]

        return route

    def replayed(router: Router) -> Router:
        def route(x: Tensor) -> tuple[Tensor, Tensor]:
            own, _ = router(x)
            ids, weights = (tensor.to("cpu", copy=True) for tensor in next(replay))
            agreed.append((own.sort(-1).values == ids.sort(-1).values).all(-1))
            return ids, weights

        return route

    replace_routers(decoder, recorded)
    replace_routers(reference, replayed)
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-4

    def check(result: Tensor, *plan: Work) -> None:
        batch = make_batch(plan, tables, 16)
        expected = reference.logits(reference.forward(batch, reference_cache))[:, :VOCAB]
        near(result.float()[:, :VOCAB], expected, tolerance)

    def compute(*plan: Work) -> Tensor:
        choices.clear()
        return decoder.logits(decoder.forward(batch_to(make_batch(plan, tables, 16), DEVICE), cache))

    for plan in (
        [Work(0, 0, ids[0, :30].tolist())],
        [Work(0, 30, [int(ids[0, 30])], True), Work(1, 0, ids[1, :20].tolist())],
        [Work(1, 20, ids[1, 20:31].tolist())],
    ):
        result = compute(*plan)
        replay = iter(choices)
        check(result, *plan)

    def decode(position: int) -> list[Work]:
        return [Work(s, position, [int(ids[s, position])], True) for s in (0, 1)]

    if dtype == torch.bfloat16:
        state = batch_to(make_batch(decode(31), tables, 16), DEVICE)

        def step() -> Tensor:
            choices.clear()
            return decoder.logits(decoder.forward(state, cache))

        graph, logits = captured(step)
    for position in range(31, 60):
        if dtype == torch.bfloat16:
            state.token_ids.copy_(ids[:, position])
            state.positions.fill_(position)
            state.lengths.fill_(position + 1)
            graph.replay()
        else:
            logits = compute(*decode(position))
        replay = iter(choices)
        check(logits, *decode(position))
    share = torch.cat(agreed).float().mean()
    assert share > (0.85 if dtype == torch.bfloat16 else 0.99)


async def _answers(folder: Path, device: str, num_ranks: int) -> list[list[int]]:
    """Greedy outputs of ten requests at once."""
    draw = random.Random(3)
    prompts = [draw.choices(range(VOCAB), k=draw.randint(1, 90)) for _ in range(10)]
    params = SamplingParams(detokenize=False, ignore_eos=True, temperature=0.0, max_tokens=40)
    options: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "dtype": "float32"}
    async with Runtime(folder, device=device, tensor_parallel_size=num_ranks, **options) as runtime:

        async def collect(prompt: list[int]) -> list[int]:
            return [token async for output in runtime.generate(prompt, params) for token in output.token_ids]

        return list(await asyncio.gather(*map(collect, prompts)))


@pytest.mark.parametrize(("name", "num_ranks"), [("ernie", 1), ("glm", 2), ("glm", 4)])
def test_cuda_ranks_answer_as_cpu_ranks(name: str, num_ranks: int, tmp_path: Path) -> None:
    """In float32, through scheduler, graphs and collectives."""
    if count_gpus() < num_ranks:
        pytest.skip(f"{num_ranks} GPUs are needed")
    tiny_model(tmp_path, CONFIGS[name]())
    expected = asyncio.run(asyncio.wait_for(_answers(tmp_path, "cpu", 1), 120))
    answers = asyncio.run(asyncio.wait_for(_answers(tmp_path, "cuda", num_ranks), 120))
    assert answers == expected
