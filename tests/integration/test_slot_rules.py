"""Rules and logprobs where slots change hands, prompts are cut anywhere, and parameters are at their bounds.

fp32, a tiny random model; scheduler and ranks are real, as threads of this process.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import VOCAB
from tests.integration.test_features import PLAIN
from tpworker.ipc.arrays import pack_float32, pack_int32
from tpworker.ipc.messages import MAX_BARRED, NO_LOGPROBS, Abort, LogitRules, Sampling, Submit
from tpworker.sampling_params import choice_seed
from tpworker.testing.in_process import InProcessGroup, Output

PROMPT = [random.Random(4).randrange(VOCAB) for _ in range(23)]
EVERYTHING = LogitRules(
    1.7, 1.5, 0.5,
    pack_int32(range(0, VOCAB, 2)), pack_float32(3.0 * (-1) ** i for i in range(0, VOCAB, 2)),
    pack_int32(range(VOCAB // 2)), (pack_int32([1]), pack_int32([2, 3])),
)  # fmt: skip


def submit(number: int, prompt: list[int], rules: LogitRules | None = None, **changes: Any) -> Submit:
    fields: dict[str, Any] = {"temperature": 0.0, "max_tokens": 9, "seed": number}
    sampling = Sampling(
        **{"top_p": 1.0, "top_k": 0, "min_tokens": 0, "stop_ids": b"", **fields, **changes}, rules=rules
    )
    return Submit(0, number, pack_int32(prompt), 0, sampling)


def alone(folder: Path, submits: list[Submit]) -> dict[int, Output]:
    """Each in a group of its own: nobody has had its slot."""
    outputs = {}
    for message in submits:
        with InProcessGroup(folder, lookahead=0, prefix_caching=False) as group:
            outputs |= group.run([message])
    return outputs


def same(got: Output, expected: Output) -> None:
    assert got.tokens == expected.tokens
    for rows, wanted in ((got.logprobs, expected.logprobs), (got.prompt_logprobs, expected.prompt_logprobs)):
        assert [own for own, _ in rows] == pytest.approx([own for own, _ in wanted], abs=1e-4)
        for (_, top), (_, wanted_top) in zip(rows, wanted, strict=True):
            assert [p for _, p in top] == pytest.approx([p for _, p in wanted_top], abs=1e-4)
            known = dict(wanted_top)  # two that are nearly equal may be in another order
            assert all(known.get(token, p) == pytest.approx(p, abs=1e-4) for token, p in top)
            assert len(known.keys() & dict(top)) >= len(top) - 1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_slot_that_had_rules_is_plain_for_who_comes_next(folder: Path, num_ranks: int) -> None:
    """One slot, released and given out in one plan, with overlap: everything, nothing, some, nothing."""
    kinds: list[LogitRules | None] = [
        EVERYTHING, None, replace(PLAIN, presence_penalty=2.0), None, EVERYTHING,
        replace(PLAIN, barred=(pack_int32([5, 6]),)), replace(PLAIN, repetition_penalty=1.3), None,
    ]  # fmt: skip
    submits = [submit(i, PROMPT[: 5 + i], rules, temperature=0.5 * (i % 2)) for i, rules in enumerate(kinds)]
    expected = alone(folder, submits)
    plain = alone(folder, [replace(m, sampling=replace(m.sampling, rules=None)) for m in submits[:3]])
    assert [plain[i].tokens == expected[i].tokens for i in range(3)] == [False, True, False]
    with InProcessGroup(folder, num_ranks, max_num_seqs=1, max_num_batched_tokens=8) as group:
        group.run(submits)
        for message in submits:
            same(group.outputs[message.request], expected[message.request])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_prompts_are_told_of_wherever_they_are_cut(folder: Path, num_ranks: int) -> None:
    """Every budget from one token on, beside one that decodes; prompts of one token and of two, too."""
    asked = {"num_prompt_logprobs": 4, "num_logprobs": 1, "max_tokens": 2}
    submits = [
        submit(1, PROMPT, **asked), submit(2, PROMPT[:1], **asked), submit(3, PROMPT[:2], **asked),
        submit(4, PROMPT[3:20], max_tokens=12),
    ]  # fmt: skip
    expected = alone(folder, submits)
    assert [len(expected[i].prompt_logprobs) for i in (1, 2, 3, 4)] == [22, 0, 1, 0]
    for budget in (*range(4, 15), 22, 23, 24):
        with InProcessGroup(folder, num_ranks, max_num_seqs=4, max_num_batched_tokens=budget) as group:
            group.run(submits)
            for message in submits:
                same(group.outputs[message.request], expected[message.request])
    with InProcessGroup(folder, num_ranks, max_num_seqs=1, max_num_batched_tokens=1) as group:
        group.run(submits[:3])
        for message in submits[:3]:
            same(group.outputs[message.request], expected[message.request])


def test_a_prompt_of_more_rows_than_are_computed_at_once(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits in parts that do not divide it."""
    from tpworker.rank import sampler

    messages = [submit(1, PROMPT, num_prompt_logprobs=3), submit(2, PROMPT[::-1], num_prompt_logprobs=3)]
    expected = alone(folder, messages)
    for rows in (1, 5, 11, 22, 43, 44, 45):
        monkeypatch.setattr(sampler, "_PROMPT_ROWS", rows)
        with InProcessGroup(folder, 2, max_num_batched_tokens=64) as group:
            group.run(messages)
            for message in messages:
                same(group.outputs[message.request], expected[message.request])


def test_choices_and_neighbours(folder: Path) -> None:
    """The first choice tells of the prompt, all of their tokens, and a neighbour of nothing."""
    asked = {"temperature": 0.8, "num_logprobs": 2}
    choices = [
        replace(submit(i, PROMPT, EVERYTHING, **asked, num_prompt_logprobs=NO_LOGPROBS if i else 2), group=0)
        for i in range(4)
    ]
    choices = [replace(m, sampling=replace(m.sampling, seed=choice_seed(7, m.request))) for m in choices]
    plain = submit(9, PROMPT)
    expected = alone(folder, [*(replace(message, group=None) for message in choices), plain])
    for options in ({}, {"prepare": True}, {"num_kv_blocks": 12}):
        with InProcessGroup(folder, 2, **options) as group:  # type: ignore[arg-type]
            group.run([plain, *choices])
            for message in [*choices, plain]:
                same(group.outputs[message.request], expected[message.request])
            assert group.outputs[9].logprobs == group.outputs[9].prompt_logprobs == []
            assert [len(group.outputs[i].prompt_logprobs) for i in range(4)] == [22, 0, 0, 0]
    assert len({tuple(expected[i].tokens) for i in range(4)}) > 1


BOUNDS: dict[str, LogitRules] = {
    "one token": replace(PLAIN, allowed_ids=pack_int32([41])),
    "the last token": replace(PLAIN, allowed_ids=pack_int32([VOCAB - 1])),
    "repeat nothing": replace(PLAIN, repetition_penalty=100.0, presence_penalty=2.0, frequency_penalty=2.0),
    "repeat all": replace(PLAIN, repetition_penalty=0.01, presence_penalty=-2.0, frequency_penalty=-2.0),
    "bias": replace(PLAIN, bias_ids=pack_int32([0, VOCAB - 1]), bias=pack_float32([-100.0, 100.0])),
    "every word": replace(PLAIN, barred=tuple(pack_int32([i]) for i in range(VOCAB) if i != 8)),
    "long words": replace(PLAIN, barred=tuple(pack_int32([i % VOCAB] * 16) for i in range(MAX_BARRED))),
}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rules_at_their_bounds(folder: Path, num_ranks: int) -> None:
    """Greedy and random; logprobs stay those of the model."""
    submits = [
        submit(10 * i + int(hot), PROMPT[: 6 + i], rules, temperature=hot, num_logprobs=20, top_p=0.9)
        for i, rules in enumerate(BOUNDS.values())
        for hot in (0.0, 2.0)
    ]
    with InProcessGroup(folder, num_ranks, check_agreement=True) as group:
        outputs = group.run(submits)
    tokens = {name: outputs[10 * i].tokens + outputs[10 * i + 2].tokens for i, name in enumerate(BOUNDS)}
    assert set(tokens["one token"]) == {41}
    assert set(tokens["the last token"]) == set(tokens["bias"]) == {VOCAB - 1}
    assert set(tokens["every word"]) == {8}
    never = list(BOUNDS).index("repeat nothing")
    assert len(set(outputs[10 * never].tokens)) == len(set(outputs[10 * never + 2].tokens)) == 9
    assert not set(outputs[10 * never].tokens) & set(PROMPT[: 6 + never])
    all_again = outputs[10 * list(BOUNDS).index("repeat all")].tokens
    assert set(all_again) <= set(PROMPT)
    for output in outputs.values():
        for (own, top), token in zip(output.logprobs, output.tokens, strict=True):
            assert -math.inf < own <= 0
            assert sum(math.exp(p) for _, p in top) <= 1.0001
            assert own == dict(top).get(token, own)


def test_aborts_with_logprobs_on_their_way(folder: Path) -> None:
    """In the middle of the prompt and of the answer: whoever gets the slot is not told of another's."""
    asked = {"num_prompt_logprobs": 2, "num_logprobs": 2}
    survivors = [submit(100 + i, PROMPT[i:], EVERYTHING, **asked) for i in range(6)]
    expected = alone(folder, survivors)
    with InProcessGroup(folder, 2, max_num_seqs=2, max_num_batched_tokens=5) as group:
        for i, survivor in enumerate(survivors):
            group.send(submit(i, PROMPT[::-1], PLAIN, **asked, max_tokens=60))
            group.send(survivor)
            for _ in range(i):
                group.step(30)
            group.send(Abort(0, i))
            group.outputs[i].finish_reason = "abort"
        group.wait()
        for survivor in survivors:
            same(group.outputs[survivor.request], expected[survivor.request])
        group.scheduler.composer.check_integrity()
