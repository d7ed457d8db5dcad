from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.model.helpers import run_ranks
from tests.model.test_sampling import logits_of, reference_tokens, rows_of
from tests.scheduler.helpers import sampling
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Admission, Grant, LogitRules
from tpworker.model import torch_operations
from tpworker.model.sampling import SamplingMode, sample
from tpworker.model.tp import Collectives
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
    columns = {
        "seed": table.seed, "temperature": table.temperature, "stop_ids": table.stop_ids,
        **{name: getattr(table.state, name) for name in ("position", "block_table", "end", "drafts")},
    }  # fmt: skip
    before = {name: tensor.clone() for name, tensor in columns.items()}
    wanted = sampling(
        temperature=0.5, top_p=0.25, top_k=3, seed=-(2**63), min_tokens=6, stop_ids=pack_int32([2, 9])
    )
    apply(table, [admission(2, sampling=wanted)], [])
    assert table.state.position[2] == 4
    assert table.state.block_table[2].tolist() == [5, 6, 0, 0, 0, 0, 0, 0]
    assert (table.temperature[2], table.top_p[2], table.top_k[2]) == (0.5, 0.25, 3)
    assert table.seed[2] == -(2**63)
    assert table.min_length[2] == 16
    assert table.stop_ids[2].tolist() == [2, 9] + [-1] * (MAX_STOP_IDS - 2)
    for name, tensor in before.items():
        others = [0, 1, 3, 4]
        assert torch.equal(columns[name][others], tensor[others]), name


def test_a_history_is_of_sequences_and_not_of_the_null_slot() -> None:
    """Steps beforehand may be longer than any sequence, by what drafts have room for."""
    table = SlotTable(4, 8, torch.device("cpu"), num_drafts=2, history=10)
    apply(table, [admission(1)], [])
    assert table.state.history[1].tolist() == list(range(10))
    apply(table, [admission(4, tokens=pack_int32(range(1, 12)), blocks=pack_int32([0]))], [])
    assert not table.state.history[4].any()
    assert not table.state.most_drafts[4]


def test_grants_append() -> None:
    table = SlotTable(4, 8, torch.device("cpu"))
    apply(table, [admission(1)], [])
    apply(table, [], [Grant(1, 2, pack_int32([7, 8])), Grant(3, 0, pack_int32([9]))])
    assert table.state.block_table[1, :5].tolist() == [5, 6, 7, 8, 0]
    assert table.state.block_table[3, 0] == 9
    assert table.state.position[3] == 0


def test_nothing_to_apply() -> None:
    table = SlotTable(4, 8, torch.device("cpu"))
    apply(table, [], [])
    assert not table.state.block_table.any()


def test_a_slot_forgets_who_had_it_before() -> None:
    table = SlotTable(4, 8, torch.device("cpu"))
    greedy = sampling(temperature=0.0)
    apply(table, [admission(1, sampling=sampling(top_k=5, min_tokens=3, stop_ids=pack_int32([1] * 16)))], [])
    assert table.sampling_mode([1]) == SamplingMode(True, True, True)
    apply(table, [admission(1, sampling=greedy)], [])
    assert table.sampling_mode([1]) == SamplingMode(False, False, False)
    assert table.stop_ids[1].tolist() == [-1] * MAX_STOP_IDS


def test_the_mode_is_what_any_row_needs() -> None:
    table = SlotTable(7, 8, torch.device("cpu"))
    kinds = [
        sampling(temperature=0.0, top_k=5),  # greedy: truncation changes nothing
        sampling(temperature=1.0),
        sampling(temperature=1.0, top_p=0.5),
        sampling(temperature=0.0, min_tokens=1, stop_ids=pack_int32([3])),
        sampling(temperature=0.0, rules=LogitRules(1.1, 0.0, 0.0, b"", b"", None, ())),
        sampling(temperature=0.0, num_logprobs=0),
    ]
    admissions = [admission(slot, sampling=kind) for slot, kind in enumerate(kinds)]
    admissions.append(dataclasses.replace(admissions[0], slot=6, is_guided=True))
    apply(table, admissions, [])
    modes = [dataclasses.astuple(table.sampling_mode([slot])) for slot in range(7)]
    no = False
    assert modes == [
        (no, no, no, no, no, no),
        (True, no, no, no, no, no),
        (True, True, no, no, no, no),
        (no, no, True, no, no, no),
        (no, no, no, True, no, no),
        (no, no, no, no, True, no),
        (no, no, no, True, no, True),
    ]
    assert dataclasses.astuple(table.sampling_mode(range(7))) == (True,) * 6
    assert dataclasses.astuple(table.sampling_mode([])) == (no,) * 6


def test_sampling_rows_are_gathered() -> None:
    table = SlotTable(4, 8, torch.device("cpu"))
    apply(table, [admission(slot, sampling=sampling(seed=slot)) for slot in range(4)], [])
    table.state.position[1:4] = torch.tensor([20, 30, 10])
    rows = table.sampling_rows(torch.tensor([3, 1]), 1, SamplingMode(True, True, True))
    assert rows.seed.tolist() == [3, 1]
    assert rows.position.tolist() == [11, 21]


def test_sampling_rows_of_drafts_stand_one_behind_the_other() -> None:
    table = SlotTable(4, 8, torch.device("cpu"), num_drafts=2)
    apply(table, [admission(slot, sampling=sampling(seed=slot)) for slot in range(4)], [])
    table.state.position[1:4] = torch.tensor([20, 30, 10])
    rows = table.sampling_rows(torch.tensor([3, 1]), 3, SamplingMode(True, True, True))
    assert rows.seed.tolist() == [3, 3, 3, 1, 1, 1]
    assert rows.position.tolist() == [11, 12, 13, 21, 22, 23]
    assert len(rows.stop_ids) == len(rows.top_p) == 6


GREEDY: dict[str, Any] = {"temperature": 0.0}
PLAIN: dict[str, Any] = {"temperature": 0.7}
# What people ask for, and sets that end before, at and after each of the constants of sampling.
TRUNCATED: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 5.0, "top_p": 0.999},
    *({"temperature": 100.0, "top_k": top_k} for top_k in (255, 256, 257, 2000)),
)
SUPPRESSED: dict[str, Any] = {"min_tokens": 3, "stop_ids": pack_int32([0, 5, 11])}
BATCHES: dict[str, tuple[dict[str, Any], ...]] = {
    "greedy": (GREEDY, GREEDY),
    "random": (PLAIN, GREEDY),
    "truncated": (*TRUNCATED, PLAIN, GREEDY),
    "greedy, suppressed": ({**GREEDY, **SUPPRESSED}, GREEDY),
    "random, suppressed": ({**PLAIN, **SUPPRESSED}, PLAIN, GREEDY),
    "truncated, suppressed": (*({**kind, **SUPPRESSED} for kind in TRUNCATED), *TRUNCATED, PLAIN, GREEDY),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("vocab_size", [40, 256, 257, 3000, 49152])
def test_from_admissions_to_tokens(batch: str, vocab_size: int) -> None:
    """Every mode, with what the table gives that mode and nothing else: the tokens of the definition."""
    kinds = [sampling(**{"seed": seed, **kind}) for seed, kind in enumerate(BATCHES[batch])]
    count = len(kinds)
    table = SlotTable(count, 8, torch.device("cpu"))
    apply(table, [admission(slot, sampling=kind) for slot, kind in enumerate(kinds)], [])
    table.state.position[:count] = 11  # below the prompt of 10 and its min_tokens
    mode = table.sampling_mode(range(count))
    is_truncated, is_suppressed = batch.startswith("truncated"), batch.endswith("suppressed")
    assert mode == SamplingMode(not batch.startswith("greedy"), is_truncated, is_suppressed)

    logits = logits_of(count, vocab_size, scale=1.0, seed=vocab_size)
    logits[:, [0, 5, 11]] += 4  # which suppression has to keep down
    local = vocab_size // 2 + 8
    halves = torch.full((2, count, local), -torch.inf)
    halves[0], halves[1, :, : vocab_size - local] = logits[:, :local], logits[:, local:]

    def main(collectives: Collectives) -> list[int]:
        rows = table.sampling_rows(torch.arange(count), 1, mode)
        rank = collectives.rank
        return sample(torch_operations, halves[rank].clone(), rows, mode, rank * local, collectives).tolist()

    for slot, kind in enumerate(kinds):
        if kind.min_tokens:
            logits[slot, [0, 5, 11]] = -torch.inf
    expected = reference_tokens(
        logits,
        rows_of(
            count,
            [kind.temperature for kind in kinds],
            [kind.top_p for kind in kinds],
            [kind.top_k for kind in kinds],
            position=12,
        ),
    )
    assert run_ranks(2, main) == [expected, expected]
