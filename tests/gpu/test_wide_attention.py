"""Decode attention of several new tokens a sequence, as steps with drafts have them: on GPUs.

The reference takes a sequence's new tokens as a chunk of a prompt. With TRITON_INTERPRET=1 and Triton
installed the plain kernel's test runs on the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import (
    CPU,
    DEVICE,
    HAS_GPU,
    IS_INTERPRETED,
    Shape,
    attention_case,
    batch_to,
    captured,
    near,
    on_hopper,
    randn,
    reference_attention,
    split_attention,
)
from tests.gpu.test_ring_attention import TOLERANCE, attend, newest
from tests.model.helpers import SPEC
from tpworker.kernels.operands import Cut, NewTokens
from tpworker.model import composed_ops, layer_ops
from tpworker.model.attention import flash
from tpworker.model.attention.split import SplitAttention
from tpworker.model.batch import Batch
from tpworker.model.families import RopeSpec
from tpworker.model.kv_cache import KVCache
from tpworker.model.operations import operations_of
from tpworker.model.rope import rope_tables
from tpworker.model.tp import Shard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]
on_ampere = pytest.mark.skipif(
    not HAS_GPU or torch.cuda.get_device_capability() < (8, 0), reason="there is no such CUDA device"
)
SHAPES = {
    "qwen3-8b": Shape(0, 32, 8, 128, 0, 0),
    "qwen3-0.6b": Shape(0, 16, 8, 128, 0, 0),
    "ernie-4.5-21b-a3b": Shape(0, 20, 4, 128, 0, 0, has_norm=False),
    "glm-4.5-air-tp2": Shape(0, 48, 4, 128, 0, 0, has_norm=False, rotary_dim=64),
    "smollm2": Shape(0, 9, 3, 64, 0, 0, has_norm=False),
    "1 on 1": Shape(0, 1, 1, 64, 0, 0, has_norm=False),
}
CUTS = [Cut(1, 2), Cut(3, 2, 3, 64), Cut(7, 4, 3, 128), Cut(32, 4, 2, 64)]
PAIRS = [
    (name, width)
    for name, widths in (
        ("qwen3-8b", (2, 3, 4)),
        ("qwen3-0.6b", (2, 5, 8)),
        ("ernie-4.5-21b-a3b", (2, 3)),
        ("smollm2", (2, 5)),
        ("1 on 1", (2, 9)),
    )
    for width in widths
]
"""What the ring takes: up to 16 queries a key-value head in one turn."""
TURNS = [
    ("qwen3-8b", 5, 2),  # three tokens and two
    ("qwen3-8b", 8, 2),
    ("glm-4.5-air-tp2", 2, 2),
    ("glm-4.5-air-tp2", 3, 3),
    ("qwen3-0.6b", 3, 2),
    ("1 on 1", 5, 3),
]
"""And in several."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def lengths_of(width: int) -> list[int]:
    """With the new tokens: around the ends of blocks, slabs, tiles and parts; none before them, too."""
    return [width + old for old in (0, 1, 14, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 700, 2049)]


def wide_case(
    shape: Shape, block_size: int, lengths: list[int], width: int
) -> tuple[Batch, Batch, Tensor, Tensor, Tensor]:
    """The last `width` tokens of sequences of these lengths, on the CPU: as chunks, and as what decodes.

    And queries, keys and values, the new ones in the cache.
    """
    chunks, *tensors = attention_case(shape, block_size, [], [(length - width, width) for length in lengths])
    return chunks, dataclasses.replace(chunks, num_decodes=len(lengths), width=width), *tensors


@on_ampere
@pytest.mark.parametrize(("name", "width", "turns"), [(*pair, 1) for pair in PAIRS] + TURNS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_end(name: str, width: int, turns: int, cut: Cut, dtype: torch.dtype) -> None:
    """What no sequence holds is NaN and must not be read; nothing depends on the sequences beside.

    What is new is NaN in the cache until it is stored, and so is what wrong drafts have left behind it.
    """
    shape, lengths, cut = SHAPES[name], lengths_of(width), dataclasses.replace(cut, turns=turns)
    chunks, batch, *tensors = wide_case(shape, 16, lengths, width)
    queries, keys, values = (x.to(dtype) for x in tensors)
    expected = reference_attention(shape, chunks, queries, keys, values).to(dtype)
    position = torch.arange(max(lengths))
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
    for sequence in (0, 8, len(lengths) - 1):
        one, its = slice(sequence, sequence + 1), slice(sequence * width, (sequence + 1) * width)
        of_one = NewTokens(None, 0.0, new.cos[its], new.sin[its], new.rows[its])
        alone = attend(cut, there.block_tables[one], there.lengths[one], heads[its], *cache, of_one)
        assert torch.equal(alone, result[its])


@on_ampere
@pytest.mark.parametrize("length", [40, 900])
@pytest.mark.parametrize("turns", [1, 2])
def test_a_draft_that_is_nan_is_seen_by_no_token_before_it(length: int, turns: int) -> None:
    shape, width = SHAPES["qwen3-8b"], 4
    chunks, batch, *tensors = wide_case(shape, 16, [length], width)
    expected = reference_attention(shape, chunks, *tensors).bfloat16()
    there = batch_to(batch, DEVICE)
    queries, *cache = (x.to(DEVICE) for x in tensors)
    heads, new = newest(there, queries, *cache)
    heads[2] = torch.nan
    cut = Cut(4, 2, turns=turns)
    result = attend(cut, there.block_tables, there.lengths, heads, *cache, new)
    near(result[:2], expected[:2])
    assert result[2:].isnan().all()


BACKEND_CASES = [
    (name, width, dtype, block_size)
    for name, width, dtype, block_size in (
        ("qwen3-8b", 2, torch.bfloat16, 16),
        ("qwen3-8b", 4, torch.bfloat16, 32),
        ("qwen3-8b", 5, torch.bfloat16, 16),  # 20 queries a head: two turns
        ("qwen3-8b", 9, torch.bfloat16, 16),  # 36: FlashAttention 3
        ("qwen3-8b", 3, torch.float32, 16),
        ("qwen3-0.6b", 2, torch.float16, 16),
        ("qwen3-0.6b", 9, torch.bfloat16, 16),  # 18: two turns
        ("ernie-4.5-21b-a3b", 3, torch.bfloat16, 16),
        ("ernie-4.5-21b-a3b", 2, torch.bfloat16, 8),  # small blocks
        ("glm-4.5-air-tp2", 2, torch.bfloat16, 16),  # 24: two turns
        ("glm-4.5-air-tp2", 4, torch.bfloat16, 64),
        ("glm-4.5-air-tp2", 2, torch.float32, 16),
        ("smollm2", 2, torch.float32, 4),
    )
    if not IS_INTERPRETED or (dtype == torch.float32 and name != "glm-4.5-air-tp2")
]


def others(shape: Shape, dtype: torch.dtype) -> object:
    """What `choose` gives `SplitAttention` for the batches that it does not take itself."""
    if HAS_GPU and flash.why_not(shape.head_dim, dtype, DEVICE) is None:
        return flash.FlashAttention(shape.heads, shape.kv_heads, shape.head_dim, dtype)
    return split_attention(shape).others


@pytest.mark.parametrize(("name", "width", "dtype", "block_size"), BACKEND_CASES)
def test_store_and_attend(name: str, width: int, dtype: torch.dtype, block_size: int) -> None:
    """Heads as the product leaves them, with norms and angles, by whichever kernel takes them."""
    shape = SHAPES[name]
    longest = 300 if IS_INTERPRETED else 5000
    lengths = [width, width + 1, 17, 64, 66, 300, 90, longest]
    chunks, batch, _, keys, values = wide_case(shape, block_size, lengths, width)
    heads = randn(width * len(lengths), shape.heads + 2 * shape.kv_heads, shape.head_dim, dtype=dtype)
    norms = (randn(shape.head_dim, dtype=dtype), randn(shape.head_dim, dtype=dtype))
    angles = rope_tables(RopeSpec(theta=1e4), shape.rotary_dim or shape.head_dim, longest, CPU)
    spec = dataclasses.replace(
        SPEC, num_layers=1, num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim
    )
    results = []
    for device in (CPU, DEVICE):
        is_reference = not results
        cache = KVCache(spec, Shard.of(spec, 0, 1), len(keys), block_size, dtype, device)
        cache.keys[0].copy_(keys)
        cache.values[0].copy_(values)
        there = batch_to(chunks if is_reference else batch, device)
        split = SplitAttention(shape.heads, shape.kv_heads, shape.head_dim, others(shape, dtype), 132)  # type: ignore[arg-type]
        attention = split_attention(shape).others if is_reference else split
        arrays = (there.positions, there.sequence_of, there.block_tables, *(x.to(device) for x in angles))
        operations = operations_of(device)
        places = (layer_ops if is_reference else operations).places(*arrays, block_size)
        here = (heads.to(device), tuple(norm.to(device) for norm in norms) if shape.has_norm else None)
        plan = attention.prepare(there, block_size)
        for _ in range(1 if is_reference else 2):  # as two layers would
            out = composed_ops.store_and_attend(
                operations, attention, plan, *here, 1e-6, places, cache.keys[0], cache.values[0]
            )
        results.append((out, cache.keys[0], cache.values[0]))
    for result, reference in zip(results[1], results[0], strict=True):
        near(result, reference)
    assert torch.equal(results[1][2].cpu(), results[0][2])


@on_hopper
@pytest.mark.parametrize(
    ("name", "width"),
    [
        *(("qwen3-8b", width) for width in (2, 4, 5, 9)),
        ("qwen3-0.6b", 3),
        ("ernie-4.5-21b-a3b", 2),
        *(("glm-4.5-air-tp2", width) for width in (2, 3)),
    ],
)
@pytest.mark.parametrize("count", [1, 4, 64])
def test_replays_at_other_lengths(name: str, width: int, count: int) -> None:
    """Captured with every row in the null slot, as at a start; replayed with some rows there."""
    shape, longest = SHAPES[name], 5000 if count < 64 else 400
    chunks, batch, *tensors = wide_case(shape, 16, [longest] * count, width)
    there = batch_to(batch, DEVICE)
    there.lengths.fill_(width)
    there.block_tables.zero_()
    attention = SplitAttention(
        shape.heads, shape.kv_heads, shape.head_dim, others(shape, torch.bfloat16), 132  # type: ignore[arg-type]
    )  # fmt: skip
    pristine = [x.to(DEVICE) for x in tensors]
    queries, *cache = (x.clone() for x in pristine)
    num_heads = shape.heads + 2 * shape.kv_heads
    heads = torch.zeros(count * width, num_heads, shape.head_dim, dtype=torch.bfloat16, device=DEVICE)
    _, new = newest(there, queries, *cache)
    operations, places = operations_of(DEVICE), (new.cos, new.sin, new.rows)

    def step() -> Tensor:
        plan = attention.prepare(there, 16)
        return composed_ops.store_and_attend(
            operations, attention, plan, heads, None, 0.0, layer_ops.Places(*places), cache[0], cache[1]
        )

    graph, result = captured(step)
    for _ in range(4):
        chunks.lengths = torch.randint(width, longest + 1, (count,), dtype=torch.int32)
        chunks.lengths[0] = longest
        is_real = torch.rand(count) < 0.8
        is_real[0] = True
        expected = reference_attention(shape, chunks, *tensors).bfloat16()
        there.lengths.copy_(torch.where(is_real, chunks.lengths, width))
        there.block_tables.copy_(chunks.block_tables * is_real[:, None])
        for x, original in zip(cache, pristine[1:], strict=True):
            x.copy_(original)
        its_heads, its_places = newest(there, pristine[0], *cache)
        heads.copy_(its_heads.nan_to_num())  # several rows of the null slot have taken theirs away
        new.rows.copy_(its_places.rows)
        result.fill_(torch.nan)
        graph.replay()
        assert result.isfinite().all()
        rows = is_real.repeat_interleave(width)
        near(result[rows.to(DEVICE)], expected[rows])
        for stored, original in zip(cache, pristine[1:], strict=True):
            assert torch.equal(stored[1:], original[1:]), "all but the null block"


@pytest.mark.skipif(HAS_GPU and torch.cuda.get_device_capability() < (8, 0), reason="bfloat16 is needed")
@pytest.mark.parametrize("name", ["qwen3-0.6b", "smollm2"])
@pytest.mark.parametrize("width", [2, 3, 5])
def test_the_plain_kernel(name: str, width: int) -> None:
    """What is not taken by the ring, and cannot be by FlashAttention 3: each token by itself."""
    from tpworker.kernels import split_kernel

    pytest.importorskip("triton")
    shape, dtype = SHAPES[name], torch.float32
    chunks, batch, *tensors = wide_case(shape, 16, [width, 16 + width, 70, 200], width)
    queries, keys, values = (x.to(dtype) for x in tensors)
    expected = reference_attention(shape, chunks, queries, keys, values)
    attention, there = split_attention(shape, 20), batch_to(batch, DEVICE)
    plan = attention.prepare(there, 16)
    run = partial(split_kernel.attend, queries.to(DEVICE), keys.to(DEVICE), values.to(DEVICE))
    for _ in range(2):
        result = run(there.block_tables, there.lengths, plan.partial, plan.cut.num_parts)
        near(result.flatten(1), expected)
