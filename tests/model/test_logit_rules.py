"""Penalties, bias, allowed tokens and barred words: what transformers' processors make of the same logits."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from tests.model.test_sampling import logits_of
from tests.rank.test_logit_state import NO_RULES, of_rows
from tpworker.ipc.arrays import pack_float32, pack_int32, unpack_int32
from tpworker.ipc.messages import MAX_BARRED, MAX_BARRED_LENGTH, MAX_BIAS, LogitRules
from tpworker.kernels.operands import IN_PROMPT
from tpworker.model.logit_rules import adjust, count_tokens

VOCAB = 70  # neither a multiple of 32 nor of the number of ranks


def no_drafts(count: int) -> Tensor:
    """For so many slots."""
    return torch.zeros(count, 0, dtype=torch.int64)


def bias_of(bias: dict[int, float]) -> dict[str, bytes]:
    return {"bias_ids": pack_int32(bias), "bias": pack_float32(bias.values())}


def words_of(*words: Sequence[int]) -> dict[str, tuple[bytes, ...]]:
    return {"barred": tuple(pack_int32(word) for word in words)}


def parts(vocab_size: int, size: int) -> list[tuple[int, int]]:
    """First token and number of tokens of each rank, the last ones with padding."""
    local = -(-vocab_size // size)
    return [(rank * local, local) for rank in range(size)]


def adjusted(
    logits: Tensor, rules: Sequence[LogitRules | None], known: Sequence[list[int]], prompt: int, size: int = 1
) -> Tensor:
    """[R, V]: what the ranks make of logits [R, V], put together; row r has these rules and known tokens."""
    count, vocab_size = logits.shape
    slots = torch.arange(count)
    positions = torch.tensor([len(tokens) for tokens in known])
    found = []
    for start, local in parts(vocab_size, size):
        state = of_rows(rules, known, prompt, start, local)
        part = torch.full((count, local), -math.inf)
        here = logits[:, start : start + local]
        part[:, : here.shape[1]] = here
        before = part.clone()
        found.append(adjust(part, slots, positions, state.tables, no_drafts(count)))
        same_bits = torch.equal(part.view(torch.int32), before.view(torch.int32))
        assert same_bits, "the logits were changed"
        assert found[-1].dtype == torch.float32
    return torch.cat(found, dim=1)[:, :vocab_size]


def sequences(count: int, length: int, vocab_size: int = VOCAB, seed: int = 3) -> list[list[int]]:
    """Few different tokens, so that many come again."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size // 3) * 2 for _ in range(length)] for _ in range(count)]


def openai_penalties(
    logits: Tensor, known: Sequence[list[int]], prompt: int, presence: float, frequency: float
) -> Tensor:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c of the output alone."""
    expected = logits.clone()
    for row, tokens in enumerate(known):
        output = tokens[prompt:]
        for token in range(logits.shape[1]):
            count = output.count(token)
            expected[row, token] -= count * frequency + float(count > 0) * presence
    return expected


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("penalty", [0.01, 0.7, 1.3, 100.0])
def test_repetition_is_transformers(size: int, penalty: float) -> None:
    """Prompt and output alike, zeros and infinities too."""
    logits, known = logits_of(6, VOCAB), sequences(6, 20)
    logits[:, 4], logits[:, 6], logits[0, 8] = 0.0, -0.0, -math.inf
    found = adjusted(logits, [replace(NO_RULES, repetition_penalty=penalty)] * 6, known, 11, size)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(known), logits.clone())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert not torch.equal(found, logits)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-2.0, 2.0), (0.3, -0.2)])
def test_presence_and_frequency_are_openais(size: int, presence: float, frequency: float) -> None:
    """Of the output alone: what only the prompt holds keeps its logit."""
    logits, known = logits_of(5, VOCAB), sequences(5, 30)
    rules = replace(NO_RULES, presence_penalty=presence, frequency_penalty=frequency)
    found = adjusted(logits, [rules] * 5, known, 12, size)
    torch.testing.assert_close(found, openai_penalties(logits, known, 12, presence, frequency))
    of_prompt_alone = set(known[0][:12]) - set(known[0][12:])
    assert of_prompt_alone
    assert torch.equal(found[0, list(of_prompt_alone)], logits[0, list(of_prompt_alone)])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 40, VOCAB])
def test_bias_is_transformers(size: int, count: int) -> None:
    """Token 0 too, at which what is filled up aims."""
    logits, known = logits_of(3, VOCAB), sequences(3, 4)
    ids = random.Random(count).sample(range(1, VOCAB), count - 1)
    bias = {token: (-1.0) ** token * (token + 1) for token in [0, *ids]}
    found = adjusted(logits, [replace(NO_RULES, **bias_of(bias))] * 3, known, 4, size)
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    torch.testing.assert_close(found, processor(torch.tensor(known), logits.clone()))


def test_as_many_biases_as_there_may_be() -> None:
    logits = logits_of(2, 3000)
    bias = dict.fromkeys(range(0, 2 * MAX_BIAS, 2), 1.0)
    found = adjusted(logits, [replace(NO_RULES, **bias_of(bias)), None], sequences(2, 4), 4, 2)
    expected = logits.clone()
    expected[0, : 2 * MAX_BIAS : 2] += 1.0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("allowed", [[0], [31], [32], [69], [5, 5, 64], list(range(VOCAB))])
def test_nothing_but_what_is_allowed(size: int, allowed: list[int]) -> None:
    """At both ends of the words of bits, and of the ranks' parts."""
    logits = logits_of(2, VOCAB)
    found = adjusted(
        logits, [replace(NO_RULES, allowed_ids=pack_int32(allowed)), None], sequences(2, 4), 4, size
    )
    expected = torch.full((VOCAB,), -math.inf)
    expected[allowed] = logits[0, allowed]
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], logits[1])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 3, 16, 33, 40])
def test_barred_words_are_transformers(size: int, length: int) -> None:
    """Words whose beginning stands at the end, or nearly; of one token; longer than the sequence; all.
    Sequences shorter than a word, and longer than what is remembered."""
    logits, known = logits_of(4, VOCAB), sequences(4, length)
    draw = random.Random(length)
    words: list[list[int]] = [[draw.randrange(VOCAB)] for _ in range(5)]
    for tokens in known:
        for count in range(1, min(MAX_BARRED_LENGTH, len(tokens) + 1)):
            words.append([*tokens[-count:], draw.randrange(VOCAB)])
            words.append([*tokens[-count:-1], 1, draw.randrange(VOCAB)])  # 1 is in no sequence
    words += [[draw.randrange(VOCAB) for _ in range(MAX_BARRED_LENGTH)] for _ in range(3)]
    words = [list(word) for word in dict.fromkeys(map(tuple, words))]
    several = [word for word in words if len(word) > 1][:MAX_BARRED]
    words = [word for word in words if len(word) == 1] + several
    found = adjusted(logits, [replace(NO_RULES, **words_of(*words))] * 4, known, length, size)
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=[VOCAB + 5])
    expected = processor(torch.tensor(known), logits.clone())
    assert torch.equal(found, expected)
    assert found.isinf().sum() > 5 * 4, "no word of several tokens was barred"


def test_as_many_words_as_there_may_be_and_the_longest() -> None:
    logits, tokens = logits_of(1, 3000), list(range(100, 140))
    words = [[*tokens[1 - MAX_BARRED_LENGTH :], token] for token in range(MAX_BARRED)]
    found = adjusted(logits, [replace(NO_RULES, **words_of(*words))], [tokens], 40, 2)
    assert found[0].isinf().nonzero()[:, 0].tolist() == list(range(MAX_BARRED))


def test_a_word_does_not_begin_before_the_sequence() -> None:
    """Nor with what stood in the history of whoever had the slot before."""
    rules = replace(NO_RULES, **words_of([0, 7], [5, 0, 7], [0, 0, 7]))
    found = adjusted(torch.zeros(1, VOCAB), [rules], [[0]], 1)
    assert found[0].isinf().nonzero()[:, 0].tolist() == [7]
    found = adjusted(torch.zeros(1, VOCAB), [replace(NO_RULES, **words_of([5, 0, 7], [0, 0, 7]))], [[0]], 1)
    assert not found.isinf().any()


COMBINED: dict[str, LogitRules] = {
    "bias, penalties": replace(
        NO_RULES,
        repetition_penalty=1.8,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        **bias_of({token: 3.0 - token % 7 for token in range(0, VOCAB, 2)}),
    ),
    "penalties, allowed": replace(
        NO_RULES, repetition_penalty=1.8, frequency_penalty=1.0, allowed_ids=pack_int32(range(0, VOCAB, 3))
    ),
    "allowed, barred": replace(NO_RULES, allowed_ids=pack_int32(range(40)), **words_of([4], [60])),
    "all": LogitRules(
        0.6, -1.0, 0.5,
        **bias_of({token: -5.0 + token % 11 for token in range(30)}),
        allowed_ids=pack_int32(range(2, VOCAB)), **words_of([4], [8]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", COMBINED)
def test_together_they_are_applied_in_vllms_order(size: int, name: str) -> None:
    """Bias, then repetition, then frequency and presence; what is forbidden stays so whatever is added."""
    rules = COMBINED[name]
    logits, known = logits_of(5, VOCAB), sequences(5, 26)
    found = adjusted(logits, [rules] * 5, known, 12, size)
    expected = logits.clone()
    bias = np.zeros(VOCAB, np.float32)
    bias[np.frombuffer(rules.bias_ids, np.int32)] = np.frombuffer(rules.bias, np.float32)
    expected += torch.from_numpy(bias)
    expected = RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)(torch.tensor(known), expected)
    expected = openai_penalties(expected, known, 12, rules.presence_penalty, rules.frequency_penalty)
    if rules.allowed_ids is not None:
        forbidden = set(range(VOCAB)) - set(unpack_int32(rules.allowed_ids))
        expected[:, list(forbidden)] = -math.inf
    for word in rules.barred:
        expected[:, int.from_bytes(word, "little")] = -math.inf
    torch.testing.assert_close(found, expected)


def test_another_order_would_be_seen() -> None:
    """Penalties before the bias give something else, so that the test above can tell."""
    logits, known = torch.full((1, VOCAB), -1.0), [[4, 4]]
    rules = replace(NO_RULES, repetition_penalty=2.0, presence_penalty=1.0, **bias_of({4: 3.0}))
    assert adjusted(logits, [rules], known, 1)[0, 4].item() == (-1 + 3) / 2 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_rules_stay_bit_by_bit(dtype: torch.dtype) -> None:
    """NaN, infinities and zeros of both signs too, whatever the tables of their slots hold."""
    logits = logits_of(4, VOCAB).to(dtype)
    logits[1, :6] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7], dtype=dtype)
    state = of_rows([COMBINED["all"]] * 4, sequences(4, 20), 10, 0, VOCAB)
    state.tables.uses[1] = 0
    found = adjust(logits, torch.tensor([0, 1, 2, 1]), torch.full((4,), 20), state.tables, no_drafts(4))
    same = torch.equal
    assert same(found[1].view(torch.int32), logits[1].float().view(torch.int32))
    assert same(found[3], logits[3].float())
    assert not same(found[2], logits[2].float())


@pytest.mark.parametrize("name", COMBINED)
def test_nan_stays_nan(name: str) -> None:
    """What is broken must be seen: no rule turns it into a token that was chosen."""
    logits, known = torch.full((2, VOCAB), math.nan), sequences(2, 20)
    found = adjusted(logits, [COMBINED[name]] * 2, known, 10)
    allowed = adjusted(torch.zeros(2, VOCAB), [COMBINED[name]] * 2, known, 10).isfinite()
    assert allowed.any()
    assert torch.equal(found.isnan(), allowed)


def test_rows_are_adjusted_by_their_own_slots() -> None:
    """In any order, and each as if it were alone."""
    rules = [*COMBINED.values(), None, replace(NO_RULES, **words_of([2, 9], [4, 9], [6, 9]))]
    logits, known = logits_of(len(rules), VOCAB), sequences(len(rules), 20)
    state = of_rows(rules, known, 9, 0, VOCAB)
    together = adjust(
        logits, torch.arange(len(rules)), torch.full((len(rules),), 20), state.tables, no_drafts(len(rules))
    )
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    shuffled = adjust(
        logits[order], order, torch.full((len(rules),), 20), state.tables, no_drafts(len(rules))
    )
    assert torch.equal(shuffled, together[order])
    for row, rule in enumerate(rules):
        alone = adjusted(logits[row : row + 1], [rule], known[row : row + 1], 9)
        assert torch.equal(alone[0], together[row])


# ------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_is_chosen_is_counted_as_if_it_had_been_known(size: int) -> None:
    """Step by step, past the end of what is remembered: the tables of an admission with all of it."""
    rules = [COMBINED["all"], replace(NO_RULES, presence_penalty=1.0, **words_of([1, 2]))] * 2
    known = sequences(4, 50)
    for start, local in parts(VOCAB, size):
        stepwise = of_rows(rules, [tokens[:7] for tokens in known], 7, start, local)
        for position in range(7, 50):
            order = torch.tensor([2, 0, 3, 1])
            chosen = torch.tensor([known[slot][position] for slot in order])
            count_tokens(order, chosen, torch.full((4,), position), stepwise.tables)
        whole = of_rows(rules, known, 7, start, local)
        for name in ("counts", "uses", "penalties", "allowed", "bias_ids", "bias", "barred"):
            found, expected = getattr(stepwise.tables, name)[:4], getattr(whole.tables, name)[:4]
            assert torch.equal(found, expected), name
        of_words = [1, 3]  # others' history is not looked at
        assert torch.equal(stepwise.tables.history[of_words], whole.tables.history[of_words])


def test_tokens_by_logits_that_are_nan_are_counted_too() -> None:
    """They are marked (~token), and stand in the sequence as the token."""
    state = of_rows([replace(NO_RULES, presence_penalty=1.0)] * 2, [[3], [3]], 1, 0, VOCAB)
    count_tokens(torch.tensor([0, 1]), torch.tensor([~9, 9]), torch.tensor([1, 1]), state.tables)
    assert torch.equal(state.tables.counts[0], state.tables.counts[1])
    assert state.tables.counts[0].nonzero()[:, 0].tolist() == [3, 9]
    assert state.tables.counts[0, 3] == IN_PROMPT


def test_padding_may_be_counted_in_the_null_slot() -> None:
    """As often as there is padding: no other slot, and no error."""
    state = of_rows([replace(NO_RULES, presence_penalty=1.0)] * 2, [[3], [3]], 1, 0, VOCAB)
    before = state.tables.counts[:2].clone()
    count_tokens(torch.tensor([2] * 5), torch.tensor([0, 0, 4, 4, 69]), torch.zeros(5).long(), state.tables)
    assert torch.equal(state.tables.counts[:2], before)


def test_no_rows() -> None:
    state = of_rows([COMBINED["all"]], [[3]], 1, 0, VOCAB)
    none = torch.zeros(0, dtype=torch.int64)
    assert adjust(torch.zeros(0, VOCAB), none, none, state.tables, no_drafts(0)).shape == (0, VOCAB)
    count_tokens(none, none, none, state.tables)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_behind_drafts_it_is_as_if_they_had_been_counted(size: int) -> None:
    """Every rule, at once and apart; drafts that come twice, that barred words are made of, of each rank."""
    words = tuple(pack_int32(word) for word in ([4, 6], [6, 8, 4], [2, 4, 6, 8]))
    barred = replace(NO_RULES, barred=words)
    penalised = replace(NO_RULES, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)
    rules = [replace(penalised, barred=words), penalised, barred, None]
    known = [[9, 3, 2, 5, 2], [4, 4, 6, 1, 2], [1, 1, 7, 2, 4], [2, 4, 6, 8, 2]]
    drafts = torch.tensor([[4, 6, 8], [6, 6, 9], [6, 8, 4], [4, 6, 8]])
    count, width = drafts.shape[0], 1 + drafts.shape[1]
    logits = logits_of(count * width, VOCAB)
    slots, place = torch.arange(count), torch.arange(width)
    positions = (torch.tensor([len(tokens) for tokens in known])[:, None] + place).flatten()
    changed = 0
    for start, local in parts(VOCAB, size):
        part = torch.zeros(len(logits), local)
        here = logits[:, start : start + local]
        part[:, : here.shape[1]] = here
        state = of_rows(rules, known, 3, start, local)
        found = adjust(part, slots, positions, state.tables, drafts).view(count, width, -1)
        plain = adjust(part[::width], slots, positions[::width], state.tables, no_drafts(count))
        for number in range(width):
            rows = part.view(count, width, -1)[:, number]
            at = positions.view(count, width)[:, number]
            expected = adjust(rows, slots, at, state.tables, no_drafts(count))
            torch.testing.assert_close(found[:, number], expected, rtol=0, atol=1e-6)
            if number < width - 1:
                count_tokens(slots, drafts[:, number], at, state.tables)
        assert torch.equal(found[:, 0], plain)
        changed += int((found - part.view(count, width, -1))[:, 1:].nan_to_num(-1).ne(0).sum())
    assert changed > 20


def test_missing_drafts_count_for_nothing() -> None:
    rules = replace(NO_RULES, frequency_penalty=0.5)
    state = of_rows([rules], [[1, 2, 3]], 1, 0, VOCAB)
    logits = torch.zeros(3, VOCAB)
    found = adjust(logits, torch.tensor([0]), torch.tensor([3, 4, 5]), state.tables, torch.tensor([[-1, -1]]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
