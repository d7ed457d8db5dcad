"""What a model's head drafts of its logits: with which noise, for whom, and where it is fed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rank.test_slots import admission, apply
from tests.scheduler.helpers import sampling
from tpworker.kernels.operands import SamplingRows
from tpworker.model import torch_operations
from tpworker.model.batch import Batch
from tpworker.model.sampling import SamplingMode
from tpworker.rank import drafter
from tpworker.rank.collectives import SoleRank
from tpworker.rank.drafter import Computed, MtpDrafter
from tpworker.rank.slots import SlotTable

VOCAB, SIZE = 50, 4
RANDOM = SamplingMode(True, False, False)


class Head:
    """Whose logits are all alike; it notes what it is fed."""

    def __init__(self, *parts: object) -> None:
        self.fed: list[tuple[list[int], list[int], list[int]]] = []  # positions, lengths, tokens

    def forward(self, batch: Batch, hidden: Tensor, tokens: Tensor, cache: object) -> Tensor:
        self.fed.append((batch.positions.tolist(), batch.lengths.tolist(), tokens.tolist()))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.zeros(len(hidden), VOCAB)


@pytest.fixture
def table() -> SlotTable:
    """Slots that stand at 4, 7 and 9; 2 is guided, 3 is the null slot."""
    table = SlotTable(3, 8, torch.device("cpu"), (0, VOCAB), num_drafts=3)
    random = sampling(temperature=1.0, seed=11)
    apply(table, [admission(slot, sampling=random, is_guided=slot == 2) for slot in range(3)], [])
    table.state.position[:3] = torch.tensor([4, 7, 9])
    return table


def test_drafts_are_drawn_with_the_noise_that_their_places_will_have(
    table: SlotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafter, "MtpHead", Head)
    decoder: Any = SimpleNamespace(
        weights=SimpleNamespace(mtp=object()),
        operations=torch_operations,
        vocab_start=0,
        collectives=SoleRank(),
    )
    cache: Any = None
    maker = MtpDrafter(decoder, cache, table)
    slots = torch.tensor([1, 0, 2, 3])
    batch: Any = SimpleNamespace(positions=torch.tensor([6, 3, 8, 0]), lengths=torch.tensor([7, 4, 9, 1]))
    computed = Computed(batch, torch.zeros(4, SIZE), torch.tensor([5, 6, 7, 8]), torch.arange(4))
    maker.draft(slots, 3, computed, is_random=True)

    rows: SamplingRows = table.sampling_rows(slots, 3, RANDOM)  # as the next step's are
    wanted = torch_operations.best_tokens(torch.zeros(12, VOCAB), rows, True, 0)[1].view(4, 3)
    assert table.state.drafts[slots[:2]].tolist() == wanted[:2].tolist()
    assert len(set(wanted[0].tolist())) > 1
    assert (table.state.drafts[2:] == -1).all(), "a guided slot, and the null slot, have none"
    head: Any = maker._head
    assert head.fed == [
        ([6, 3, 8, 0], [7, 4, 9, 1], [5, 6, 7, 8]),
        ([7, 4, 9, 0], [8, 5, 10, 1], wanted[:, 0].tolist()),
        ([8, 5, 10, 1], [9, 6, 11, 2], wanted[:, 1].tolist()),
    ]
