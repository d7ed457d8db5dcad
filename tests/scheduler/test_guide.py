"""A guide by itself: what it takes, what it forces, and what it says where its grammar is at fault."""

from __future__ import annotations

import numpy as np
import pytest

from tpworker.grammar.bits import Masks
from tpworker.scheduler.guide import Guide


class FakeMatcher:
    """Takes `tokens` in their order; then it has ended."""

    def __init__(self, tokens: list[int], error: str = "") -> None:
        self.tokens = tokens
        self.error = error

    def consume_token(self, token: int) -> bool:
        is_right = bool(self.tokens) and token == self.tokens.pop(0)
        if not is_right:
            self.error = f"no {token} here\nbacktrace"
        return is_right

    def is_stopped(self) -> bool:
        return not self.tokens

    def is_error(self) -> bool:
        return bool(self.error)

    def get_error(self) -> str:
        return self.error


def guide_of(matcher: FakeMatcher, late_ids: tuple[int, ...] = (), min_tokens: int = 0) -> Guide:
    return Guide(matcher, late_ids, min_tokens)  # type: ignore[arg-type]


def settled(guide: Guide, *allowed: int) -> set[int]:
    """What is left of a mask in which these tokens were allowed."""
    memory = np.zeros((2, 4), np.int32)
    for token in allowed:
        memory.view(np.uint32)[1, token // 32] |= np.uint32(1 << token % 32)
    guide.settle(Masks(memory.data, 4, 1), 1, is_slow=False)
    assert not memory[0].any()
    return set(np.flatnonzero(np.unpackbits(memory[1].view(np.uint8), bitorder="little")).tolist())


ALL = set(range(128))


def test_a_guide_takes_what_is_forced_before_it_is_committed() -> None:
    guide = guide_of(FakeMatcher([31, 32, 7]))
    assert guide.knows(0)
    assert not guide.knows(1)
    assert settled(guide, 31) == {31}
    assert guide.knows(1)
    assert settled(guide, 32) == {32}
    assert list(guide.forced) == [31, 32]
    assert settled(guide, 7, 9) == {7, 9}
    assert not guide.knows(3)
    assert guide.commit(31)
    assert guide.commit(32)
    assert not guide.commit(7), "it ends with it"
    assert guide.has_ended
    assert not guide.error


def test_an_end_that_is_forced_comes_with_its_commit() -> None:
    guide = guide_of(FakeMatcher([5, 6]))
    settled(guide, 5)
    settled(guide, 6)
    assert guide.has_ended
    assert guide.commit(5), "one more comes"
    assert not guide.commit(6)


def test_a_rank_that_chose_another_than_what_was_forced_is_told() -> None:
    guide = guide_of(FakeMatcher([5, 6]))
    settled(guide, 5)
    assert not guide.commit(6)
    assert guide.error == "token 6 was chosen, where its grammar leaves 5 alone"
    assert not guide.commit(5)


def test_a_token_that_the_grammar_does_not_take_is_told_in_a_line() -> None:
    guide = guide_of(FakeMatcher([5, 6]))
    assert not guide.commit(6)
    assert guide.error == "its grammar does not take token 6: no 6 here"


def test_nothing_that_could_come_next_is_an_error_and_leaves_a_token_to_choose() -> None:
    guide = guide_of(FakeMatcher([5]))
    assert settled(guide) == ALL
    assert guide.error == "its grammar leaves no token that could come next"
    assert not guide.commit(5)


def test_a_mask_that_could_not_be_made_is_an_error() -> None:
    guide = guide_of(FakeMatcher([5], "out of fuel\nbacktrace"))
    assert settled(guide, 3, 4) == ALL
    assert guide.error == "its grammar is too complex: out of fuel"


def test_a_forced_token_that_the_grammar_does_not_take_is_an_error() -> None:
    """As where a tokenizer lacks a byte: the mask has a token that the matcher refuses."""
    guide = guide_of(FakeMatcher([]))
    assert settled(guide, 6) == ALL
    assert guide.error == "its grammar does not take token 6: no 6 here"
    assert not guide.commit(6)


@pytest.mark.parametrize(
    ("min_tokens", "allowed", "left"),
    [
        (0, {3, 40, 96}, {3, 40, 96}),
        (1, {3, 40, 96}, {3}),
        (1, {40, 96}, {40, 96}),
        (1, {3}, {3}),
    ],
)
def test_an_end_is_late_unless_nothing_else_is_left(
    min_tokens: int, allowed: set[int], left: set[int]
) -> None:
    guide = guide_of(FakeMatcher([3, 40]), (40, 96), min_tokens)
    assert settled(guide, *allowed) == left
    assert list(guide.forced) == (list(left) if len(left) == 1 else [])
    if not guide.forced:
        guide.commit(3)
    assert settled(guide, 40, 96) == {40, 96}, "min_tokens are there"
