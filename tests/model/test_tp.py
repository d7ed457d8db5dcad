"""How tensors are split over ranks, and how vocabulary-parallel results are put together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.helpers import SPEC, run_ranks
from tpworker.model.tp import (
    HeadLayout,
    Run,
    Shard,
    Split,
    argmax_ranks,
    embed,
    gather_vocab,
)


@settings(deadline=None)
@given(full=st.integers(1, 300), size=st.integers(1, 64), alignment=st.sampled_from([1, 8]))
def test_even_splits_cover_the_axis_once(full: int, size: int, alignment: int) -> None:
    splits = [Split.even(full, rank, size, alignment) for rank in range(size)]
    assert len({split.local for split in splits}) == 1
    assert splits[0].local % alignment == 0
    assert splits[0].local < -(-full // size) + alignment
    sources = [run.source + i for split in splits for run in split.runs for i in range(run.length)]
    assert sources == list(range(full))
    assert sum(split.num_real for split in splits) == full
    for rank, split in enumerate(splits):
        for run in split.runs:
            assert (
                run.source - run.target == rank * split.local
            )  # so that an id's place follows from the rank
            assert run.target + run.length <= split.local


def test_a_scaled_split_is_the_same_split_of_longer_entries() -> None:
    split = Split(6, 4, (Run(4, 0, 2), Run(1, 2, 1)))
    assert split.scaled(10) == Split(60, 40, (Run(40, 0, 20), Run(10, 20, 10)))


def unit_table(layout: HeadLayout) -> list[tuple[int | None, list[int | None]]]:
    """The key-value head of each local unit with its query heads; None where it is padding."""
    keys: list[int | None] = [None] * layout.keys.local
    for run in layout.keys.runs:
        keys[run.target : run.target + run.length] = range(run.source, run.source + run.length)
    queries: list[int | None] = [None] * layout.queries.local
    for run in layout.queries.runs:
        queries[run.target : run.target + run.length] = range(run.source, run.source + run.length)
    group = layout.queries.local // layout.keys.local
    assert group * layout.keys.local == layout.queries.local
    return [(key, queries[unit * group : (unit + 1) * group]) for unit, key in enumerate(keys)]


@given(
    width=st.integers(1, 300), number=st.integers(1, 4), size=st.integers(1, 9), alignment=st.integers(1, 16)
)
def test_parts_of_a_longer_axis_are_split_alike(width: int, number: int, size: int, alignment: int) -> None:
    """As shared experts are, which are published as one."""
    for start in range(0, number * width, width):
        seen = []
        for rank in range(size):
            part = Split.even(width, rank, size, alignment)
            split = part.at(start, number * width)
            assert (split.full, split.local, split.num_real) == (number * width, part.local, part.num_real)
            assert [run.target for run in split.runs] == [run.target for run in part.runs]
            seen += [run.source + i for run in split.runs for i in range(run.length)]
        assert seen == list(range(start, start + width))


@settings(deadline=None)
@given(num_kv_heads=st.integers(1, 16), group=st.integers(1, 16), size=st.integers(1, 64))
def test_every_query_head_is_computed_once_beside_its_key_head(
    num_kv_heads: int, group: int, size: int
) -> None:
    num_heads = num_kv_heads * group
    layouts = [HeadLayout.of(num_heads, num_kv_heads, rank, size) for rank in range(size)]
    assert len({(layout.queries.local, layout.keys.local) for layout in layouts}) == 1
    seen = []
    for layout in layouts:
        for key, queries in unit_table(layout):
            real = [query for query in queries if query is not None]
            assert all(query // group == key for query in real)
            assert (key is None) == (not real)
            seen += real
    assert seen == list(range(num_heads))
    assert layouts[0].keys.local == -(-num_kv_heads // size)  # no more KV cache than necessary
    if num_heads % size == 0 and num_kv_heads % size == 0:
        assert layouts[0].queries.local == num_heads // size
    if size % num_kv_heads == 0 and group % (size // num_kv_heads) == 0:
        assert layouts[0].queries.local == num_heads // size


@pytest.mark.parametrize(
    ("heads", "size", "queries", "keys"),
    [
        ((9, 3), 1, 9, 3),
        ((9, 3), 2, 6, 2),
        ((9, 3), 3, 3, 1),
        ((9, 3), 4, 3, 1),
        ((9, 3), 8, 2, 1),
        ((32, 8), 4, 8, 2),
        ((32, 8), 16, 2, 1),
        ((20, 4), 8, 3, 1),
        ((8, 1), 4, 2, 1),
        ((96, 8), 8, 12, 1),
    ],
)
def test_sizes(heads: tuple[int, int], size: int, queries: int, keys: int) -> None:
    layout = HeadLayout.of(*heads, 0, size)
    assert (layout.queries.local, layout.keys.local) == (queries, keys)


def test_the_layouts_in_the_documentation() -> None:
    assert unit_table(HeadLayout.of(9, 3, 1, 2)) == [(2, [6, 7, 8]), (None, [None, None, None])]
    tables = [unit_table(HeadLayout.of(9, 3, rank, 6)) for rank in range(6)]
    assert tables[0] == [(0, [0, 1])]
    assert tables[1] == [(0, [2, None])]
    assert tables[5] == [(2, [8, None])]


def test_heads_that_divide_are_read_in_one_piece() -> None:
    layout = HeadLayout.of(32, 8, 1, 4)
    assert layout.queries.runs == (Run(8, 0, 8),)
    assert layout.keys.runs == (Run(2, 0, 2),)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 20])
def test_embedding_is_the_full_tables(size: int) -> None:
    spec = dataclasses.replace(SPEC, vocab_size=37, hidden_size=5)
    table = torch.randn(37, 5)
    token_ids = torch.randint(0, 37, (50,))

    def main(collectives):  # type: ignore[no-untyped-def]
        shard = Shard.of(spec, collectives.rank, size)
        local = torch.zeros(shard.vocab.local, 5)
        for run in shard.vocab.runs:
            local[: run.length] = table[run.source : run.source + run.length]
        return embed(token_ids, local, shard, collectives)

    for result in run_ranks(size, main):
        assert torch.equal(result, table[token_ids])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gathered_columns_are_token_ids(size: int) -> None:
    full = torch.randn(3, 8)

    def main(collectives):  # type: ignore[no-untyped-def]
        local = full[:, collectives.rank * 8 // size : (collectives.rank + 1) * 8 // size]
        return gather_vocab(local, collectives)

    for result in run_ranks(size, main):
        assert torch.equal(result, full)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_of_equal_scores_the_lowest_id_wins(size: int) -> None:
    scores = torch.tensor(
        [
            [1.0, 3.0, 3.0, 0.0, 3.0, 3.0, 3.0, 3.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [-torch.inf] * 8,
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 9.0],
            [-5.0, -4.0, -0.0, 0.0, 0.0, -0.0, -1.0, -torch.inf],
        ]
    )

    def main(collectives):  # type: ignore[no-untyped-def]
        start = collectives.rank * 8 // size
        best, index = scores[:, start : start + 8 // size].max(dim=-1)  # the first of equal ones
        return argmax_ranks(best, index + start, collectives)

    for result in run_ranks(size, main):
        assert result.dtype == torch.int64
        assert result.tolist() == [1, 0, 0, 6, 2]
