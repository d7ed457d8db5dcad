"""What steps read from the slot table and write to it, by kernels: against the definitions.

With TRITON_INTERPRET=1 and Triton installed they run on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import DEVICE, HAS_GPU, IS_INTERPRETED, captured, on_gpu
from tpworker.ipc.messages import Chunk
from tpworker.kernels.operands import NO_TOKEN, SlotState
from tpworker.model import slot_ops
from tpworker.rank.mixed import MixedInputs, MixedShape, pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]
NUM_SLOTS = 700
LENGTH = 64  # of a history
WIDTHS = [1, 2, 3, 5, 9]
ALPHABET = 3  # drafts are right often, and wrong often


@pytest.fixture
def kernels() -> Any:
    """The module of kernels."""
    pytest.importorskip("triton")
    from tpworker.kernels import slot_kernels

    return slot_kernels


def make_state(num_drafts: int, length: int = LENGTH, num_blocks: int = 7, seed: int = 0) -> SlotState:
    """On the CPU: slots anywhere in their sequences, with as many drafts as they happen to have."""
    draw = torch.Generator().manual_seed(seed)
    num_rows, most = NUM_SLOTS + 1, 50

    def integers(high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, (num_rows, *size), generator=draw, dtype=dtype)

    columns = integers(9, 8)  # of an admission's table, as in `SlotTable`
    end, most_drafts = columns[:, 4], columns[:, 5]
    position = integers(most)
    # Many stand right before their end, and some have reached it.
    end.copy_(position + 1 + torch.where(integers(2) == 0, integers(num_drafts + 3), most))
    most_drafts.copy_(integers(num_drafts + 1))
    drafts = integers(ALPHABET, num_drafts)
    drafts[torch.arange(num_drafts) >= integers(num_drafts + 2)[:, None]] = -1
    position[-1], end[-1], most_drafts[-1] = 0, 60, 0  # a rank's preparations leave some end there
    drafts[-1] = -1
    return SlotState(
        integers(1 << 30),
        position,
        end,
        most_drafts,
        drafts,
        integers(1000, length, dtype=torch.int32),
        integers(1 << 30, num_blocks, dtype=torch.int32),
    )


def on_device(state: SlotState) -> SlotState:
    """A copy that has the same strides."""
    columns = {}
    for field in dataclasses.fields(state):
        column = getattr(state, field.name)
        if column.dim() == 1 and column.stride(0) > 1:
            wide = torch.full((len(column), column.stride(0)), -7, device=DEVICE)
            columns[field.name] = wide[:, 2].copy_(column)
        else:
            columns[field.name] = column.to(DEVICE, copy=True)
    return SlotState(**columns)


def same_state(found: SlotState, expected: SlotState) -> None:
    """Of the null slot, what is of no consequence may differ."""
    for field in dataclasses.fields(found):
        ours, theirs = getattr(found, field.name).cpu(), getattr(expected, field.name)
        count = None if field.name in ("position", "drafts", "block_table") else -1
        assert torch.equal(ours[:count], theirs[:count]), field.name
    assert found.position[-1] == 0


def same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)


def draw_slots(count: int, num_null: int = 3) -> Tensor:
    """The null slot among them, anywhere."""
    slots = torch.cat((torch.randperm(NUM_SLOTS)[:count], torch.full((num_null,), NUM_SLOTS)))
    return slots[torch.randperm(len(slots))]


def draw_tokens(count: int) -> Tensor:
    """Some by logits that are NaN."""
    tokens = torch.randint(0, ALPHABET, (count,))
    return torch.where(torch.rand(count) < 0.1, ~tokens, tokens)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_blocks", [7, 2500])
def test_begin_decode(kernels: Any, width: int, num_blocks: int) -> None:
    for num_drafts in {width - 1, width + 2}:
        state = make_state(num_drafts, num_blocks=num_blocks)
        there, slots = on_device(state), draw_slots(20, 12)
        found = kernels.begin_decode(slots.to(DEVICE), width, there)
        same(found, slot_ops.begin_decode(slots, width, state))
        same_state(there, state)
        assert (found[0] >= 0).all()


@pytest.mark.parametrize("num_drafts", [0, 1, 4])
@pytest.mark.parametrize("num_blocks", [3, 200, 1500])
@pytest.mark.parametrize("size", [None, 900, 1024])
def test_begin_mixed(kernels: Any, num_drafts: int, num_blocks: int, size: int | None) -> None:
    """Decoding requests beside chunks shorter and longer than a program takes at a time, and padding."""
    draw, num_slots = random.Random(num_blocks), 40
    slots = draw.sample(range(num_slots), 25)
    decode, rest = slots[:15], slots[15:]
    chunks = [Chunk(slot, 0, draw.choice([1, 5, 130]), bool(slot % 2)) for slot in rest]
    prompts = {slot: np.array(draw.choices(range(1000), k=130), np.int32) for slot in rest}
    state = make_state(num_drafts, num_blocks=num_blocks)
    columns = {f.name: getattr(state, f.name)[-num_slots - 1 :] for f in dataclasses.fields(state)}
    state = SlotState(**columns)
    there = on_device(state)
    for width in range(1, num_drafts + 2):
        shape = MixedShape.padded(size or 0, num_slots, num_drafts)
        if size is None:
            shape = MixedShape.exact(15, chunks, width)
        packed = torch.from_numpy(pack(decode, chunks, prompts, shape, num_slots, width))
        here, its = MixedInputs.of(packed, shape), MixedInputs.of(packed.to(DEVICE, copy=True), shape)
        found, expected = (
            begin(x.slots, x.counts, x.moves, x.starts, x.tokens, table)
            for begin, x, table in (
                (kernels.begin_mixed, its, there),
                (slot_ops.begin_mixed, here, state),
            )
        )
        same(found, expected)
        same_state(there, state)
        assert num_drafts == 0 or bool((state.drafts[rest] == -1).all())
        assert num_drafts == 0 or bool((state.drafts[decode] >= 0).any())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 5, 300])
@pytest.mark.parametrize(("spare", "length"), [(0, LENGTH), (2, LENGTH), (0, 0)])
def test_finish_step(kernels: Any, width: int, count: int, spare: int, length: int) -> None:
    """Right drafts, wrong ones, missing ones, NaN, sequences at their ends; steps that go round the ring."""
    num_drafts = width - 1 + spare
    torch.manual_seed(width)
    state = make_state(num_drafts, length)
    there = on_device(state)
    num_real = 0 if count == 0 else count - count // 4
    ring = torch.full((3, 1 + 310 * (width + 1)), -1)
    ring_there, counter = ring.to(DEVICE, copy=True), torch.tensor([-1])
    counter_there = counter.to(DEVICE, copy=True)
    seen: set[int] = set()
    for step in range(5):
        slots = draw_slots(num_real, count - num_real)
        tokens = draw_tokens(len(slots) * width)
        has_end = state.end[slots] < state.position[slots] + LENGTH
        expected = slot_ops.finish_step(slots, tokens, width, state, counter, ring)
        found = kernels.finish_step(
            slots.to(DEVICE), tokens.to(DEVICE), width, there, counter_there, ring_there
        )
        same((found, counter_there, ring_there), (expected, counter, ring))
        assert counter_there.tolist() == [step]
        same_state(there, state)
        assert bool((state.drafts[slots] == -1).all())
        assert not len(slots) or bool(has_end.any())
        seen |= set(expected.tolist())
        for x in (state, there):  # another step's
            fresh = make_state(num_drafts, length, seed=step + 1)
            x.drafts.copy_(fresh.drafts)
            x.position.copy_(fresh.position)
            x.end.copy_(fresh.end)
    if count == 300:
        assert seen >= set(range(min(width, 4) + 1)), "the case shows nothing"


def step_of_one(
    kernels: Any, drafts: list[int], tokens: list[int], room: int
) -> tuple[SlotState, Any, Tensor]:
    """One slot whose last token, 70, stands at 10, by kernel and definition alike."""
    width = len(tokens)
    state = make_state(width - 1)
    state.position[3], state.last_token[3], state.end[3] = 10, 70, 11 + room
    state.drafts[3] = torch.tensor(drafts)
    there, slots = on_device(state), torch.tensor([3])
    rings = [torch.full((2, 2 + width), -1, device=device) for device in ("cpu", DEVICE)]
    counters = [torch.zeros(1, dtype=torch.int64, device=device) for device in ("cpu", DEVICE)]
    chosen = torch.tensor(tokens)
    expected = slot_ops.finish_step(slots, chosen, width, state, counters[0], rings[0])
    found = kernels.finish_step(slots.to(DEVICE), chosen.to(DEVICE), width, there, counters[1], rings[1])
    same((found, rings[1]), (expected, rings[0]))
    same_state(there, state)
    return state, found.tolist(), rings[0][1]


@pytest.mark.parametrize(
    ("drafts", "tokens", "room", "taken"),
    [
        ([5, 6], [5, 6, 7], 9, [5, 6, 7]),
        ([5, 6], [5, 9, 7], 9, [5, 9]),
        ([5, 6], [4, 6, 7], 9, [4]),
        ([5, -1], [5, 6, 7], 9, [5, 6]),
        ([-1, -1], [5, 6, 7], 9, [5]),
        ([5, 6], [5, 6, 7], 2, [5, 6]),
        ([5, 6], [5, 6, 7], 0, []),
        ([5, 6], [5, 6, 7], -3, []),
        ([5, 6], [5, ~6, 7], 9, [5, ~6]),
        ([5, 6], [~5, 6, 7], 9, [~5]),
        ([-1, -1], [~0, ~0, 7], 9, [~0]),  # which is -1, but no draft
        ([0, -1], [0, ~0, 7], 9, [0, ~0]),
    ],
)
def test_what_a_slot_gets(
    kernels: Any, drafts: list[int], tokens: list[int], room: int, taken: list[int]
) -> None:
    state, counts, row = step_of_one(kernels, drafts, tokens, room)
    assert counts == [len(taken)]
    plain = [token if token >= 0 else ~token for token in taken]
    proposed = [*drafts, -1].index(-1)
    assert row.tolist() == [1, *taken, *[NO_TOKEN] * (3 - len(taken)), proposed]
    assert int(state.position[3]) == 10 + len(taken)
    assert int(state.last_token[3]) == [70, *plain][-1]
    assert state.history[3, 11 : 11 + len(taken)].tolist() == plain
    assert state.drafts[3].tolist() == [-1, -1]


@on_gpu
@pytest.mark.parametrize("width", [1, 3])
def test_a_step_that_is_replayed(kernels: Any, width: int) -> None:
    """Begin and finish in one graph, over and over, from what the step before has left."""
    state = make_state(width - 1)
    state.position.random_(0, 10)
    state.position[-1] = 0
    state.end[:-1], state.end[-1] = LENGTH, 0  # of many rows of the null slot, any would be the last
    there, slots = on_device(state), draw_slots(60, 4)
    at, chosen = slots.to(DEVICE), torch.zeros(64 * width, dtype=torch.int64, device=DEVICE)
    ring, counter = torch.full((3, 1 + 64 * (width + 1)), -1), torch.tensor([-1])
    ring_there, counter_there = ring.to(DEVICE), counter.to(DEVICE)
    chosen.fill_(-2)  # nothing is taken over by accident

    def step() -> Any:
        begun = kernels.begin_decode(at, width, there)
        return (*begun, kernels.finish_step(at, chosen, width, there, counter_there, ring_there))

    before = on_device(there)
    graph, found = captured(step)
    for field in dataclasses.fields(there):
        getattr(there, field.name).copy_(getattr(before, field.name))
    counter_there.fill_(-1)
    ring_there.fill_(-1)
    for _ in range(6):
        tokens = draw_tokens(64 * width)
        chosen.copy_(tokens)
        graph.replay()
        begun = slot_ops.begin_decode(slots, width, state)
        counts = slot_ops.finish_step(slots, tokens, width, state, counter, ring)
        same(found, (*begun, counts))
        same((counter_there, ring_there), (counter, ring))
        same_state(there, state)
        fresh = make_state(width - 1, seed=int(counter))
        for x in (state, there):
            x.drafts.copy_(fresh.drafts)
