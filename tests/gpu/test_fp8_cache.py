"""Keys and values in FP8: kernels that write or read them, against attention to what they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import (
    DEVICE,
    HAS_GPU,
    Shape,
    attention_case,
    batch_to,
    near,
    on_hopper,
    randn,
    reference_attention,
)
from tests.gpu.test_ring_attention import LENGTHS, SHAPES
from tpworker.kernels.operands import Places
from tpworker.model import layer_ops
from tpworker.model.attention import flash
from tpworker.model.attention.paged import PagedAttention
from tpworker.model.attention.split import SplitAttention
from tpworker.model.families import RopeSpec
from tpworker.model.kv_cache import FP8, FP8_LARGEST, store
from tpworker.model.rope import rope_tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_GPU or torch.cuda.get_device_capability() < (8, 9), reason="no CUDA device that knows FP8"
    ),
]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def rounded(x: Tensor) -> Tensor:
    """To what FP8 has."""
    return x.to(FP8).to(BF16)


def bytes_of(x: Tensor) -> Tensor:
    return x.cpu().view(torch.uint8)


@pytest.mark.parametrize("name", ["80 wide", "blocks of 8", "1 on 1", "16 on 8", "24 on 2"])
def test_decode_attention_reads_it(name: str) -> None:
    shape, block_size = SHAPES.get(name, SHAPES["10 on 2"]), 8 if name == "blocks of 8" else 16
    if name == "80 wide":
        shape = Shape(0, 8, 2, 80, 0, 0)
    batch, queries, *cache = attention_case(shape, block_size, LENGTHS, [])
    queries = queries.to(BF16)
    keys, values = (rounded(x) for x in cache)
    expected = reference_attention(shape, batch, queries, keys, values).to(BF16)
    others = PagedAttention(shape.heads, shape.kv_heads, shape.head_dim, BF16)
    attention = SplitAttention(shape.heads, shape.kv_heads, shape.head_dim, others, 132)
    plan = attention.prepare(batch_to(batch, DEVICE), block_size)
    narrow = keys.to(DEVICE).to(FP8), values.to(DEVICE).to(FP8)
    near(attention(queries.to(DEVICE), *narrow, plan), expected, 5e-3)


@on_hopper
@pytest.mark.parametrize("name", ["16 on 8", "24 on 2", "10 on 2"])
@pytest.mark.parametrize(
    ("decodes", "chunks"), [([], [(0, 200)]), ([650, 3, 129], [(0, 130), (512, 257)]), ([650, 40], [])]
)
def test_flash_attention_reads_it(name: str, decodes: list[int], chunks: list[tuple[int, int]]) -> None:
    """Queries and weights of values are rounded to FP8 as well: a few percent of what is attended."""
    shape = SHAPES[name]
    batch, queries, *cache = attention_case(shape, 16, decodes, chunks)
    queries = rounded(queries)
    keys, values = (rounded(x) for x in cache)
    expected = reference_attention(shape, batch, queries, keys, values)
    attention = flash.FlashAttention(shape.heads, shape.kv_heads, shape.head_dim, BF16, kv_dtype=FP8)
    plan = attention.prepare(batch_to(batch, DEVICE), 16)
    narrow = keys.to(DEVICE).to(FP8), values.to(DEVICE).to(FP8)
    result = attention(queries.to(DEVICE), *narrow, plan)
    assert result.dtype == BF16
    assert (result.cpu().float() - expected).norm() < 0.04 * expected.norm()


def test_heads_are_stored_as_the_reference_stores_them() -> None:
    from tpworker.kernels.triton_kernels import norm_rotate_store

    heads = randn(40, 12, 128, dtype=BF16, scale=3.0)
    heads[3, 11] = 5000.0
    cos, sin = rope_tables(RopeSpec(theta=1e4), 128, 40, torch.device("cpu"))
    places = Places(cos[:, None], sin[:, None], torch.randperm(8 * 16)[:40])
    there = Places(*(x.to(DEVICE) for x in places))
    here = [torch.zeros(8, 16, 2, 128).to(FP8) for _ in range(2)]
    cuda = [x.to(DEVICE) for x in here]
    layer_ops.norm_rotate_store(heads, None, 1e-6, places, *here)
    norm_rotate_store(heads.to(DEVICE), None, 1e-6, there, *cuda)
    assert torch.equal(bytes_of(cuda[1]), bytes_of(here[1]))  # values are not rotated
    near(cuda[0].float(), here[0].float(), 0.03)  # a bit of rounding before may be one of rounding to FP8


def test_narrowing_knows_no_overflow() -> None:
    from tpworker.kernels.triton_kernels import narrow

    x = randn(3, 5000, dtype=BF16, scale=300.0)
    cache = torch.zeros(1, 3, 1, 5000).to(FP8)
    store(cache, torch.arange(3), x[:, None])
    assert (x.abs() > FP8_LARGEST).any()
    assert torch.equal(bytes_of(narrow(x.to(DEVICE))), bytes_of(cache[0, :, 0]))
