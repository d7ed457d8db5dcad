from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tpworker.scheduler.kept_blocks import Node, Root
from tpworker.scheduler.kv_blocks import BlockPool

SIZE = 4
ROOT = Root(bytes(32))


def tokens(*values: int) -> array[int]:
    return array("i", values)


def fill(pool: BlockPool, text: array[int], root: Root = ROOT) -> list[int]:
    """Allocates and registers all whole blocks of a text, as a request that ran alone does."""
    blocks = pool.allocate(len(text) // SIZE)
    node: Node = root
    for index, block in enumerate(blocks):
        node = pool.register(node, text[index * SIZE : (index + 1) * SIZE], block)
    return blocks


def test_the_null_block_is_never_given() -> None:
    pool = BlockPool(8, SIZE, True)
    assert pool.num_usable == pool.num_free == 7
    assert sorted(pool.allocate(7)) == [1, 2, 3, 4, 5, 6, 7]


def test_more_than_there_are() -> None:
    with pytest.raises(AssertionError, match="8 blocks of 7 free"):
        BlockPool(8, SIZE, True).allocate(8)


def test_a_prefix_is_matched_in_whole_blocks_and_leaves_a_token() -> None:
    pool = BlockPool(8, SIZE, True)
    blocks = fill(pool, tokens(*range(8)))
    assert pool.match(tokens(*range(9)), ROOT)[0] == blocks
    assert pool.match(tokens(*range(8)), ROOT)[0] == blocks[:1], "the last token's logits are needed"
    assert pool.match(tokens(0, 1, 2, 3, 9, 9, 9, 9, 9), ROOT)[0] == blocks[:1]
    assert pool.match(tokens(9, 1, 2, 3, 4, 5, 6, 7, 8), ROOT)[0] == []


def test_equal_blocks_after_different_texts_are_different() -> None:
    pool = BlockPool(8, SIZE, True)
    fill(pool, tokens(1, 1, 1, 1, 7, 7, 7, 7))
    assert pool.match(tokens(2, 2, 2, 2, 7, 7, 7, 7, 0), ROOT)[0] == []
    assert pool.match(tokens(7, 7, 7, 7, 0), ROOT)[0] == []


def test_a_known_content_stays_with_its_first_block() -> None:
    pool = BlockPool(8, SIZE, True)
    first = fill(pool, tokens(*range(8)))
    second = fill(pool, tokens(*range(8)))
    assert pool.match(tokens(*range(9)), ROOT)[0] == first
    pool.release(second)
    pool.release(first)
    assert pool.num_free == 7
    pool.check_integrity([])


def test_released_contents_are_found_until_they_are_evicted_last_block_first() -> None:
    pool = BlockPool(4, SIZE, True)
    blocks = fill(pool, tokens(*range(12)))
    pool.release(blocks)
    assert pool.match(tokens(*range(13)), ROOT)[0] == blocks
    pool.allocate(1)
    assert pool.match(tokens(*range(13)), ROOT)[0] == blocks[:2]
    pool.allocate(1)
    assert pool.match(tokens(*range(13)), ROOT)[0] == blocks[:1]


def test_without_caching_who_brings_the_same_number_shares_and_nobody_else() -> None:
    """A request that comes back, and the choices of one request."""
    pool = BlockPool(8, SIZE, False)
    blocks = fill(pool, tokens(*range(8)), pool.root("", 1))
    assert pool.match(tokens(*range(9)), pool.root("", 1))[0] == blocks
    for other in (pool.root("", 2), pool.root("salt", 1)):
        assert pool.match(tokens(*range(9)), other)[0] == []


def test_only_texts_of_the_same_salt_share() -> None:
    pool = BlockPool(8, SIZE, True)
    blocks = {salt: fill(pool, tokens(*range(8)), pool.root(salt, 5)) for salt in ("", "a", "b")}
    for salt in blocks:
        assert pool.match(tokens(*range(9)), pool.root(salt, 6))[0] == blocks[salt]
    assert pool.match(tokens(*range(9)), pool.root("ab", 5))[0] == []


def test_integrity_notices_a_lost_and_a_doubled_block() -> None:
    pool = BlockPool(8, SIZE, True)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    pool.check_integrity([blocks])
    pool._plain.append(blocks[0])
    with pytest.raises(AssertionError):
        pool.check_integrity([blocks])


class Pool(RuleBasedStateMachine):
    """Against a model that remembers what every block was filled with."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, SIZE, True)
        self.owned: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}  # text from the beginning to the end of the block

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def admit(self, text: list[int]) -> None:
        known = tokens(*text)
        shared, node = self.pool.match(known, ROOT)
        for index, block in enumerate(shared):
            assert self.content[block] == tuple(text[: (index + 1) * SIZE]), "a wrong content was shared"
        missing = -(-len(text) // SIZE) - len(shared)
        if self.pool.num_free - self.pool.num_idle(shared) < missing:
            return
        self.pool.share(shared)
        fresh = self.pool.allocate(missing)
        self.owned.append(shared + fresh)
        for index in range(len(shared), len(text) // SIZE):
            block = self.owned[-1][index]
            self.content[block] = tuple(text[: (index + 1) * SIZE])
            node = self.pool.register(node, known[index * SIZE : (index + 1) * SIZE], block)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.owned) - 1))
        self.pool.release(self.owned.pop(index))

    @invariant()
    def integrity(self) -> None:
        self.pool.check_integrity(self.owned)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
