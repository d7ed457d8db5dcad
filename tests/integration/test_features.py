"""Sampling features, and every pair of them, with overlap: lookahead 0, alone, on one rank, is the oracle.

fp32, a tiny random model; scheduler and ranks are real, as threads of this process.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import VOCAB
from tests.integration.guided import EOS, KINDS, VOCABULARY, text_of
from tpworker.ipc.arrays import pack_float32, pack_int32, unpack_int32
from tpworker.ipc.messages import LogitRules, Sampling, Submit
from tpworker.sampling_params import MAX_STOP_IDS
from tpworker.testing.in_process import InProcessGroup, Output

LENGTH = 14  # tokens of an answer
PLAIN = LogitRules(1.0, 0.0, 0.0, b"", b"", None, ())
SHARED = [random.Random(8).randrange(VOCAB) for _ in range(27)]
"""The beginning of every prompt."""


def ids(seed: int, count: int) -> list[int]:
    return random.Random(seed).sample(range(VOCAB), count)


STOP_IDS = ids(1, MAX_STOP_IDS - 1)
FEATURES: dict[str, dict[str, Any]] = {
    "random": {"temperature": 0.8},
    "min_p": {"temperature": 1.2, "min_p": 0.2},
    "top_p": {"temperature": 1.1, "top_p": 0.8},
    "top_k": {"temperature": 1.3, "top_k": 7},
    "min_tokens": {"min_tokens": 6, "stop_ids": pack_int32(STOP_IDS)},
    "repetition": {"rules": {"repetition_penalty": 1.7}},
    "presence, frequency": {"rules": {"presence_penalty": 1.5, "frequency_penalty": 0.7}},
    "bias": {"rules": {"bias_ids": pack_int32(ids(2, 20)), "bias": pack_float32([4.0, -9.0] * 10)}},
    "allowed": {"rules": {"allowed_ids": pack_int32(ids(3, 45))}},
    "barred": {"rules": {"barred": tuple(pack_int32([token]) for token in ids(4, 30))}},
    "logprobs": {"num_logprobs": 4},
    "own logprobs": {"num_logprobs": 0},
    "prompt logprobs": {"num_prompt_logprobs": 3},
    "schema": {"grammar": KINDS[1].grammar},
    "expression": {"grammar": KINDS[2].grammar},
}
GRAMMARS = frozenset({"schema", "expression"})
"""What an output is held to: one at a time, and without other lists of what may be chosen."""
NOT_TOGETHER = (GRAMMARS, *({name, other} for name in GRAMMARS for other in ("allowed", "barred")))


def sampling(*names: str, seed: int) -> Sampling:
    """Of these features together; of what two of them set, the later one counts."""
    fields: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_tokens": 0, "stop_ids": b""}
    rules: dict[str, Any] = {}
    for name in names:
        own = FEATURES[name]
        fields |= {key: value for key, value in own.items() if key not in ("rules", "grammar")}
        rules |= own.get("rules", {})
    if GRAMMARS & set(names):
        fields["stop_ids"] += pack_int32([EOS])  # as the runtime has it; a grammar is over before
    if rules:
        fields["rules"] = replace(PLAIN, **rules)
    return Sampling(seed=seed, max_tokens=LENGTH, **fields)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("names", [(), ("prompt logprobs", "repetition", "logprobs")])
def test_a_prompt_may_fill_a_slot(folder: Path, num_ranks: int, names: tuple[str, ...]) -> None:
    """As one of max_tokens=0 does; in slots that others have before and after it."""
    asked = replace(sampling(*names, seed=3), max_tokens=1)
    prompts = [ids(9, 40) * 2, ids(10, 64), ids(11, 5)]
    submits = [Submit(0, i, pack_int32(prompt[:64]), 0, asked) for i, prompt in enumerate(prompts)]
    with InProcessGroup(folder, max_model_len=128) as roomy:
        expected = dict(roomy.run(submits))
    with InProcessGroup(folder, num_ranks, max_model_len=64) as tight:
        found = tight.run(submits)
        assert {i: output.tokens for i, output in found.items()} == {
            i: output.tokens for i, output in expected.items()
        }
        assert len(found[0].prompt_logprobs) == (63 if names else 0)


def requests() -> list[Submit]:
    """One a feature, one a pair of features, and plain ones between them."""
    draw = random.Random(9)
    pairs = [pair for pair in itertools.combinations(FEATURES, 2) if set(pair) not in NOT_TOGETHER]
    combinations = [(), *((name,) for name in FEATURES), *pairs, ()]
    submits = []
    for number, names in enumerate(combinations):
        prompt = SHARED[: draw.choice([9, 27])] + [draw.randrange(VOCAB) for _ in range(draw.randint(1, 9))]
        grammar = next((FEATURES[name]["grammar"] for name in names if name in GRAMMARS), None)
        asked = sampling(*names, seed=number)
        submits.append(Submit(0, number, pack_int32(prompt), 0, asked, grammar=grammar))
    return submits


def barred_words(alone: dict[int, Output]) -> list[Submit]:
    """Words of several tokens, taken from what plain requests answer: they would come."""
    submits = []
    for number, submit in enumerate(requests()[:2], start=1000):
        tokens = alone[submit.request].tokens
        prompt = unpack_int32(submit.tokens)
        words = ([prompt[-1], tokens[0]], tokens[1:3], tokens[3:6], [*prompt[-9:], *tokens[:7]])
        rules = replace(PLAIN, barred=tuple(pack_int32(word) for word in words), frequency_penalty=0.1)
        asked = replace(submit.sampling, rules=rules)
        submits.append(replace(submit, request=number, sampling=asked))
    return submits


def answers_alone(folder: Path) -> dict[int, Output]:
    """What each request gets with lookahead 0, alone, on one rank."""
    alone: dict[int, Output] = {}
    with InProcessGroup(folder, lookahead=0, prefix_caching=False) as group:
        group.send(VOCABULARY)
        for submit in requests():
            alone[submit.request] = group.run([submit])[submit.request]
        for submit in barred_words(alone):
            alone[submit.request] = group.run([submit])[submit.request]
    return alone


@pytest.fixture(scope="module")
def oracle(folder: Path) -> dict[int, Output]:
    return answers_alone(folder)


def compare(group: InProcessGroup, oracle: dict[int, Output]) -> None:
    for number, expected in oracle.items():
        got = group.outputs[number]
        assert (got.tokens, got.finish_reason) == (expected.tokens, expected.finish_reason), number
        for rows, wanted in (
            (got.logprobs, expected.logprobs),
            (got.prompt_logprobs, expected.prompt_logprobs),
        ):
            assert len(rows) == len(wanted)
            for (own, top), (wanted_own, wanted_top) in zip(rows, wanted, strict=True):
                assert own == pytest.approx(wanted_own, abs=1e-4)
                assert [token for token, _ in top] == [token for token, _ in wanted_top]
                assert [p for _, p in top] == pytest.approx([p for _, p in wanted_top], abs=1e-4)
    group.scheduler.composer.check_integrity()


def test_every_feature_changes_something(oracle: dict[int, Output]) -> None:
    """Or the comparisons would say nothing of it."""
    silent = {"logprobs", "own logprobs", "prompt logprobs", "min_tokens"}
    submits = requests()
    with_and_without = {}
    for number, name in enumerate(FEATURES, start=1):
        wanted = submits[number].sampling
        assert len(oracle[number].logprobs) == (len(oracle[number].tokens) if wanted.num_logprobs >= 0 else 0)
        with_and_without[name] = oracle[number].tokens
    by_prompt = {submits[0].tokens: oracle[0].tokens}
    assert by_prompt
    assert silent < set(FEATURES)
    for number in (1000, 1001):
        plain, barred = oracle[number - 1000].tokens, oracle[number].tokens
        assert plain != barred
        assert barred[0] != plain[0]


def test_what_is_held_to_a_grammar_is_of_it_whatever_else_is_asked(oracle: dict[int, Output]) -> None:
    fits = {kind.grammar: kind.fits for kind in KINDS}
    reasons, lengths = set(), set()
    for submit in requests():
        output = oracle[submit.request]
        if submit.grammar is not None:
            reasons.add(output.finish_reason)
            if output.tokens[-1] not in STOP_IDS and output.finish_reason == "stop":
                lengths.add(len(output.tokens))
                assert fits[submit.grammar](text_of(output.tokens)), text_of(output.tokens)
    assert reasons == {"stop", "length"}
    assert len(lengths) > 1


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("case", ["prefix hits", "preemption", "captured sizes"])
def test_features_and_pairs_with_overlap(
    folder: Path,
    oracle: dict[int, Output],
    num_ranks: int,
    lookahead: int,
    case: str,
) -> None:
    options: dict[str, Any] = {
        "prefix hits": {},
        "preemption": {"num_kv_blocks": 26},
        "captured sizes": {"prepare": True, "max_num_seqs": 7, "max_num_batched_tokens": 40},
    }[case]
    with InProcessGroup(folder, num_ranks, lookahead=lookahead, check_agreement=True, **options) as group:
        group.send(VOCABULARY)
        group.run([*requests(), *barred_words(oracle)], timeout=180)
        compare(group, oracle)
        assert sum(output.num_cached for output in group.outputs.values()) > 0, "no prefix hit"
        assert (group.scheduler.composer.num_preemptions > 0) == (case == "preemption")


def test_a_restart_goes_on_where_the_client_is(folder: Path, oracle: dict[int, Output]) -> None:
    """Counts, history and the rest follow from prompt and delivered tokens."""
    with InProcessGroup(folder, 2, lookahead=2) as group:
        group.send(VOCABULARY)
        for submit in [*requests(), *barred_words(oracle)]:
            whole = oracle[submit.request]
            delivered = whole.tokens[: submit.request % len(whole.tokens)]
            known = [*unpack_int32(submit.tokens), *delivered]
            group.send(replace(submit, tokens=pack_int32(known), num_delivered=len(delivered)))
            group.outputs[submit.request].tokens = list(delivered)
            group.outputs[submit.request].logprobs = whole.logprobs[: len(delivered)]
            if delivered:  # what is told of a prompt has come before them
                group.outputs[submit.request].prompt_logprobs = whole.prompt_logprobs
        group.wait(180)
        compare(group, oracle)
