"""The kernel of decode attention where its tiles, parts and warps end. It has no interpreter: GPUs only.

Heads are neither normed nor turned here (`test_kernels.test_store_and_attend` does both), so that what is to
be stored is known bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import DEVICE, HAS_GPU, Shape, attention_case, batch_to, near, reference_attention
from tpworker.kernels.operands import Cut, NewTokens
from tpworker.model.attention.split import SplitAttention
from tpworker.model.batch import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_GPU or torch.cuda.get_device_capability() < (8, 0), reason="there is no such CUDA device"
    ),
]

SHAPES = {
    "1 on 1": Shape(0, 1, 1, 64, 0, 0),
    "10 on 2": Shape(0, 10, 2, 128, 0, 0),
    "16 on 8": Shape(0, 16, 8, 128, 0, 0),
    "24 on 2": Shape(0, 24, 2, 128, 0, 0),
    "16 on 1": Shape(0, 16, 1, 64, 0, 0),
}
CUTS = [Cut(1, 2), Cut(2, 1, 6), Cut(3, 2, 3, 64), Cut(7, 4, 3, 128), Cut(32, 4, 2, 64), Cut(5, 8, 2, 128)]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
LENGTHS = [1, 2, 16, 17, 18, 33, 64, 65, 66, 127, 129, 130, 700, 2049]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def newest(batch: Batch, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, NewTokens]:
    """Of a cache that holds the newest tokens: their heads, as the product leaves them, and where they go.

    They are gone from the cache then. Each sequence has as many as there are queries for it.
    """
    width, block_size = len(queries) // len(batch.lengths), keys.shape[1]
    last = batch.lengths.long()[:, None] - width + torch.arange(width, device=keys.device)
    blocks = batch.block_tables.long().gather(1, last // block_size)
    rows = (blocks * block_size + last % block_size).flatten()
    new = [cache.flatten(0, 1)[rows] for cache in (keys, values)]
    for cache in (keys, values):
        cache.view(-1, *cache.shape[2:])[rows] = torch.nan
    cosine = torch.ones(len(rows), 1, keys.shape[-1] // 2, device=keys.device)
    return torch.cat((queries, *new), dim=1), NewTokens(None, 0.0, cosine, torch.zeros_like(cosine), rows)


def attend(
    cut: Cut, tables: Tensor, lengths: Tensor, heads: Tensor, keys: Tensor, values: Tensor, new: NewTokens
) -> Tensor:
    """Twice, with the same bits."""
    from tpworker.kernels import ring_kernel

    (count, num_heads, head_dim), num_kv_heads = heads.shape, keys.shape[2]
    num_heads -= 2 * num_kv_heads
    count *= cut.turns  # of the last of which some rows may be missing
    shape = (count * num_kv_heads, cut.num_parts, num_heads // num_kv_heads)
    partial = (
        torch.full((*shape, head_dim), torch.nan, device=DEVICE),
        torch.full(shape, torch.nan, device=DEVICE),
        torch.full(shape, torch.nan, device=DEVICE),
        torch.zeros(shape[0], dtype=torch.int32, device=DEVICE),
    )
    first, second = (
        ring_kernel.attend(heads, keys, values, tables, lengths, partial, cut, new) for _ in range(2)
    )
    assert torch.equal(first.view(torch.int16), second.view(torch.int16))  # NaN or not
    assert not partial[3].any(), "the counters are as they were"
    return first.flatten(1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_end(shape: Shape, cut: Cut, dtype: torch.dtype) -> None:
    """What no sequence holds is NaN and must not be read; nothing depends on the sequences beside.

    What is new is NaN in the cache until it is stored.
    """
    batch, *tensors = attention_case(shape, 16, LENGTHS, [])
    queries, keys, values = (x.to(dtype) for x in tensors)
    expected = reference_attention(shape, batch, queries, keys, values).to(dtype)
    position = torch.arange(max(LENGTHS))
    rows = batch.block_tables.long()[:, position // 16] * 16 + position % 16
    rows = rows[position < batch.lengths[:, None]]
    for cache in (keys, values):
        held = cache.flatten(0, 1)[rows]
        cache.fill_(torch.nan)
        cache.view(-1, *cache.shape[2:])[rows] = held
    there = batch_to(batch, DEVICE)
    cache = keys.to(DEVICE), values.to(DEVICE)
    heads, new = newest(there, queries.to(DEVICE), *cache)
    result = attend(cut, there.block_tables, there.lengths, heads, *cache, new)
    near(result, expected, TOLERANCE[dtype])
    for stored, held in zip(cache, (keys, values), strict=True):
        assert torch.equal(stored.cpu().view(torch.int16), held.view(torch.int16)), "or is NaN, as before"
    for row in (0, 7, len(LENGTHS) - 1):
        one = slice(row, row + 1)
        of_one = NewTokens(None, 0.0, new.cos[one], new.sin[one], new.rows[one])
        alone = attend(cut, there.block_tables[one], there.lengths[one], heads[one], *cache, of_one)
        assert torch.equal(alone, result[one])


@pytest.mark.parametrize(
    ("block_size", "lengths"), [(16, [9001, 5500]), (32, LENGTHS), (256, LENGTHS)], ids=["long", "32", "256"]
)
def test_long_sequences_and_blocks(block_size: int, lengths: list[int]) -> None:
    shape = SHAPES["16 on 8"]
    batch, *tensors = attention_case(shape, block_size, lengths, [])
    there = batch_to(batch, DEVICE)
    queries, *cache = (x.to(DEVICE) for x in tensors)
    heads, new = newest(there, queries, *cache)
    result = attend(Cut(32, 4), there.block_tables, there.lengths, heads, *cache, new)
    near(result, reference_attention(shape, batch, *tensors).bfloat16())


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype", "is_taken"),
    [
        (32, 8, 128, 16, torch.bfloat16, True),
        (16, 1, 64, 64, torch.float16, True),
        (32, 1, 128, 16, torch.bfloat16, False),
        (8, 8, 80, 16, torch.bfloat16, False),
        (32, 8, 128, 8, torch.bfloat16, False),
        (32, 8, 128, 16, torch.float32, False),
    ],
)
def test_what_it_takes(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, is_taken: bool
) -> None:
    """Both kernels, through the backend; the plain one takes anything."""
    shape = Shape(0, num_heads, num_kv_heads, head_dim, 0, 0)
    batch, *tensors = attention_case(shape, block_size, [1, 90, 300], [])
    tensors = [x.to(dtype) for x in tensors]
    attention = SplitAttention(num_heads, num_kv_heads, head_dim, None, 132)  # type: ignore[arg-type]
    there = batch_to(batch, DEVICE)
    queries, *cache = (x.to(DEVICE) for x in tensors)
    plan = attention.prepare(there, block_size)
    results: list[Tensor | None] = [attention(queries, *cache, plan) for _ in range(2)]
    heads, new = newest(there, queries, *cache)
    fused = [attention.store_and_attend(heads, *cache, plan, new) for _ in range(2)]
    assert fused.count(None) == (0 if is_taken else 2)
    for result in results + fused * is_taken:
        assert result is not None
        near(result, reference_attention(shape, batch, *tensors).to(dtype), TOLERANCE[dtype])
