"""The tables of logit rules: what admissions make of them, and what a slot forgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.scheduler.helpers import sampling
from tpworker.ipc.arrays import pack_float32, pack_int32
from tpworker.ipc.messages import MAX_BARRED, MAX_BARRED_LENGTH, MAX_BIAS, Admission, LogitRules
from tpworker.kernels.operands import BIASED, IN_PROMPT, MASKED, PENALISED, WORDS_BARRED
from tpworker.rank.device import CpuDevice
from tpworker.rank.logit_state import HISTORY, LogitState
from tpworker.rank.staging import StagingPool

NO_RULES = LogitRules(1.0, 0.0, 0.0, b"", b"", None, ())
VOCAB = 70


def admission(slot: int, tokens: Sequence[int], num_prompt: int, rules: LogitRules | None) -> Admission:
    return Admission(slot, pack_int32(tokens), num_prompt, 0, pack_int32([1]), sampling(rules=rules))


def admit(state: LogitState, *admitted: Admission) -> bool:
    """Whether there was anything to apply."""
    buffer = StagingPool(CpuDevice()).take()
    deltas = state.stage(admitted, buffer)
    if deltas is None:
        assert buffer.is_empty
        return False
    buffer.send()
    state.apply(deltas)
    return True


def of_rows(
    rules: Sequence[LogitRules | None], known: Sequence[list[int]], prompt: int, start: int, size: int
) -> LogitState:
    """Slot r has the rules and known tokens of row r, of which the first `prompt` are its prompt."""
    state = LogitState(len(rules), start, size, torch.device("cpu"))
    rows = enumerate(zip(rules, known, strict=True))
    admit(state, *(admission(slot, tokens, prompt, of) for slot, (of, tokens) in rows))
    return state


def ids_of(counts: torch.Tensor) -> dict[int, int]:
    return {int(column): int(counts[column]) for column in counts.nonzero()[:, 0]}


PENALTIES = replace(NO_RULES, repetition_penalty=1.5, presence_penalty=-0.5, frequency_penalty=0.25)
ALLOWED = replace(NO_RULES, allowed_ids=pack_int32([3, 31, 32, 69]))
BIAS = replace(NO_RULES, bias_ids=pack_int32([5, 60]), bias=pack_float32([1.5, -2.0]))
WORDS = replace(NO_RULES, barred=(pack_int32([9]), pack_int32([4, 5]), pack_int32(range(16))))
EVERYTHING = LogitRules(1.5, -0.5, 0.25, BIAS.bias_ids, BIAS.bias, ALLOWED.allowed_ids, WORDS.barred)


def test_prompt_and_output_are_counted_apart() -> None:
    """As after a preemption or a restart: both are known at the admission."""
    state = of_rows([PENALTIES], [[7, 7, 8, 9, 8, 8, 10, 10]], 4, 0, VOCAB)
    assert ids_of(state.tables.counts[0]) == {7: IN_PROMPT, 8: IN_PROMPT + 2, 9: IN_PROMPT, 10: 2}
    assert state.tables.penalties[0].tolist() == [1.5, -0.5, 0.25]


@pytest.mark.parametrize(
    ("rules", "uses"),
    [
        (None, 0),
        (PENALTIES, PENALISED),
        (replace(NO_RULES, presence_penalty=0.1), PENALISED),
        (replace(NO_RULES, frequency_penalty=-0.1), PENALISED),
        (replace(NO_RULES, repetition_penalty=0.9), PENALISED),
        (ALLOWED, MASKED),
        (BIAS, BIASED),
        (WORDS, MASKED | WORDS_BARRED),
        (replace(NO_RULES, barred=WORDS.barred[:1]), MASKED),
        (replace(NO_RULES, barred=WORDS.barred[1:]), WORDS_BARRED),
        (EVERYTHING, PENALISED | MASKED | BIASED | WORDS_BARRED),
    ],
)
def test_a_slot_uses_what_its_rules_need(rules: LogitRules | None, uses: int) -> None:
    state = of_rows([rules, None], [[1], [1]], 1, 0, VOCAB)
    assert state.tables.uses.tolist() == [uses, 0, 0]


@pytest.mark.parametrize(("start", "size"), [(0, 35), (35, 35), (0, 24), (24, 24), (48, 24), (72, 24)])
def test_a_rank_has_its_part_of_the_vocabulary(start: int, size: int) -> None:
    """Counts and allowed tokens of its own; bias and words of all, by their ids. The last one has none."""
    known = [3, 34, 35, 69, 3, 23, 24, 47, 48, 69, 69]
    state = of_rows([EVERYTHING], [known], 4, start, size)
    tables = state.tables
    assert tables.vocab_start == start
    whole = of_rows([EVERYTHING], [known], 4, 0, VOCAB).tables
    expected = torch.zeros(size, dtype=torch.int32)
    here = whole.counts[0, start : start + size]
    expected[: len(here)] = here
    assert torch.equal(tables.counts[0], expected)
    bits = np.unpackbits(tables.allowed[0].numpy().view(np.uint8), bitorder="little")
    assert (bits.nonzero()[0] + start).tolist() == [i for i in (3, 31, 32, 69) if start <= i < start + size]
    for name in ("bias_ids", "bias", "barred", "history"):
        assert torch.equal(getattr(tables, name), getattr(whole, name)), name


def test_tables_are_filled_up() -> None:
    tables = of_rows([EVERYTHING], [[1, 2]], 2, 0, VOCAB).tables
    assert tables.bias_ids[0].tolist() == [5, 60] + [-1] * (MAX_BIAS - 2)
    assert tables.bias[0, :3].tolist() == [1.5, -2.0, 0.0]
    words = tables.barred[0].tolist()
    assert words[0] == [-1] * (MAX_BARRED_LENGTH - 2) + [4, 5]
    assert words[1] == list(range(16)), "the longest fills its row"
    assert words[2:] == [[-1] * MAX_BARRED_LENGTH] * (MAX_BARRED - 2), "a word of one token is in the mask"
    assert tables.history[0].tolist() == [1, 2] + [-1] * (HISTORY - 2)


@pytest.mark.parametrize("length", [0, 1, HISTORY - 1, HISTORY, HISTORY + 1, 3 * HISTORY + 5])
def test_the_last_tokens_are_remembered_at_their_positions(length: int) -> None:
    tables = of_rows([WORDS], [list(range(100, 100 + length))], 0, 0, VOCAB).tables
    remembered = range(max(0, length - HISTORY), length)
    expected = [-1] * HISTORY
    for position in remembered:
        expected[position % HISTORY] = 100 + position
    assert tables.history[0].tolist() == expected


def test_as_many_words_and_biases_as_there_may_be() -> None:
    words = tuple(pack_int32([i, i + 1]) for i in range(MAX_BARRED))
    ids = range(0, 2 * MAX_BIAS, 2)
    rules = replace(
        NO_RULES, barred=words, bias_ids=pack_int32(ids), bias=pack_float32(float(i) for i in ids)
    )
    tables = of_rows([rules], [[1]], 1, 0, 3000).tables
    assert tables.barred[0, :, -1].tolist() == list(range(1, MAX_BARRED + 1))
    assert tables.bias_ids[0].tolist() == list(ids)
    assert tables.bias[0].tolist() == [float(i) for i in ids]


@pytest.mark.parametrize("later", [PENALTIES, ALLOWED, BIAS, WORDS, EVERYTHING])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_slot_forgets_who_had_it_before(later: LogitRules, at_once: bool) -> None:
    """All that its new rules look at is as in a slot that nobody has had."""
    state = LogitState(2, 0, VOCAB, torch.device("cpu"))
    before = admission(1, [60, 61, 62] * 20, 5, EVERYTHING)
    after = admission(1, [4, 8, 8], 2, later)
    if not at_once:
        admit(state, before)
        state.tables.counts[1] += 3  # as steps have counted
        state.tables.history[1] = 4
    admit(state, before)
    admit(state, after)
    expected = of_rows([None, later], [[1], [4, 8, 8]], 2, 0, VOCAB).tables
    assert torch.equal(state.tables.uses, expected.uses)
    assert torch.equal(state.tables.penalties[1], expected.penalties[1])
    uses = int(expected.uses[1])
    looked_at = {PENALISED: ["counts"], MASKED: ["allowed"], BIASED: ["bias_ids", "bias"],
                 WORDS_BARRED: ["barred", "history"]}  # fmt: skip
    for bit, names in looked_at.items():
        for name in names if uses & bit else ():
            assert torch.equal(getattr(state.tables, name)[1], getattr(expected, name)[1]), name


def test_who_has_no_rules_is_free_of_those_before_and_costs_nothing_then() -> None:
    state = LogitState(2, 0, VOCAB, torch.device("cpu"))
    plain = admission(0, [1, 2], 2, None)
    assert not admit(state, plain), "nothing had rules"
    assert admit(state, admission(0, [1, 2], 2, EVERYTHING))
    assert state.tables.uses[0] != 0
    assert admit(state, plain)
    assert state.tables.uses.tolist() == [0, 0, 0]
    assert not admit(state, plain), "it has been said already"
    assert not admit(state)


def test_other_slots_stay_as_they_are() -> None:
    state = of_rows([EVERYTHING] * 3, [[1, 2, 3], [4, 5, 6], [7, 8, 9]], 2, 0, VOCAB)
    names = ("uses", "penalties", "counts", "allowed", "bias_ids", "bias", "barred", "history")
    before = {name: getattr(state.tables, name).clone() for name in names}
    admit(state, admission(1, [50, 51], 1, PENALTIES))
    for name in names:
        assert torch.equal(getattr(state.tables, name)[[0, 2, 3]], before[name][[0, 2, 3]]), name


def test_a_preempted_request_comes_back_as_it_was_to_any_slot() -> None:
    """Its tokens are counted in steps, it loses its slot, and is admitted with prompt and output."""
    from tpworker.model.logit_rules import count_tokens

    state = of_rows([EVERYTHING, None], [[4, 4, 5], [1]], 3, 0, VOCAB)
    output = [9, 4, 9, 60, 60]
    for position, token in enumerate(output, 3):
        count_tokens(torch.tensor([0]), torch.tensor([token]), torch.tensor([position]), state.tables)
    admit(state, admission(0, [1], 1, None), admission(1, [4, 4, 5, *output], 3, EVERYTHING))
    assert state.tables.uses.tolist()[0] == 0
    assert ids_of(state.tables.counts[1]) == {4: IN_PROMPT + 1, 5: IN_PROMPT, 9: 2, 60: 2}
    assert torch.equal(state.tables.counts[1], state.tables.counts[0])
    assert torch.equal(state.tables.history[1], state.tables.history[0])
