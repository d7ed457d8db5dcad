from __future__ import annotations

import dataclasses

import torch

from tests.scheduler.helpers import sampling
from tpworker.ipc.messages import Admission, Grant, pack_int32
from tpworker.model.sampling import SamplingMode
from tpworker.rank.device import CpuDevice
from tpworker.rank.slots import MAX_STOP_IDS, SlotTable
from tpworker.rank.staging import StagingPool


def admission(slot: int, **changes: object) -> Admission:
    fields = {
        "tokens": pack_int32(range(10)), "num_prompt": 10, "num_cached": 4, "blocks": pack_int32([5, 6]),
        "sampling": sampling(temperature=0.0),
    }  # fmt: skip
    return Admission(slot=slot, **{**fields, **changes})  # type: ignore[arg-type]


def apply(table: SlotTable, admitted: list[Admission], grants: list[Grant]) -> None:
    buffer = StagingPool(CpuDevice()).take()
    deltas = table.stage(admitted, grants, buffer)
    buffer.send()
    table.apply(deltas)


def test_an_admission_fills_its_row_and_no_other() -> None:
    table = SlotTable(4, 8, torch.device("cpu"))
    before = {
        f: getattr(table, f).clone() for f in ("position", "seed", "block_table", "temperature", "stop_ids")
    }
    wanted = sampling(
        temperature=0.5, top_p=0.25, top_k=3, seed=-(2**63), min_tokens=6, stop_ids=pack_int32([2, 9])
    )
    apply(table, [admission(2, sampling=wanted)], [])
    assert table.position[2] == 4
    assert table.block_table[2].tolist() == [5, 6, 0, 0, 0, 0, 0, 0]
    assert (table.temperature[2], table.top_p[2], table.top_k[2]) == (0.5, 0.25, 3)
    assert table.seed[2] == -(2**63)
    assert table.min_length[2] == 16
    assert table.stop_ids[2].tolist() == [2, 9] + [-1] * (MAX_STOP_IDS - 2)
    for name, tensor in before.items():
        others = [0, 1, 3, 4]
        assert torch.equal(getattr(table, name)[others], tensor[others]), name


def test_grants_append() -> None:
    table = SlotTable(4, 8, torch.device("cpu"))
    apply(table, [admission(1)], [])
    apply(table, [], [Grant(1, 2, pack_int32([7, 8])), Grant(3, 0, pack_int32([9]))])
    assert table.block_table[1, :5].tolist() == [5, 6, 7, 8, 0]
    assert table.block_table[3, 0] == 9
    assert table.position[3] == 0


def test_nothing_to_apply() -> None:
    table = SlotTable(4, 8, torch.device("cpu"))
    apply(table, [], [])
    assert not table.block_table.any()


def test_a_slot_forgets_who_had_it_before() -> None:
    table = SlotTable(4, 8, torch.device("cpu"))
    greedy = sampling(temperature=0.0)
    apply(table, [admission(1, sampling=sampling(top_k=5, min_tokens=3, stop_ids=pack_int32([1] * 16)))], [])
    assert dataclasses.astuple(table.sampling_mode([1])) == (True, True, True)
    apply(table, [admission(1, sampling=greedy)], [])
    assert dataclasses.astuple(table.sampling_mode([1])) == (False, False, False)
    assert table.stop_ids[1].tolist() == [-1] * MAX_STOP_IDS


def test_the_mode_is_what_any_row_needs() -> None:
    table = SlotTable(4, 8, torch.device("cpu"))
    kinds = [
        sampling(temperature=0.0, top_k=5),  # greedy: truncation changes nothing
        sampling(temperature=1.0),
        sampling(temperature=1.0, top_p=0.5),
        sampling(temperature=0.0, min_tokens=1, stop_ids=pack_int32([3])),
    ]
    apply(table, [admission(slot, sampling=kind) for slot, kind in enumerate(kinds)], [])
    modes = [dataclasses.astuple(table.sampling_mode([slot])) for slot in range(4)]
    assert modes == [(False, False, False), (True, False, False), (True, True, False), (False, False, True)]
    assert dataclasses.astuple(table.sampling_mode([0, 1, 2, 3])) == (True, True, True)
    assert dataclasses.astuple(table.sampling_mode([])) == (False, False, False)


def test_sampling_rows_are_gathered() -> None:
    table = SlotTable(4, 8, torch.device("cpu"))
    apply(table, [admission(slot, sampling=sampling(seed=slot)) for slot in range(4)], [])
    table.position[1:4] = torch.tensor([20, 30, 10])
    rows = table.sampling_rows(torch.tensor([3, 1]), SamplingMode(True, True, True))
    assert rows.seed.tolist() == [3, 1]
    assert rows.position.tolist() == [10, 20]
