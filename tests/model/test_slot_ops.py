"""What a step reads from the slot table and writes to it, with drafts and without: the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tpworker.kernels.operands import NO_TOKEN, SlotState
from tpworker.model.slot_ops import begin_decode, begin_mixed, finish_step

NULL = 3
"""The null slot of a table of three."""


def table(num_drafts: int = 3, history: int = 20) -> SlotState:
    """Three slots that stand at 4, 7 and 9, with tokens 10, 20 and 30 there, and ends at 12, 9 and 10."""
    drafts = torch.full((NULL + 1, num_drafts), -1)
    if num_drafts == 3:
        drafts[:3] = torch.tensor([[11, 12, 13], [21, -1, -1], [-1, -1, -1]])
    return SlotState(
        last_token=torch.tensor([10, 20, 30, 0]),
        position=torch.tensor([4, 7, 9, 0]),
        end=torch.tensor([12, 9, 10, 0]),
        most_drafts=torch.tensor([3, 3, 3, 0]),
        drafts=drafts,
        history=torch.zeros(NULL + 1, history, dtype=torch.int32),
        block_table=torch.arange(8, dtype=torch.int32).view(NULL + 1, 2),
    )


def test_a_decode_step_is_fed_the_last_token_and_drafts() -> None:
    state = table()
    token_ids, positions, lengths, tables = begin_decode(torch.tensor([1, 0, NULL]), 3, state)
    assert token_ids.tolist() == [20, 21, 0, 10, 11, 12, 0, 0, 0]
    assert positions.tolist() == [7, 8, 9, 4, 5, 6, 0, 1, 2]
    assert lengths.tolist() == [10, 7, 3]
    assert lengths.dtype == torch.int32
    assert tables.tolist() == [[2, 3], [0, 1], [6, 7]]
    assert state.position.tolist() == [4, 7, 9, 0], "nothing moves before it is known how far"


def test_without_drafts_it_is_fed_the_last_token() -> None:
    token_ids, positions, lengths, _ = begin_decode(torch.tensor([2, 0]), 1, table())
    assert (token_ids.tolist(), positions.tolist(), lengths.tolist()) == ([30, 10], [9, 4], [10, 5])


def finish(state: SlotState, slots: list[int], tokens: list[int], width: int) -> tuple[list[int], Tensor]:
    """How many tokens each slot got, and the row of the ring, of step 5 of 3 rows."""
    counter, ring = torch.tensor([4]), torch.full((3, 14), 77)
    of, chosen = torch.tensor(slots, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64)
    counts = finish_step(of, chosen, width, state, counter, ring)
    assert counter.tolist() == [5]
    assert bool((ring[:2] == 77).all()), "another step's row is written"
    assert ring[2, 0] == 5
    return counts.tolist(), ring[2]


@pytest.mark.parametrize(
    ("tokens", "taken"),
    [
        ([11, 12, 13, 14], [11, 12, 13, 14]),
        ([11, 12, 99, 14], [11, 12, 99]),
        ([11, 99, 13, 14], [11, 99]),
        ([99, 12, 13, 14], [99]),
        ([~11, 12, 13, 14], [~11]),  # chosen by NaN: no draft's
        ([11, ~12, 13, 14], [11, ~12]),
    ],
)
def test_a_slot_gets_what_was_foretold_and_one_token_more(tokens: list[int], taken: list[int]) -> None:
    state = table()
    counts, row = finish(state, [0], tokens, 4)
    assert counts == [len(taken)]
    assert row[1:6].tolist() == taken + [NO_TOKEN] * (4 - len(taken)) + [3]
    known = [token ^ (token >> 63) for token in taken]
    assert state.position[0] == 4 + len(taken)
    assert state.last_token[0] == known[-1]
    assert state.history[0, 5 : 5 + len(taken)].tolist() == known
    assert not state.history[0, 5 + len(taken) :].any()
    assert state.drafts[0].tolist() == [-1, -1, -1]


def test_a_sequence_ends_where_it_must() -> None:
    """One that may have one token more, and one that has ended: a step in flight does not know it."""
    state = table()
    counts, row = finish(state, [1, 2], [21, 22, 23, 31, 32, 33], 3)
    assert counts == [1, 0]
    assert row[1:9].tolist() == [21, NO_TOKEN, NO_TOKEN, 1, NO_TOKEN, NO_TOKEN, NO_TOKEN, 0]
    assert state.position.tolist() == [4, 8, 9, 0]
    assert state.last_token.tolist() == [10, 21, 30, 0]


def test_a_token_by_nan_is_no_missing_draft() -> None:
    state = table()
    counts, row = finish(state, [2], [~0, 5], 2)  # ~0 is -1
    assert counts == [0]
    state = table()
    state.end[2] = 20
    counts, row = finish(state, [2], [~0, 5], 2)
    assert counts == [1]
    assert row[1:4].tolist() == [~0, NO_TOKEN, 0]
    assert state.last_token[2] == 0


def test_without_drafts_a_row_holds_tokens_alone() -> None:
    state = table()
    counts, row = finish(state, [1, 0, NULL, NULL], [8, 9, 5, 6], 1)
    assert counts == [1, 1, 0, 0]
    assert row[1:6].tolist() == [8, 9, NO_TOKEN, NO_TOKEN, 77]
    assert state.position.tolist() == [5, 8, 9, 0], "the null slot stays where it is"
    assert bool((state.drafts == -1).sum() >= 6)


def test_a_table_without_drafts_and_history() -> None:
    state = table(num_drafts=0, history=0)
    counts, _ = finish(state, [0], [5], 1)
    assert counts == [1]
    assert (int(state.position[0]), int(state.last_token[0])) == (5, 5)


def test_no_slots_are_a_step_all_the_same() -> None:
    state = table()
    assert finish(state, [], [], 1)[0] == []


def test_chunks_lose_the_drafts_of_who_was_there_before() -> None:
    """Slot 1 decodes with two drafts, slot 0 begins a prompt, slot 2 ends its own."""
    state = table()
    state.drafts[2] = torch.tensor([5, 6, 7])
    slots = torch.tensor([1, 0, 2, NULL])
    counts, moves = torch.tensor([3, 2, 2, 0]), torch.tensor([0, 2, 1, 0])
    starts, tokens = torch.tensor([0, 3, 5, 7, 9]), torch.tensor([-1, -2, -3, 40, 41, 50, 51, 0, 0])
    token_ids, positions, lengths, query_starts, _ = begin_mixed(slots, counts, moves, starts, tokens, state)
    assert token_ids.tolist() == [20, 21, 0, 40, 41, 50, 51, 0, 0]
    assert positions.tolist() == [7, 8, 9, 4, 5, 9, 10, 0, 0]
    assert lengths.tolist() == [10, 6, 11, 0]
    assert query_starts.tolist() == starts.tolist()
    assert state.position.tolist() == [6, 7, 10, 0]
    assert state.drafts[:3].tolist() == [[-1] * 3, [21, -1, -1], [-1] * 3]


def test_the_null_slot_stays_where_it_is_whatever_its_end_and_chunks() -> None:
    """What steps beforehand have left there is any end; their chunks are there, too."""
    state = table()
    state.end[NULL] = 60
    counts, row = finish(state, [NULL, 0, NULL], [1, 2, 11, 5, 3, 4], 2)
    assert counts == [1, 2, 1]
    assert row[4:7].tolist() == [11, 5, 1], "between those of the null slot"
    assert state.position.tolist() == [6, 7, 9, 0]
    slots, counts_of, moves = torch.tensor([0, NULL]), torch.tensor([1, 3]), torch.tensor([1, 2])
    starts, tokens = torch.tensor([0, 1, 4]), torch.tensor([6, 7, 8, 9])
    _, positions, lengths, _, _ = begin_mixed(slots, counts_of, moves, starts, tokens, state)
    assert positions.tolist() == [6, 0, 0, 0]
    assert lengths.tolist() == [7, 3]
    assert state.position.tolist() == [7, 7, 9, 0]
