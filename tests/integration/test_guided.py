"""Outputs held to grammars: every one fits, and is the same for any lookahead, TP size and delay.

The oracle is lookahead 0, one request at a time, on one rank; fp32, a tiny random model.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.guided import KINDS, VOCABULARY, WORD, requests, text_of
from tpworker.grammar import grammar_of
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.messages import Abort, Submit
from tpworker.scheduler.guide import MAX_SLOW
from tpworker.testing.in_process import InProcessGroup

Oracle = dict[int, tuple[list[int], str | None]]


def guided_group(folder: Path, num_ranks: int = 1, **options: object) -> InProcessGroup:
    return InProcessGroup(folder, num_ranks, **options)  # type: ignore[arg-type]


def run(group: InProcessGroup, submits: list[Submit]) -> Oracle:
    group.send(VOCABULARY)
    group.run(submits)
    return {number: (output.tokens, output.finish_reason) for number, output in group.outputs.items()}


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    alone: Oracle = {}
    with guided_group(folder, lookahead=0, prefix_caching=False) as group:
        for submit in requests():
            alone |= run(group, [submit])
    fits = {kind.grammar: kind.fits for kind in KINDS}
    ended, early = set(), 0
    for submit in requests():
        tokens, reason = alone[submit.request]
        ended.add((submit.grammar is not None, reason))
        if submit.grammar is not None and reason == "stop":
            assert fits[submit.grammar](text_of(tokens)), text_of(tokens)
            if submit.grammar == grammar_of(WORD):
                early += len(tokens) < 7
                assert len(tokens) > submit.sampling.min_tokens, "it ended before min_tokens"
    assert (True, "stop") in ended, "nothing came to its end"
    assert (True, "length") in ended, "nothing was cut"
    assert early, "none was short enough to need min_tokens"
    return alone


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("lookahead", [0, 1, 2, 4])
def test_every_lookahead_and_tp_size(folder: Path, oracle: Oracle, num_ranks: int, lookahead: int) -> None:
    with guided_group(folder, num_ranks, lookahead=lookahead, check_agreement=True) as group:
        assert run(group, requests()) == oracle
        group.scheduler.composer.check_integrity()


@pytest.mark.parametrize("num_kv_blocks", [20, 26])
def test_preemption_changes_nothing(folder: Path, oracle: Oracle, num_kv_blocks: int) -> None:
    with guided_group(folder, 2, num_kv_blocks=num_kv_blocks) as group:
        for _ in range(5):  # who runs beside whom is also a matter of when each grammar is compiled
            assert run(group, requests()) == oracle
            if group.scheduler.composer.num_preemptions:
                return
    pytest.fail("nobody was preempted")


def test_delays_change_nothing(folder: Path, oracle: Oracle) -> None:
    draw = random.Random(3)
    with guided_group(folder, 2, jitter=lambda: draw.choice([0.0, 0.0, 0.004]), lookahead=3) as group:
        assert run(group, requests()) == oracle


def test_batches_that_are_padded_change_nothing(folder: Path, oracle: Oracle) -> None:
    with guided_group(folder, 2, prepare=True) as group:
        assert run(group, requests()) == oracle


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("num_kv_blocks", [26, 128])
def test_choices_priorities_and_salts_change_nothing(
    folder: Path, oracle: Oracle, num_ranks: int, lookahead: int, num_kv_blocks: int
) -> None:
    """Each twice, as choices of one request. Some are aborted, of these some before there is a guide."""
    draw = random.Random(num_kv_blocks)
    options = {"lookahead": lookahead, "num_kv_blocks": num_kv_blocks}
    with guided_group(folder, num_ranks, **options) as group:
        group.send(VOCABULARY)
        for submit in requests():
            first = 100 + 2 * submit.request
            priority, salt = draw.choice([0, 0, 3, -2]), draw.choice(["", "a"])
            for number in (first, first + 1):
                group.send(replace(submit, request=number, group=first, priority=priority, salt=salt))
            if submit.request % 3 == 1:
                group.send(Abort(0, first + submit.request % 2))
                group.outputs[first + submit.request % 2].finish_reason = "abort"
            if submit.request % 5 == 0:
                group.step(60.0)
        group.wait()
        for number, output in group.outputs.items():
            if output.finish_reason != "abort":
                assert (output.tokens, output.finish_reason) == oracle[(number - 100) // 2], number
        assert any(output.num_cached for output in group.outputs.values())
        assert (group.scheduler.composer.num_preemptions > 0) == (num_kv_blocks == 26)
        group.scheduler.composer.check_integrity()


def test_a_restart_goes_on_in_the_grammar(folder: Path, oracle: Oracle) -> None:
    """What had been delivered comes with the request, and its guide begins behind it."""
    submits = []
    for submit in requests():
        tokens, _ = oracle[submit.request]
        count = len(tokens) // 2
        whole = pack_int32([*unpack_int32(submit.tokens), *tokens[:count]])
        submits.append(replace(submit, tokens=whole, num_delivered=count))
    with guided_group(folder, 2) as group:
        for submit in submits:
            group.outputs[submit.request] = None  # type: ignore[assignment]
        group.send(VOCABULARY)
        for submit in submits:
            group.send(submit)
            group.outputs[submit.request].tokens += oracle[submit.request][0][: submit.num_delivered]
        group.wait()
        got = {number: (output.tokens, output.finish_reason) for number, output in group.outputs.items()}
    assert got == oracle


def test_a_group_that_stops_waits_for_no_mask(folder: Path) -> None:
    """Steps are on their way, and the scheduler has left."""
    with guided_group(folder, 2, lookahead=4, step_timeout=300.0) as group:
        group.send(VOCABULARY)
        for submit in requests():
            group.send(submit)
        while not any(output.tokens for output in group.outputs.values()):
            group.step(60.0)


def test_aborts_at_any_time_leave_nothing(folder: Path, oracle: Oracle) -> None:
    """Before a grammar is compiled, while its masks are waited for, and later."""
    with guided_group(folder, 2, lookahead=3) as group:
        group.send(VOCABULARY)
        for submit in requests():
            group.send(submit)
            if submit.request % 3 == 0:
                group.send(Abort(0, submit.request))
                group.outputs[submit.request].finish_reason = "abort"
        group.wait()
        for number, output in group.outputs.items():
            assert number % 3 == 0 or (output.tokens, output.finish_reason) == oracle[number]
        again = [replace(submit, request=100 + submit.request) for submit in requests()]
        group.run(again)
        assert all(group.outputs[s.request].tokens == oracle[s.request - 100][0] for s in again)
        group.scheduler.composer.check_integrity()


def test_a_grammar_at_fault_fails_its_request_alone(folder: Path, oracle: Oracle) -> None:
    """The runtime has compiled it before; should it fail here all the same, nobody else is concerned."""
    whole = requests()[0]
    broken = replace(whole, request=100, grammar="start: unknown")
    ended = replace(whole, request=101, tokens=whole.tokens + pack_int32([12]), num_delivered=1)
    with guided_group(folder, 2) as group:
        group.send(VOCABULARY)
        for submit in (broken, ended, *requests()):
            group.send(submit)
        group.wait()
        assert "unknown" in str(group.outputs[100].finish_reason)
        assert group.outputs[100].tokens == group.outputs[101].tokens == []
        assert "does not take token 12" in str(group.outputs[101].finish_reason)
        for number, expected in oracle.items():
            assert (group.outputs[number].tokens, group.outputs[number].finish_reason) == expected


def test_a_mask_that_takes_too_long_fails_its_request_alone(
    folder: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpworker.grammar.bits.MAX_MASK_SECONDS", -1.0)
    with guided_group(folder, 2) as group:
        run(group, requests())
        for submit in requests():
            output = group.outputs[submit.request]
            tokens, reason = oracle[submit.request]
            if submit.grammar is None or len(tokens) < MAX_SLOW:
                assert (output.tokens, output.finish_reason) == (tokens, reason)
            else:
                assert len(output.tokens) < MAX_SLOW
                assert output.tokens == tokens[: len(output.tokens)]
                assert "a mask took more than 50 ms of processor time" in str(output.finish_reason)
        group.scheduler.composer.check_integrity()
