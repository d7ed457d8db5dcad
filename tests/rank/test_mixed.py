"""How a step with chunks is laid out, exactly and padded."""

from __future__ import annotations

import numpy as np
import torch

from tpworker.ipc.messages import Chunk
from tpworker.rank.mixed import MixedInputs, MixedShape, PromptRows, pack
from tpworker.rank.slots import SlotTable

NULL = 6
DECODE = [4, 1]
CHUNKS = (Chunk(0, 2, 3, False), Chunk(5, 0, 2, True), Chunk(3, 1, 1, True))
PROMPTS = {
    0: np.arange(10, 20, dtype=np.int32),
    5: np.array([50, 51], np.int32),
    3: np.array([30, 31], np.int32),
}


def inputs(shape: MixedShape) -> MixedInputs:
    packed = pack(DECODE, CHUNKS, PROMPTS, shape, NULL)
    assert len(packed) == sum(shape.sections)
    return MixedInputs.of(torch.from_numpy(packed), shape)


def test_the_exact_layout() -> None:
    found = inputs(MixedShape.exact(2, CHUNKS))
    assert found.tokens.tolist() == [-1, -1, 12, 13, 14, 50, 51, 31]
    assert found.sequence_of.tolist() == [0, 1, 2, 2, 2, 3, 3, 4]
    assert found.slots.tolist() == [4, 1, 0, 5, 3]
    assert found.counts.tolist() == [1, 1, 3, 2, 1]
    assert found.starts.tolist() == [0, 1, 2, 5, 7, 8]
    assert found.sampled_slots.tolist() == [4, 1, 5, 3]
    assert found.sample_rows.tolist() == [0, 1, 6, 7]


def test_padding_belongs_to_the_null_slot() -> None:
    exact = inputs(MixedShape.exact(2, CHUNKS))
    for size in (8, 9, 16, 40):
        shape = MixedShape.padded(size, NULL)
        found = inputs(shape)
        for name in ("tokens", "sequence_of", "slots", "counts", "sampled_slots"):
            theirs, ours = getattr(exact, name), getattr(found, name)
            assert torch.equal(ours[: len(theirs)], theirs), name
        assert (found.sequence_of[8:] == shape.num_sequences - 1).all()
        assert not found.tokens[8:].any()
        assert (found.slots[5:] == NULL).all()
        assert not found.counts[5:].any()
        assert (found.sampled_slots[4:] == NULL).all()
        assert len(found.sampled_slots) == NULL, "all slots, whatever the number of tokens"
        assert found.starts.tolist() == [0, 1, 2, 5, 7] + [8] * (shape.num_sequences - 5) + [size]
        assert found.sample_rows[:4].tolist() == [0, 1, 6, 7]
        assert ((found.sample_rows >= 0) & (found.sample_rows < size)).all()


def test_a_padded_shape_has_room_for_any_step() -> None:
    """Every sequence has a token, and no slot is in a step twice: one each is the most there can be."""
    for size in (1, 5, 6, 7, 30):
        count = min(size, NULL)
        shape = MixedShape.padded(size, NULL)
        chunks = [Chunk(slot, 0, 1, True) for slot in range(count)]
        packed = pack([], chunks, {slot: np.array([slot], np.int32) for slot in range(count)}, shape, NULL)
        found = MixedInputs.of(torch.from_numpy(packed), shape)
        assert found.sample_rows.tolist() == list(range(count))
        assert found.slots.tolist() == [*range(count), NULL]


def test_nothing_but_padding() -> None:
    shape = MixedShape.padded(4, NULL)
    found = MixedInputs.of(torch.from_numpy(pack([], (), {}, shape, NULL)), shape)
    assert found.starts.tolist() == [0, 0, 0, 0, 0, 4]
    assert (found.slots == NULL).all()
    assert (found.sampled_slots == NULL).all()


def told_of(num_decodes: int, chunks: list[Chunk], told: dict[int, int]) -> list[tuple[int, int]]:
    """(row of the token before, token) of each."""
    rows = PromptRows.of(num_decodes, chunks, PROMPTS, told)
    assert rows.before.dtype == rows.tokens.dtype == np.int64
    assert len(rows.before) == len(rows.tokens) == rows.count
    return list(zip(rows.before.tolist(), rows.tokens.tolist(), strict=True))


def test_prompt_rows_are_those_behind_a_token_of_a_chunk() -> None:
    """Behind two decoding slots; of slots that were asked for, and within their prompts."""
    chunks = list(CHUNKS)
    assert told_of(2, chunks, {}) == []
    assert told_of(2, chunks, {0: 10}) == [(2, 13), (3, 14), (4, 15)]
    assert told_of(2, chunks, {5: 2}) == [(5, 51)], "behind the last one stands the output"
    assert told_of(2, chunks, {0: 10, 5: 2, 3: 2}) == [(2, 13), (3, 14), (4, 15), (5, 51)]
    assert told_of(0, chunks[::-1], {0: 10, 5: 2}) == [(1, 51), (3, 13), (4, 14), (5, 15)]
    assert told_of(2, chunks, {0: 4}) == [(2, 13)], "what was generated before a preemption is no prompt"
    assert told_of(2, chunks, {0: 2}) == []
    assert told_of(2, chunks, {0: 3}) == []


def test_chunks_of_any_length_tell_of_every_prompt_token_once() -> None:
    for length in range(1, 11):
        for cut in range(1, 11):
            found = []
            for start in range(0, length, cut):
                chunk = Chunk(0, start, min(cut, length - start), start + cut >= length)
                before = told_of(3, [chunk], {0: length})
                found += [(start + row - 3, token) for row, token in before]
            assert found == [(place, 11 + place) for place in range(length - 1)]


def test_positions_and_tokens_come_from_the_slot_table() -> None:
    table = SlotTable(NULL, 3, torch.device("cpu"))
    table.state.position[:6] = torch.tensor([2, 7, 99, 1, 9, 0])
    table.state.last_token[:6] = torch.tensor([60, 61, 62, 63, 64, 65])
    table.state.block_table[:, 0] = torch.arange(7)
    found = inputs(MixedShape.padded(10, NULL))
    batch = found.begin(table, 0, 10)
    assert batch.token_ids.tolist() == [64, 61, 12, 13, 14, 50, 51, 31, 0, 0]
    assert batch.positions.tolist() == [9, 7, 2, 3, 4, 0, 1, 1, 0, 0]
    assert batch.lengths.tolist() == [10, 8, 5, 2, 2, 0, 0]
    assert batch.block_tables[:, 0].tolist() == [4, 1, 0, 5, 3, NULL, NULL]
    assert batch.query_starts.tolist() == found.starts.tolist()
    assert table.state.position.tolist() == [5, 7, 99, 1, 9, 1, 0], "and padding stays where it is"
    assert batch.query_starts.dtype == batch.lengths.dtype == torch.int32
