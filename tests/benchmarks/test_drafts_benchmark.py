"""`bench drafts` without a GPU: how acceptance is imposed, what is made of counters, CPU ranks."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps import drafts
from benchmarks.steps.drafts_run import DraftsCase, Wanted, measure_drafts, step_figures
from benchmarks.steps.imposed import AUTO, CERTAIN, VALUES, Imposed, Order, impose, mixed, stand_in
from tests.absent_gpu import Launcher, needs_triton, pretend
from tests.benchmarks.test_gpu_benchmarks import tiny_glm
from tests.conftest import TINY_CONFIG
from tpworker.kernels.operands import SlotState
from tpworker.model import torch_operations
from tpworker.outputs import Stats, StepRecord

ROOT = Path(__file__).resolve().parents[2]
NUM_SLOTS, NUM_DRAFTS = 40, 3


def slot_state(position: int = 100) -> SlotState:
    """Of some slots and the null slot, with drafts."""
    draw = torch.Generator().manual_seed(position)
    integers = torch.zeros(NUM_SLOTS + 1, 5, dtype=torch.int64)
    state = SlotState(
        last_token=torch.zeros(NUM_SLOTS + 1, dtype=torch.int64),
        position=torch.full((NUM_SLOTS + 1,), position),
        end=integers[:, 0].fill_(1 << 30),
        most_drafts=integers[:, 1].fill_(NUM_DRAFTS),
        drafts=torch.randint(0, VALUES, (NUM_SLOTS + 1, NUM_DRAFTS), generator=draw),
        history=torch.zeros(NUM_SLOTS + 1, 0, dtype=torch.int32),
        block_table=torch.zeros(NUM_SLOTS + 1, 4, dtype=torch.int32),
    )
    state.position[-1] = state.most_drafts[-1] = 0
    state.drafts[-1] = -1
    return state


def seeds(share: float) -> torch.Tensor:
    return torch.full((NUM_SLOTS + 1,), Order(3, 2, round(CERTAIN * share)).seed)


def test_an_order_is_a_seed() -> None:
    for number, num_drafts, share, is_traced in product(
        (1, 4095), (0, 8, AUTO), (0, 600, CERTAIN), (True, False)
    ):
        order = Order(number, num_drafts, share, is_traced)
        assert Order.of(order.seed) == order
        assert order.seed < 1 << 31


@pytest.mark.parametrize("share", [0.0, 0.6, 0.9, 1.0])
def test_drafts_are_right_as_often_as_is_asked_for(share: float) -> None:
    """Each, where all before it are: by the counts that the definition of a step's end then has."""
    slots = torch.arange(NUM_SLOTS)
    reached, right = [0] * NUM_DRAFTS, [0] * NUM_DRAFTS
    operations = Imposed(torch_operations, seeds(share))
    counter, ring = torch.full((1,), -1), torch.zeros(4, 1 + NUM_SLOTS * (NUM_DRAFTS + 2), dtype=torch.int64)
    for step in range(200):
        state = slot_state(100 + 7 * step)
        tokens = torch.randint(0, VALUES, (NUM_SLOTS * (1 + NUM_DRAFTS),))
        counts = operations.finish_step(slots, tokens, 1 + NUM_DRAFTS, state, counter, ring)
        for index in range(NUM_DRAFTS):
            reached[index] += int((counts > index).sum())
            right[index] += int((counts > index + 1).sum())
    assert reached[0] == 200 * NUM_SLOTS
    for index in range(NUM_DRAFTS if share else 1):
        assert right[index] / reached[index] == pytest.approx(share, abs=0.025)


def test_only_what_has_a_draft_is_replaced() -> None:
    state, slots = slot_state(), torch.tensor([4, NUM_SLOTS, 2])
    state.drafts[2, 1:] = -1
    tokens = torch.full((9,), 7)
    impose(slots, tokens, 3, seeds(1.0), state)
    first, second = state.drafts[4, :2].tolist(), state.drafts[2, 0].item()
    assert tokens.tolist() == [*first, 7, 7, 7, 7, second, 7, 7]
    impose(slots, tokens, 3, seeds(0.0), state)
    assert tokens[0] == first[0] ^ 1, "a token that happens to be the draft is another"
    before, ring = tokens.clone(), torch.zeros(3, 20, dtype=torch.int64)
    every, state = torch.arange(9), slot_state()
    Imposed(torch_operations, seeds(1.0)).finish_step(every, tokens, 1, state, ring[0, :1].clone(), ring)
    assert torch.equal(tokens, before), "without drafts nothing is"


def test_drafts_that_a_look_up_does_not_find() -> None:
    state = slot_state()
    state.drafts[:, 1:] = -1
    state.drafts[5, 0] = -1
    state.most_drafts[5] = 2
    known = state.drafts[4, 0].item()
    slots = torch.tensor([4, 5, NUM_SLOTS])
    stand_in(slots, 3, state)
    assert state.drafts[4, 0] == known
    assert (state.drafts[4] >= 0).all()
    assert state.drafts[5].ge(0).tolist() == [True, True, False], "no more than it may have"
    assert (state.drafts[NUM_SLOTS] == -1).all()
    assert (state.drafts[6, 1:] == -1).all(), "others are left alone"
    assert len(set(mixed(torch.arange(1000), torch.tensor(5)).tolist())) > 990


@needs_triton
def test_the_kernels_are_their_definition() -> None:
    """In Triton's interpreter, which is chosen when Triton is imported: in another process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", "from tests.benchmarks.test_drafts_benchmark import compare; compare()"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "compared" in done.stdout


@needs_triton
def test_the_kernels_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    from benchmarks.steps import impose_kernels

    state, slots = slot_state(), torch.tensor([1, 2])
    impose_kernels.impose(slots, torch.zeros(4, dtype=torch.int64), 2, seeds(0.5), state)
    impose_kernels.stand_in(slots, 1, state)
    assert Launcher.launched == impose_kernels.NAMES


def compare() -> None:
    """To be called in a process of its own."""
    from benchmarks.steps import impose_kernels

    slots = torch.tensor([3, 39, 7, NUM_SLOTS, NUM_SLOTS, 0])
    for position, share, width in product((0, 5000), (0.0, 0.7, 1.0), (2, 4)):
        state, tokens = slot_state(position), torch.randint(0, VALUES, (len(slots) * width,))
        state.drafts[7, 1:] = -1
        expected, found = tokens.clone(), tokens.clone()
        impose(slots, expected, width, seeds(share), state)
        impose_kernels.impose(slots, found, width, seeds(share), state)
        assert torch.equal(found, expected)
        states = [replace(state, drafts=torch.full_like(state.drafts, -1)) for _ in range(2)]
        stand_in(slots, width - 1, states[0])
        impose_kernels.stand_in(slots, width - 1, states[1])
        assert torch.equal(states[0].drafts, states[1].drafts)
        assert (states[0].drafts[:-1, 0] >= 0).sum() == 4
    print("compared")


def stats(num_steps: int, num_drafts: int, decodes: int, counted: tuple[tuple[int, ...], ...]) -> Stats:
    steps = tuple(StepRecord(i, 0, decodes, 0, 0, i * 2_000_000, num_drafts) for i in range(num_steps))
    given = dict.fromkeys(Stats.__dataclass_fields__, 0)
    return Stats(**given | {"steps": num_steps, "recent_steps": steps,
                            "draft_tokens": counted[0], "accepted_tokens": counted[1]})  # fmt: skip


def test_figures_of_steps() -> None:
    before = stats(0, 0, 0, ((), ()))
    row = step_figures(before, stats(50, 2, 4, ((200, 200), (120, 60))), Wanted(4, 2, 0.6))
    assert row["tokens_a_step"] == 1 + 180 / 200
    assert row["step_ms"] == 2
    assert row["tpot_ms"] == pytest.approx(2 / 1.9)
    assert row["acceptance"] == [0.6, 0.3]
    auto = step_figures(before, stats(50, 2, 4, ((100, 100), (80, 40))), Wanted(4, AUTO, 0.8))
    assert auto["tokens_a_step"] == 1 + 120 / 200, "steps without drafts are steps too"
    plain = step_figures(stats(5, 2, 4, ((9,), (9,))), stats(50, 0, 4, ((9,), (9,))), Wanted(4, 0))
    assert (plain["tokens_a_step"], plain["acceptance"]) == (1, [])
    assert step_figures(before, stats(50, 2, 3, ((1,), (1,))), Wanted(4, 1)) == {"steps": 0}


def options_of(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    drafts.add_options(parser)
    return parser.parse_args(arguments)


def test_what_is_measured() -> None:
    case = drafts.case_of("qwen3-8b", 1, options_of(), 0)
    assert (case.method, case.num_drafts) == ("ngram", 3)
    kinds = [(row.num_drafts, row.acceptance) for row in case.rows if row.batch == 4]
    fixed = [(drafts, share) for drafts in (1, 3) for share in (0.6, 0.8, 0.9)]
    assert kinds == [(0, 0.0), *fixed, (AUTO, 0.0), (AUTO, 0.9)]
    assert {row.num_drafts for row in case.rows if row.batch == 16} == {0, 1, AUTO}
    assert [row.acceptance for row in case.rows if row.is_traced and row.batch == 16] == [0.0, 0.9]
    some = (
        "--no-auto",
        "--no-trace",
        "--drafts",
        "2",
        "--batch",
        "8",
        "--acceptance",
        "0.5",
        "--layers",
        "9",
    )
    case = drafts.case_of("glm-4.5-air", 2, options_of(*some), 1)
    assert (case.method, case.layers, case.num_running) == ("mtp", 9, 1)
    assert case.rows == [Wanted(8, 0), Wanted(8, 2, 0.5)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--acceptance", "1.1"), "from 0 to 1"),
        (("--acceptance", "nan"), "from 0 to 1"),
        (("--drafts", "9"), "from 1 to 8"),
        (("--drafts", "0"), "from 1 to 8"),
    ],
)
def test_what_is_out_of_range_is_refused(
    arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options_of(*arguments)
    assert told in capsys.readouterr().err


def test_numbers_of_drafts_that_no_steps_have_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drafts, "count_gpus", lambda: 1)
    assert drafts.run(options_of("--shapes", "qwen3-8b:1", "--drafts", "2", "3")) == 2
    assert "up to 3 drafts they have 1, 3, not 2" in capsys.readouterr().err


def test_cpu_ranks_with_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of four stand for them; what is told of times nobody looks at here."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    wanted = [Wanted(1, 0), Wanted(3, 0), Wanted(3, 3, 0.8), Wanted(3, AUTO, 0.9)]
    case = DraftsCase(
        str(tmp_path), 4, "ngram", wanted, num_prompt=20, num_output=150, device="cpu", stand_ins=2
    )
    rows = measure_drafts(case)
    assert [(row["method"], row["batch"], row["num_drafts"]) for row in rows] == [
        ("", 1, 0), ("", 3, 0), ("ngram", 1, 0), ("ngram", 3, 0), ("ngram", 3, 3), ("ngram", 3, "auto"),
    ]  # fmt: skip
    for row in rows:
        assert row["steps"] > 10
        assert (row["ranks"], row["num_running"]) == (4, 2)
        assert row["gain"] > 0
        assert ("graph_ms" in row) == (row["num_drafts"] != "auto")
    several, auto = rows[-2:]
    assert several["acceptance"] == pytest.approx([0.8, 0.64, 0.512], abs=0.15)
    assert several["tokens_a_step"] == pytest.approx(1 + sum(several["acceptance"]), abs=0.05)
    assert auto["mean_drafts"] > 0.2
    capsys.readouterr()
    drafts.print_table(rows)
    told = capsys.readouterr().out
    assert "4 (on 2)" in told
    assert "auto" in told


def test_a_head_with_experts_has_drafts_imposed_too(tmp_path: Path) -> None:
    tiny_glm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = [Wanted(3, 0), Wanted(3, 1, 0.9), Wanted(3, 2, 0.6)]
    case = DraftsCase(str(tmp_path), 1, "mtp", wanted, num_prompt=20, num_output=150, device="cpu", layers=2)
    rows = measure_drafts(case)
    assert [(row["method"], row["num_drafts"]) for row in rows] == [
        ("", 0),
        ("mtp", 0),
        ("mtp", 1),
        ("mtp", 2),
    ]
    assert rows[2]["acceptance"] == pytest.approx([0.9], abs=0.1)
    assert rows[3]["acceptance"] == pytest.approx([0.6, 0.36], abs=0.15)
    assert all(row["floor_ms"] > 0 and row["graph_ms"] > 0 for row in rows)


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    row: dict[str, Any] = {"model": "qwen3-8b", "ranks": 1, "method": "ngram", "batch": 4, "num_drafts": 3,
                           "wanted_acceptance": 0.9, "acceptance": [0.9, 0.812], "tokens_a_step": 2.712,
                           "step_ms": 4.4, "step_p99_ms": 4.5, "tpot_ms": 1.622, "gain": 2.41,
                           "graph_ms": 4.0, "mean_drafts": 3.0}  # fmt: skip
    drafts.print_table([row, row | {"trace_failed": "no GPU"}])
    captured = capsys.readouterr()
    assert all(
        cell in captured.out for cell in ("0.90 0.81", "2.71", "4.400 / 4.500", "1.622", "2.41", "1.100")
    )
    assert captured.err.count("no trace: no GPU") == 1
