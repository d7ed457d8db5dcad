"""The sizes of steps with prompts that ranks and the scheduler agree on."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tpworker.ipc.step_sizes import step_ladder


@pytest.mark.parametrize("most", [1, 15, 16, 17, 511, 512, 513, 2047, 2048, 2049, 8191, 8192, 10_000])
def test_sizes_ascend_to_the_most(most: int) -> None:
    sizes = step_ladder(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most


def test_padding_is_a_small_part_and_there_are_few_sizes() -> None:
    sizes = step_ladder(8192)
    assert len(sizes) <= 65, "each takes some 20 ms of a start"
    for size, larger in pairwise(sizes):
        assert larger - size <= max(32, size // 8)
