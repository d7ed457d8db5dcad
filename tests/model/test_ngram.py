"""What prompt look-up drafts: the definition, against words that say what it means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpworker.kernels.operands import SlotState
from tpworker.model.ngram import look_up


def state_of(sequences: list[list[int]], num_drafts: int, limit: int | None = None) -> SlotState:
    """Slots with these tokens, and the null slot; the history holds older tokens behind each."""
    count, longest = len(sequences) + 1, max(map(len, sequences)) + 3
    history = torch.full((count, longest), 7, dtype=torch.int32)
    for slot, sequence in enumerate(sequences):
        history[slot, : len(sequence)] = torch.tensor(sequence, dtype=torch.int32)
    zeros = torch.zeros(count, dtype=torch.int64)
    position = zeros.clone()
    position[:-1] = torch.tensor([len(sequence) - 1 for sequence in sequences])
    most = torch.full((count,), num_drafts if limit is None else limit)
    most[-1] = 0
    drafts = torch.full((count, num_drafts), -1)
    return SlotState(zeros, position, zeros, most, drafts, history, torch.zeros(count, 1, dtype=torch.int32))


def drafts_of(sequence: list[int], num_drafts: int = 4, longest: int = 3, shortest: int = 1) -> list[int]:
    state = state_of([sequence], num_drafts)
    look_up(torch.tensor([0]), num_drafts, longest, shortest, state)
    return state.drafts[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("sequence", "drafts"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2], [3, 4, 5, 6]),
        ([1, 2, 3, 9, 2, 4, 5, 1, 2], [3, 9, 2, 4]),  # two tokens tell more than one that stood there later
        ([1, 2, 3, 8, 1, 2, 4, 8, 1, 2], [4, 8, 1, 2]),  # of two places the last
        ([5, 5, 5], [5, 5, 5, 5]),  # it goes on with itself
        ([3, 1, 2, 1, 2], [1, 2, 1, 2]),
        ([1, 2, 3, 4], [-1] * 4),
        ([1], [-1] * 4),
        ([4, 4], [4, 4, 4, 4]),
    ],
)
def test_what_stood_behind_the_last_tokens_before(sequence: list[int], drafts: list[int]) -> None:
    assert drafts_of(sequence) == drafts


def test_the_shortest_bounds_what_is_believed() -> None:
    sequence = [1, 2, 3, 9, 8, 2]
    assert drafts_of(sequence, shortest=1) == [3, 9, 8, 2]
    assert drafts_of(sequence, shortest=2) == [-1] * 4
    assert drafts_of([1, 2, 3, 9, 1, 2], shortest=2) == [3, 9, 1, 2]


def test_a_slot_has_no_more_than_it_may_and_the_null_slot_none() -> None:
    state = state_of([[1, 2, 3, 1], [4, 4, 4, 4]], 4, limit=2)
    look_up(torch.tensor([1, 0, 2, 2]), 3, 3, 1, state)
    assert state.drafts.tolist() == [[2, 3, -1, -1], [4, 4, -1, -1], [-1] * 4]
    guided = state_of([[4, 4, 4]], 4, limit=0)
    look_up(torch.tensor([0]), 4, 3, 1, guided)
    assert guided.drafts.tolist() == [[-1] * 4] * 2


def test_far_back_is_found_too() -> None:
    """Beyond 32,768 tokens as before."""
    sequence = [1, 2, 3, 4, *range(100, 70_100), 1, 2]
    assert drafts_of(sequence) == [3, 4, 100, 101]
    assert drafts_of([*range(100, 70_100), 50_000, 50_001]) == [50_002, 50_003, 50_004, 50_005]


def told(sequence: list[int], num_drafts: int, longest: int, shortest: int) -> list[int]:
    """The same in the plainest way: every place is compared."""
    best, place = 0, -1
    for end in range(1, len(sequence)):
        size = 0
        while size < min(longest, end) and sequence[end - 1 - size] == sequence[-1 - size]:
            size += 1
        if size >= max(best, 1):
            best, place = size, end
    if best < shortest:
        return [-1] * num_drafts
    text = list(sequence)
    for number in range(num_drafts):
        text.append(text[place + number])
    return text[len(sequence) :]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_any_sequence(sequence: list[int], num_drafts: int, longest: int, shortest: int) -> None:
    shortest = min(longest, shortest)
    found = drafts_of(sequence, num_drafts, longest, shortest)
    assert found == told(sequence, num_drafts, longest, shortest)


def test_only_the_first_drafts_are_written() -> None:
    state = state_of([[4, 4, 4]], 4)
    look_up(torch.tensor([0]), 1, 3, 1, state)
    drafts: Tensor = state.drafts[0]
    assert drafts.tolist() == [4, -1, -1, -1]
