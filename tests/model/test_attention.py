"""The paged reference against attention written down plainly, for ragged batches and odd shapes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.helpers import Work, make_batch, shuffled_tables
from tpworker.kernels.operands import Cut
from tpworker.model.attention import Scores, paged, split
from tpworker.model.attention.paged import PagedAttention
from tpworker.model.attention.split import SplitAttention
from tpworker.model.batch import Batch
from tpworker.model.kv_cache import FP8, FP8_LARGEST, store

HEAD_DIM = 8
PLAIN = Scores.plain(HEAD_DIM)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "count", "cut"),
    [
        (32, 8, 1, Cut(18, warps=4)),  # Qwen3-8B, TP 1; a GPU of 132 processors; 2304 tokens at most
        (32, 8, 16, Cut(4, warps=2)),
        (16, 4, 16, Cut(4, warps=4)),
        (16, 4, 64, Cut(1, warps=4)),
        (32, 8, 40, Cut(1, warps=2)),  # 320 programs: wide ones would not all fit
        (32, 8, 64, Cut(1, warps=2)),
        (16, 8, 256, Cut(1, warps=2)),
        (24, 2, 4, Cut(16, warps=4)),  # GLM-4.5-Air, TP 4
        (24, 2, 64, Cut(2, warps=4)),
    ],
)
def test_how_decode_attention_is_cut(num_heads: int, num_kv_heads: int, count: int, cut: Cut) -> None:
    others = PagedAttention(num_heads, num_kv_heads, 128, torch.float32)
    assert SplitAttention(num_heads, num_kv_heads, 128, others, 132).choose_cut(count, 2304) == cut


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "width", "block_size", "is_ours"),
    [
        (32, 8, 128, 1, 16, True),
        (32, 8, 128, 4, 16, True),
        (32, 8, 128, 8, 16, True),  # 32 queries a key-value head: in two turns
        (32, 8, 128, 9, 16, False),
        (20, 4, 128, 3, 16, True),
        (48, 4, 128, 1, 16, True),
        (48, 4, 128, 2, 16, True),
        (48, 4, 128, 3, 16, False),
        (20, 1, 128, 2, 16, False),
        (32, 8, 128, 2, 8, False),
        (32, 8, 80, 2, 16, False),
        (32, 8, 80, 1, 16, True),
    ],
)
def test_who_attends_to_several_tokens_of_a_sequence(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    width: int,
    block_size: int,
    is_ours: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our own kernel where it takes all in two turns, FlashAttention 3 where it does not; none that waits."""
    monkeypatch.setattr(split, "has_gluon", lambda kernel: True)
    count = 3
    batch = Batch(
        *[torch.zeros(count * width, dtype=torch.int64)] * 3, torch.zeros(count, 40, dtype=torch.int32),
        torch.full((count,), width, dtype=torch.int32), torch.zeros(count + 1, dtype=torch.int32),
        count, width, width=width,
    )  # fmt: skip

    class Others(PagedAttention):
        reads_lengths = False

        def prepare(self, batch: Batch, block_size: int) -> Any:
            return "others"

    for is_slow in (False, True):
        others = (PagedAttention if is_slow else Others)(num_heads, num_kv_heads, head_dim, torch.float32)
        attention = SplitAttention(num_heads, num_kv_heads, head_dim, others, 132)
        assert (attention.prepare(batch, block_size) != "others") == (is_ours or is_slow)


def naive(
    queries: Tensor, keys: Tensor, values: Tensor, batch: Batch, block_size: int, scores: Scores
) -> Tensor:
    """Token by token, head by head, in float64: [T, H * head_dim]."""
    num_heads, num_kv_heads = queries.shape[1], keys.shape[2]
    out = torch.empty(queries.shape, dtype=torch.float64)
    for token, head in itertools.product(range(len(queries)), range(num_heads)):
        table = batch.block_tables[batch.sequence_of[token]]
        position = torch.arange(int(batch.positions[token]) + 1)
        if scores.window is not None:
            position = position[-scores.window :]
        place = (
            table[position // block_size].long(),
            position % block_size,
            head * num_kv_heads // num_heads,
        )
        products = keys[place].double() @ queries[token, head].double() * scores.scale
        if scores.softcap is not None:
            products = (products / scores.softcap).tanh() * scores.softcap
        out[token, head] = products.softmax(0) @ values[place].double()
    return out.flatten(1)


def run(
    decodes: list[int],
    chunks: list[tuple[int, int]],
    block_size: int = 4,
    num_heads: int = 6,
    num_kv_heads: int = 3,
    dtype: torch.dtype = torch.float32,
    scores: Scores = PLAIN,
    cache: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(result, reference) of decoding sequences of these lengths and chunks (start, length)."""
    spans = [(length - 1, 1) for length in decodes] + chunks
    plan = [Work(s, start, [0] * length, decode=s < len(decodes)) for s, (start, length) in enumerate(spans)]
    longest = max(start + length for start, length in spans)
    num_blocks = 1 + len(spans) * -(-longest // block_size)
    tables = shuffled_tables(len(spans), longest, block_size, num_blocks)
    batch = make_batch(plan, tables, block_size)
    generator = torch.Generator().manual_seed(len(spans))
    shape = (num_blocks, block_size, num_kv_heads, HEAD_DIM)
    keys, values = (torch.randn(shape, generator=generator).to(cache or dtype) for _ in range(2))
    num_tokens = len(batch.token_ids)
    queries = (3 * torch.randn(num_tokens, num_heads, HEAD_DIM, generator=generator)).to(dtype)
    attention = PagedAttention(num_heads, num_kv_heads, HEAD_DIM, dtype, scores)
    result = attention(queries, keys, values, attention.prepare(batch, block_size))
    assert result.dtype == dtype
    return result, naive(queries, keys.to(dtype), values.to(dtype), batch, block_size, scores)


def check(result: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(result.double(), reference, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    decodes=st.lists(st.integers(1, 90), max_size=6),
    chunks=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=2),
    block_size=st.sampled_from([1, 2, 4, 16, 64]),
    heads=st.sampled_from([(4, 4), (6, 3), (6, 2), (5, 1)]),
    scores=st.builds(
        Scores,
        scale=st.sampled_from([HEAD_DIM**-0.5, 0.2]),
        window=st.none() | st.sampled_from([1, 2, 4, 5, 16, 17, 33]),
        softcap=st.none() | st.sampled_from([0.5, 3.0]),
    ),
)
def test_any_batch(
    decodes: list[int],
    chunks: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int],
    scores: Scores,
) -> None:
    if decodes or chunks:
        check(*run(decodes, chunks, block_size, *heads, scores=scores))


def test_what_is_outside_the_window_is_not_read() -> None:
    """Its blocks may hold anything: not even what is finite is asked of them."""
    attention = PagedAttention(2, 1, HEAD_DIM, torch.float32, Scores(1.0, window=5))
    tables = [[1, 2, 3, 4], [5, 6, 7, 8]]
    batch = make_batch([Work(0, 12, [0], decode=True), Work(1, 11, [0] * 3)], tables, 4)
    keys, values = torch.randn(2, 9, 4, 1, HEAD_DIM).unbind()
    for cache in (keys, values):
        cache[[0, 1, 2, 5]] = torch.nan  # tokens up to the seventh, and the third
    attended = attention(torch.randn(4, 2, HEAD_DIM), keys, values, attention.prepare(batch, 4))
    assert attended.isfinite().all()


@pytest.mark.parametrize("group_bytes", [1, 4000, 10**9])
def test_groups_of_any_size(group_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "_GROUP_BYTES", group_bytes)
    check(*run([70, 3, 90, 1, 33, 34, 35, 64], [(5, 7)]))


@pytest.mark.parametrize("scores", [PLAIN, Scores(0.4, window=6, softcap=2.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, scores: Scores) -> None:
    result, reference = run([70, 3, 90, 17], [(5, 7), (0, 9)], dtype=dtype, scores=scores)
    assert (result - reference).abs().max() < 0.02


@pytest.mark.parametrize("scores", [PLAIN, Scores(0.4, window=6, softcap=2.0)])
def test_keys_and_values_in_fp8_are_attended_to_as_what_they_stand_for(scores: Scores) -> None:
    check(*run([70, 3, 90, 17], [(5, 7), (0, 9)], scores=scores, cache=FP8))


def test_what_is_stored_in_fp8_is_rounded_and_knows_no_overflow() -> None:
    cache = torch.zeros(2, 2, 1, 4).to(FP8)
    given = torch.tensor([[1.03, 448.0, 1e6, -500.0], [torch.nan, torch.inf, -torch.inf, 0.01]])
    store(cache, torch.tensor([3, 0]), given[:, None])
    largest = FP8_LARGEST
    assert cache[1, 1, 0].float().tolist() == [1.0, largest, largest, -largest]
    assert cache[0, 0, 0, 0].float().isnan()
    assert cache[0, 0, 0, 1:].float().tolist() == [largest, -largest, 0.009765625]
    assert not cache.float()[[0, 1], [1, 0]].any()


@pytest.mark.parametrize("count", [1, 300, 10**9])
def test_capped_chunks_in_any_number_of_pieces(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "_SCORES", count)
    check(*run([], [(5, 17), (0, 9), (40, 1)], scores=Scores(0.4, softcap=2.0)))


def test_groups_hold_similar_lengths_within_the_cache() -> None:
    attention = PagedAttention(6, 3, HEAD_DIM, torch.float32)
    token_bytes = 3 * HEAD_DIM * 4
    lengths = sorted([1] * 40 + [30, 31, 300, 310, 600, 5000] + [400] * 200)
    groups = [lengths[rows] for rows in attention._partition(lengths)]
    assert [length for group in groups for length in group] == lengths
    for group in groups:
        assert group[-1] <= 2 * group[0] + paged._ALIGNMENT
        assert len(group) == 1 or len(group) * group[-1] * token_bytes <= paged._GROUP_BYTES
    assert len(groups) <= 12
