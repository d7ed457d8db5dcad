"""Layers whose scores are not the plain ones on a GPU: by FlashAttention 3, in decode steps too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma3TextConfig, MistralConfig, Qwen3Config

from tests.gpu.runners import TINY
from tests.gpu.test_cuda_ranks import assert_greedy, run
from tests.gpu.test_kernels import (
    DEVICE,
    SHAPES,
    Shape,
    attention_case,
    batch_to,
    captured,
    check_on_cuda,
    near,
    on_hopper,
)
from tests.model.helpers import tiny_model
from tpworker.checkpoint.weights import load_weights
from tpworker.model import layer_ops
from tpworker.model.attention import PagedAttention, Scores, choose, flash
from tpworker.model.attention.split import SplitAttention
from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder
from tpworker.model.families import read_spec
from tpworker.model.operations import operations_of
from tpworker.model.tp import Shard
from tpworker.rank.collectives import SoleRank

pytestmark = [pytest.mark.gpu, on_hopper]

SCORES = {
    "window": Scores(128**-0.5, window=70),
    "window-of-one": Scores(128**-0.5, window=1),
    "window-of-a-tile": Scores(128**-0.5, window=128),
    "scale": Scores(168**-0.5),
    "both": Scores(168**-0.5, window=70),
}
GEMMA = Shape(2304, 8, 4, 256, 9216, 256000)
SIZES = {"vocab_size": 1031, "hidden_size": 256, "intermediate_size": 520, "num_hidden_layers": 3}
HEADS = {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 256}
MODELS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: MistralConfig(**SIZES, **HEADS, sliding_window=17),
    "qwen3": lambda: Qwen3Config(
        **SIZES, **HEADS, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "gemma2": lambda: Gemma2Config(
        **SIZES,
        **(HEADS | {"head_dim": 256}),
        sliding_window=9,
        attn_logit_softcapping=4.0,
        query_pre_attn_scalar=144,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        **(HEADS | {"head_dim": 256}),
        sliding_window=9,
        sliding_window_pattern=3,
        tie_word_embeddings=False,
    ),
}


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def expected_of(shape: Shape, scores: Scores, batch: Batch, *tensors: Tensor) -> Tensor:
    paged = PagedAttention(shape.heads, shape.kv_heads, shape.head_dim, torch.float32, scores)
    queries, keys, values = (x.float() for x in tensors)
    return paged(queries, keys, values, paged.prepare(batch, keys.shape[1])).bfloat16()


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES.keys())
@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-8b-tp4", "gemma"])
@pytest.mark.parametrize(
    ("decodes", "chunks"),
    [
        ([650], []),
        ([1, 17, 600, 1300, 64, 63, 65, 69, 70, 71], []),
        ([], [(0, 200)]),
        ([], [(100, 70), (0, 1), (64, 64)]),
        ([650, 3, 129], [(0, 130), (512, 257)]),
    ],
)
def test_scores_of_every_kind(
    name: str, scores: Scores, block_size: int, decodes: list[int], chunks: list[tuple[int, int]]
) -> None:
    shape = GEMMA if name == "gemma" else SHAPES[name]
    batch, *tensors = attention_case(shape, block_size, decodes, chunks)
    expected = expected_of(shape, scores, batch, *tensors)
    queries, keys, values = (x.to(DEVICE) for x in tensors)
    for share_schedule in (True, False):
        attention = flash.FlashAttention(
            shape.heads, shape.kv_heads, shape.head_dim, torch.bfloat16, scores, share_schedule=share_schedule
        )
        plan = attention.prepare(batch_to(batch, DEVICE), block_size)
        near(attention(queries, keys, values, plan), expected)


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES.keys())
@pytest.mark.parametrize("count", [1, 4, 64])
def test_replays_at_other_lengths(count: int, scores: Scores) -> None:
    """Captured at a length of 1 each, as a start-up would; rows of length 0 stay finite."""
    shape = SHAPES["qwen3-8b-tp2"]
    batch, *tensors = attention_case(shape, 16, [1400 if count < 64 else 300] * count, [])
    there = batch_to(batch, DEVICE)
    there.lengths.fill_(1)
    attention = flash.FlashAttention(shape.heads, shape.kv_heads, shape.head_dim, torch.bfloat16, scores)
    queries, keys, values = (x.to(DEVICE) for x in tensors)
    longest = int(batch.lengths.max())
    graph, result = captured(lambda: attention(queries, keys, values, attention.prepare(there, 16)))
    for _ in range(4):
        lengths = torch.randint(0 if count > 1 else 1, longest + 1, (count,), dtype=torch.int32)
        lengths[0] = longest
        there.lengths.copy_(lengths)
        result.fill_(torch.nan)
        graph.replay()
        batch.lengths = lengths
        expected = expected_of(shape, scores, batch, *tensors)
        assert result.isfinite().all()
        near(result[lengths.to(DEVICE) > 0], expected[lengths > 0])


def test_which_kernels_serve(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    plain, window = Scores.plain(128), Scores(128**-0.5, window=5)
    assert isinstance(choose(16, 8, 128, torch.bfloat16, DEVICE, plain), SplitAttention)
    assert isinstance(choose(16, 8, 128, torch.bfloat16, DEVICE, window), flash.FlashAttention)
    assert "FlashAttention 3, for Scores(" in caplog.text
    caplog.clear()
    assert isinstance(choose(16, 8, 128, torch.float32, DEVICE, window), PagedAttention)
    assert "no step is captured" in caplog.text
    softcap = Scores(128**-0.5, softcap=5.0)
    assert isinstance(choose(16, 8, 128, torch.bfloat16, DEVICE, softcap), PagedAttention)
    assert "tokenspeed-fa3, has no softcap" in caplog.text


@pytest.mark.parametrize("count", [1, 64])
def test_gelu_mul(count: int) -> None:
    gate_up = torch.randn(count, 2 * 1000, dtype=torch.bfloat16)
    near(operations_of(DEVICE).gelu_mul(gate_up.to(DEVICE)), layer_ops.gelu_mul(gate_up))


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma2"])  # it cannot be captured
def test_a_decoder_on_cuda(name: str, block_size: int, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, MODELS[name]())
    ids = torch.randint(0, 1031, (2, 60))
    spec, shard = read_spec(tmp_path), Shard.of(read_spec(tmp_path), 0, 1)
    weights = load_weights(tmp_path, spec, shard, torch.bfloat16, DEVICE)
    decoder = Decoder(spec, weights, shard, SoleRank(), 256)
    check_on_cuda(decoder, ids, model(ids).logits, block_size)


@pytest.mark.parametrize("name", MODELS)
def test_cuda_ranks_answer_as_transformers(name: str, tmp_path: Path) -> None:
    """Through the runtime: captured steps, chunks beside decodes, and any lookahead. Gemma 2 has softcaps:
    nothing of it is captured, and its ranks read lengths on the host."""
    config = MODELS[name]()
    config.update({"vocab_size": 515} | TINY)
    tiny_model(tmp_path, config, torch.bfloat16)
    options = {"rank_module": "tpworker.rank"} if name == "gemma2" else {}
    outputs = [run(tmp_path, 1, lookahead=ahead, prefix_caching=False, **options) for ahead in (2, 0)]
    assert outputs[0][0] == outputs[1][0]
    assert_greedy(tmp_path, outputs[0][0])
    assert_greedy(tmp_path, outputs[0][1])


def test_ranks_without_flash_attention_serve_windows_too(tmp_path: Path) -> None:
    """In float32: by the torch reference, and nothing is captured."""
    config = MODELS["qwen3"]()
    config.update({"vocab_size": 515} | TINY)
    tiny_model(tmp_path, config, torch.bfloat16)
    alone, together = run(tmp_path, 1, dtype="float32", rank_module="tpworker.rank")
    assert_greedy(tmp_path, alone)
    assert_greedy(tmp_path, together)
