"""Drafts that are looked up, by kernels: against the definition.

With TRITON_INTERPRET=1 and Triton installed they run on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import DEVICE, HAS_GPU, IS_INTERPRETED, captured, on_gpu
from tests.gpu.test_slot_kernels import on_device
from tpworker.kernels.operands import SlotState
from tpworker.model import ngram

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]


@pytest.fixture
def kernels() -> Any:
    """The module of kernels."""
    pytest.importorskip("triton")
    from tpworker.kernels import ngram_kernel

    return ngram_kernel


def make_state(num_slots: int, length: int, num_drafts: int, alphabet: int, seed: int = 0) -> SlotState:
    """On the CPU: sequences of any length up to `length`, of few tokens, without drafts.

    What is behind a sequence's last token is what an earlier one has left there.
    """
    draw = torch.Generator().manual_seed(seed)

    def integers(high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, (num_slots + 1, *size), generator=draw, dtype=dtype)

    columns = integers(9, 8)
    most_drafts = columns[:, 5].copy_(integers(num_drafts + 1) + (integers(2) > 0) * num_drafts)
    position = integers(length)
    position[: num_slots // 3] %= 40  # many are short
    position[num_slots // 2] = length - 1
    position[-1] = most_drafts[-1] = 0
    history = integers(alphabet, length, dtype=torch.int32) * 7
    return SlotState(
        integers(9),
        position,
        columns[:, 4],
        most_drafts,
        torch.full((num_slots + 1, num_drafts), -1),
        history,
        integers(9, 3, dtype=torch.int32),
    )


def check(
    kernels: Any, state: SlotState, slots: Tensor, num_drafts: int, longest: int, shortest: int
) -> Tensor:
    """The drafts, by both alike; nothing else changes."""
    there = on_device(state)
    ngram.look_up(slots, num_drafts, longest, shortest, state)
    kernels.look_up(slots.to(DEVICE), num_drafts, longest, shortest, there)
    assert torch.equal(there.drafts.cpu(), state.drafts)
    assert torch.equal(there.history.cpu(), state.history)
    assert torch.equal(there.position.cpu(), state.position)
    return state.drafts


@pytest.mark.parametrize("alphabet", [1, 2, 3, 20])
@pytest.mark.parametrize("length", [2, 30, 2100, 9000])
@pytest.mark.parametrize(("longest", "shortest"), [(4, 2), (1, 1), (3, 3), (9, 1), (24, 20)])
def test_against_the_definition(
    kernels: Any, alphabet: int, length: int, longest: int, shortest: int
) -> None:
    """Sequences that repeat themselves at every distance, and that do not; the null slot among them."""
    for num_slots, most, num_drafts in ((40, 4, 4), (7, 8, 3), (3, 1, 1)):
        for seed in range(1 if IS_INTERPRETED else 4):
            state = make_state(num_slots, length, most, alphabet, seed)
            slots = torch.cat((torch.randperm(num_slots), torch.full((3,), num_slots)))
            drafts = check(kernels, state, slots[torch.randperm(len(slots))], num_drafts, longest, shortest)
            assert bool((drafts[-1] == -1).all())
            assert bool((drafts[:, num_drafts:] == -1).all())
            if alphabet == 1 and length > 24 and num_slots > 3:
                assert bool((drafts[:, 0] >= 0).any())


@pytest.mark.parametrize(
    ("sequence", "drafts"),
    [
        ([], [-1, -1, -1, -1]),
        ([5], [-1, -1, -1, -1]),
        ([1, 2, 3, 1], [-1, -1, -1, -1]),  # of one token only
        ([1, 2, 3, 4, 1, 2], [3, 4, 1, 2]),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], [4, 9, 1, 2]),  # of two, the later one
        ([7, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2], [3, 9, 1, 2]),  # three are better than two
        ([8, 8, 8], [8, 8, 8, 8]),
        ([0, 0], [-1, -1, -1, -1]),
        ([6, 1, 2, 1, 2], [1, 2, 1, 2]),
        ([6, 1, 2, 5, 1, 2], [5, 1, 2, 5]),  # around and around
    ],
)
@pytest.mark.parametrize("offset", [0, 2046, 70_000])
def test_what_is_drafted(kernels: Any, sequence: list[int], drafts: list[int], offset: int) -> None:
    """Where a tile ends, and behind many others; what is before has no token twice."""
    state = make_state(2, 70_020, 4, 2)
    before = torch.arange(1000, 1000 + offset)
    whole = torch.cat((before, torch.tensor(sequence, dtype=torch.int64)))
    state.most_drafts[1] = 4
    state.history[1, : len(whole)] = whole.int()
    state.position[1] = max(len(whole) - 1, 0)
    if not len(whole):
        return
    assert check(kernels, state, torch.tensor([1]), 4, 4, 2)[1].tolist() == drafts


@pytest.mark.parametrize(("most", "made"), [(0, 0), (1, 1), (3, 3), (9, 4)])
def test_a_slot_may_have_less(kernels: Any, most: int, made: int) -> None:
    state = make_state(2, 50, 6, 1)
    state.position[0], state.most_drafts[0] = 30, most
    drafts = check(kernels, state, torch.tensor([0, 2, 2]), 4, 4, 2)
    assert drafts.tolist() == [[0] * made + [-1] * (6 - made), [-1] * 6, [-1] * 6]


@on_gpu
@pytest.mark.parametrize(("num_slots", "length"), [(1, 131_072), (64, 8000), (256, 40_000)])
def test_replayed_with_other_histories(kernels: Any, num_slots: int, length: int) -> None:
    """A captured look-up reads lengths and histories as they are then."""
    state = make_state(num_slots, length, 4, 3)
    there, slots = on_device(state), torch.randperm(num_slots)
    at = slots.to(DEVICE)
    graph, _ = captured(lambda: kernels.look_up(at, 4, 9, 2, there))
    for seed in range(1, 5):
        state = make_state(num_slots, length, 4, 3 if seed % 2 else 30, seed)
        state.most_drafts[0] = 4  # of one slot alone it may be 0, and nothing to be seen
        for name in ("position", "most_drafts", "history", "drafts"):
            getattr(there, name).copy_(getattr(state, name))
        graph.replay()
        ngram.look_up(slots, 4, 9, 2, state)
        assert torch.equal(there.drafts.cpu(), state.drafts)
        assert bool((state.drafts >= 0).any())
