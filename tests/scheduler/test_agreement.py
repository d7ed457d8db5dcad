"""What the ranks' offers of KV blocks come to."""

from __future__ import annotations

import pytest

from tpworker.ipc.messages import RankLoaded
from tpworker.scheduler.agreement import Offer


@pytest.mark.parametrize(
    ("offers", "num_kv_blocks", "are_kept"),
    [
        ([(9, True), (9, True)], 9, True),
        ([(9, True), (9, False)], 9, False),  # one of them lost its own: nobody's is of use
        ([(9, False), (9, True)], 9, False),
        ([(9, True), (8, True)], 8, False),  # the first will make its cache anew
        ([(9, False), (7, False)], 7, False),
        ([(5, True)], 5, True),
    ],
)
def test_all_get_the_fewest_and_contents_are_kept_if_all_have_just_these(
    offers: list[tuple[int, bool]], num_kv_blocks: int, are_kept: bool
) -> None:
    loaded = [RankLoaded(1, rank, *offer) for rank, offer in enumerate(offers)]
    assert Offer.of(loaded) == (num_kv_blocks, are_kept)
