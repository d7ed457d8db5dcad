"""Sampling: exact sets, exact noise, right distributions, the same on every rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper

from tests.model.helpers import run_ranks
from tpworker.kernels.operands import SamplingRows
from tpworker.model import sampling, torch_operations
from tpworker.model.sampling import SamplingMode, gumbel_noise, sample
from tpworker.model.tp import Collectives
from tpworker.rank.slots import SlotTable

GREEDY = SamplingMode(random=False, truncate=False, suppress=False)
RANDOM = SamplingMode(random=True, truncate=False, suppress=False)
TRUNCATED = SamplingMode(random=True, truncate=True, suppress=False)
ALL = SamplingMode(random=True, truncate=True, suppress=True)


def rows_of(
    count: int,
    temperature: float | Sequence[float] = 1.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    seed: Tensor | None = None,
    position: int | Sequence[int] = 7,
    min_length: int | Sequence[int] = 0,
    stop_ids: Sequence[Sequence[int]] = ((-1,),),
    min_p: float | Sequence[float] = 0.0,
) -> SamplingRows:
    """`count` rows; single values hold for all of them, seeds count up."""

    def column(value: object, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value, dtype=dtype).expand(count).clone()

    return SamplingRows(
        temperature=column(temperature, torch.float32),
        top_p=column(top_p, torch.float32),
        top_k=column(top_k, torch.int64),
        seed=torch.arange(count) if seed is None else seed,
        position=column(position, torch.int64),
        min_length=column(min_length, torch.int64),
        stop_ids=torch.tensor(stop_ids).expand(count, -1).clone(),
        log_min_p=column(min_p, torch.float32).log(),
    )


def through_slots(rows: SamplingRows, mode: SamplingMode, device: torch.device | None = None) -> SamplingRows:
    """These rows as a rank has them: gathered from its slot table, without what the mode does not look at."""
    count = len(rows.seed)
    table = SlotTable(count, 1, device or torch.device("cpu"))
    for field in fields(rows):
        column = getattr(rows, field.name)
        if field.name == "position":  # of the token to come, behind the one where a slot stands
            table.state.position[:count] = column - 1
            continue
        there = getattr(table, field.name)[:count]
        (there[:, : column.shape[1]] if column.dim() == 2 else there).copy_(column)
    gathered = table.sampling_rows(torch.arange(count, device=device), 1, mode)
    if mode == GREEDY:
        assert not any(len(getattr(gathered, field.name)) for field in fields(gathered))
    return gathered


def sample_at(size: int, logits: Tensor, rows: SamplingRows, mode: SamplingMode) -> Tensor:
    """Split logits [R, V] over `size` ranks, padded with -inf, and sample. All ranks must agree."""
    count, vocab_size = logits.shape
    local = -(-vocab_size // size)
    local = -(-local // 8) * 8
    full = torch.full((count, size * local), -math.inf)
    full[:, :vocab_size] = logits
    there = through_slots(rows, mode)

    def main(collectives: Collectives) -> Tensor:
        start = collectives.rank * local
        part = full[:, start : start + local].clone()
        return sample(torch_operations, part, there, mode, start, collectives)

    results = run_ranks(size, main)
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].dtype == torch.int64
    assert int(results[0].max()) < vocab_size
    return results[0]


def reference_set(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> list[int]:
    """The tokens that may be chosen, by the definition, in float64 and plain Python."""
    scaled = (logits / temperature).double().tolist()
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    order = [token for token in order if math.exp(scaled[token] - scaled[order[0]]) >= min_p]
    if top_k:
        order = order[:top_k]
    weights = [math.exp(scaled[token] - scaled[order[0]]) for token in order]
    total, before, kept = sum(weights), 0.0, []
    for token, weight in zip(order, weights, strict=True):
        if kept and top_p < 1 and before >= top_p * total:
            break
        kept.append(token)
        before += weight
    return kept


def reference_tokens(logits: Tensor, rows: SamplingRows) -> list[int]:
    """Row by row, the highest of logit / temperature + noise in the row's set."""
    tokens = []
    for row, row_logits in enumerate(logits):
        temperature = float(rows.temperature[row])
        if temperature == 0:
            tokens.append(int(row_logits.argmax()))
            continue
        min_p = math.exp(float(rows.log_min_p[row]))
        kept = reference_set(row_logits, temperature, int(rows.top_k[row]), float(rows.top_p[row]), min_p)
        noise = gumbel_noise(
            rows.seed[row : row + 1], rows.position[row : row + 1], torch.arange(len(row_logits))
        )[0]
        scores = (row_logits / temperature + noise).tolist()
        tokens.append(max(kept, key=lambda token: (scores[token], -token)))
    return tokens


def logits_of(count: int, vocab_size: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic, per degree of freedom; rare tokens are put together."""
    counts = tokens.bincount(minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] == 0:
        assert counts[-1] == 0
        counts, expected = counts[:-1], expected[:-1]
    return float(((counts - expected) ** 2 / expected).sum() / (len(expected) - 1))


# -------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("size", [1, 2, 3])
def test_greedy(size: int) -> None:
    logits = logits_of(9, 50)
    assert torch.equal(sample_at(size, logits, rows_of(9, 0.0), GREEDY), logits.argmax(-1))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", [GREEDY, ALL])
def test_of_equal_logits_the_lowest_id_is_taken(size: int, mode: SamplingMode) -> None:
    logits = torch.zeros(3, 40)
    logits[1, [7, 8, 39]] = 1.0
    logits[2, [20, 30]] = 1.0
    assert sample_at(size, logits, rows_of(3, 0.0), mode).tolist() == [0, 7, 20]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("mode", [GREEDY, RANDOM, TRUNCATED])
def test_tokens_by_logits_that_are_nan_are_marked(size: int, mode: SamplingMode) -> None:
    """Of the row that has them alone, whichever rank has them: ~token of the first."""
    logits, rows = logits_of(4, 50), rows_of(4, 1.0, top_p=0.5, top_k=7)
    expected = sample_at(size, logits, rows, mode)
    logits[1, [41, 30]] = math.nan
    logits[2] = -math.nan
    tokens = sample_at(size, logits, rows, mode)
    assert tokens[[1, 2]].tolist() == [~30, ~0]
    assert torch.equal(tokens[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("mode", [RANDOM, TRUNCATED])
def test_a_greedy_row_among_random_ones_is_greedy(mode: SamplingMode) -> None:
    logits = logits_of(60, 50, scale=0.01)
    rows = rows_of(60, [0.0, 1.0] * 30, top_p=[0.5, 0.9] * 30, top_k=[7, 20] * 30)
    tokens = sample_at(2, logits, rows, mode)
    best = logits.argmax(-1)
    assert torch.equal(tokens[::2], best[::2])
    assert not torch.equal(tokens[1::2], best[1::2])


def test_a_temperature_near_zero_is_greedy_and_finite() -> None:
    logits = logits_of(30, 50, scale=1e4)
    assert torch.equal(sample_at(1, logits, rows_of(30, 1e-30), ALL), logits.argmax(-1))


# ---------------------------------------------------------------------------- exact and random


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_tokens_are_the_definitions(size: int, temperature: float) -> None:
    logits = logits_of(40, 300)
    rows = rows_of(40, temperature)
    assert sample_at(size, logits, rows, RANDOM).tolist() == reference_tokens(logits, rows)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("vocab_size", [30, 300, 3000])
def test_top_k_and_top_p_are_the_definitions(size: int, vocab_size: int) -> None:
    """Every combination, sets of one token up to nearly all, rows without a limit and greedy ones between."""
    choices = [
        (temperature, top_k, top_p)
        for temperature in (0.0, 0.2, 1.0, 20.0)
        for top_k in (0, 1, 2, 5, 29, 255, 256, 257, 320, 700, 10**6)
        for top_p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)
    ]
    temperatures, top_ks, top_ps = zip(*choices, strict=True)
    logits = logits_of(len(choices), vocab_size, seed=vocab_size)
    rows = rows_of(len(choices), temperatures, top_ps, top_ks)
    assert sample_at(size, logits, rows, TRUNCATED).tolist() == reference_tokens(logits, rows)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("vocab_size", [30, 300, 3000])
def test_min_p_with_all_others_is_the_definition(size: int, vocab_size: int) -> None:
    choices = list(
        itertools.product(
            (0.0, 0.2, 1.0, 20.0), (0, 1, 5, 255, 256, 257, 700), (0.1, 0.9, 1.0), (0.0, 0.003, 0.2, 0.7, 1.0)
        )
    )
    temperatures, top_ks, top_ps, min_ps = zip(*choices, strict=True)
    logits = logits_of(len(choices), vocab_size, seed=vocab_size)
    rows = rows_of(len(choices), temperatures, top_ps, top_ks, min_p=min_ps)
    assert sample_at(size, logits, rows, TRUNCATED).tolist() == reference_tokens(logits, rows)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("vocab_size", [254, 255, 256, 257, 258, 3000])
@pytest.mark.parametrize("num_left", [1, 2, 254, 255, 256, 257, 258, 2000])
def test_min_p_sets_of_as_many_tokens_as_are_looked_at_first(
    size: int, vocab_size: int, num_left: int
) -> None:
    """One more and one less, with top_k and top_p that end before, at and after it; some of the set's least
    likely tokens are equal, and so are those just outside."""
    num_left = min(num_left, vocab_size)
    places = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(num_left))
    logits = torch.full((vocab_size,), -9.0)
    logits[places[:num_left]] = (torch.arange(num_left) % 5).float() * 0.1
    choices = list(itertools.product((0, 1, 255, 256, 257), (1.0, 0.99, 0.5), (0.3, 1e-9)))
    top_ks, top_ps, min_ps = zip(*choices, strict=True)
    seed = torch.arange(len(choices))
    for round_ in range(4):
        rows = rows_of(len(choices), 1.0, top_ps, top_ks, seed=seed + 1000 * round_, min_p=min_ps)
        together = logits.expand(len(choices), -1)
        tokens = sample_at(size, together, rows, TRUNCATED).tolist()
        assert tokens == reference_tokens(together, rows)
        left = set(places[:num_left].tolist())
        assert all(token in left for token, min_p in zip(tokens, min_ps, strict=True) if min_p == 0.3)


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("vocab_size", [60, 2000])
def test_min_p_alone_is_transformers(
    min_p: float, temperature: float, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of the set can be chosen and no other: noise that prefers each in turn."""
    logits = logits_of(1, vocab_size, seed=5)
    left = MinPLogitsWarper(min_p)(torch.zeros(1, 1, dtype=torch.int64), logits / temperature)[0].isfinite()
    monkeypatch.setattr(sampling, "gumbel_noise", lambda seed, position, ids: 1000.0 * (ids == seed[:, None]))
    rows = rows_of(vocab_size, temperature, min_p=min_p)  # seeds count up: row i prefers token i
    tokens = sample_at(1, logits.expand(vocab_size, -1), rows, TRUNCATED)
    assert torch.equal(tokens == torch.arange(vocab_size), left)


def test_min_p_is_of_the_likeliest_after_temperature() -> None:
    """Half as likely at temperature 1 is a quarter at 0.5."""
    logits = torch.tensor([0.5, 0.25, 0.125]).log().expand(300, -1)
    assert set(sample_at(1, logits, rows_of(300, min_p=0.4), TRUNCATED).tolist()) == {0, 1}
    assert set(sample_at(1, logits, rows_of(300, 0.5, min_p=0.4), TRUNCATED).tolist()) == {0}
    assert set(sample_at(1, logits, rows_of(300, 2.0, min_p=0.4), TRUNCATED).tolist()) == {0, 1, 2}


def test_top_p_counts_within_min_p() -> None:
    """0.4, 0.3, 0.2, 0.1: of the first two, 0.57 and 0.43, a top_p of 0.55 leaves the first alone."""
    logits = torch.tensor([0.2, 0.4, 0.1, 0.3]).log().expand(300, -1)
    assert set(sample_at(1, logits, rows_of(300, top_p=0.55), TRUNCATED).tolist()) == {1, 3}
    assert set(sample_at(1, logits, rows_of(300, top_p=0.55, min_p=0.6), TRUNCATED).tolist()) == {1}


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(st.integers(-3, 3), min_size=2, max_size=20),
    repeats=st.sampled_from([1, 40]),
    top_k=st.integers(0, 25),
    top_p=st.floats(2**-7, 1.0, width=32),
    temperature=st.floats(0.125, 10, width=32),
)
def test_sets_with_equal_logits_take_the_lowest_ids(
    values: list[int], repeats: int, top_k: int, top_p: float, temperature: float
) -> None:
    """Coarse logits, as bfloat16 has them: many are equal, also at the end of a set."""
    logits = torch.tensor(values, dtype=torch.float32).repeat(repeats)
    kept = reference_set(logits, temperature, top_k, top_p)
    weights = torch.softmax(logits[kept].double() / temperature, 0)
    total = torch.softmax(logits.double() / temperature, 0) if not top_k else weights
    edges = total.sort(descending=True).values.cumsum(0)
    assume(top_p == 1 or float((edges - top_p).abs().min()) > 1e-5)  # float32 may cut a token later
    count = 200
    tokens = sample_at(2, logits.expand(count, -1), rows_of(count, temperature, top_p, top_k), TRUNCATED)
    rows = rows_of(count, temperature, top_p, top_k)
    assert tokens.tolist() == reference_tokens(logits.expand(count, -1), rows)


def test_top_p_counts_within_top_k() -> None:
    """0.5, 0.3, 0.2: the top two alone are 0.625 and 0.375, so a top_p of 0.6 leaves only the first."""
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(200, -1)
    assert set(sample_at(1, logits, rows_of(200, top_p=0.6), TRUNCATED).tolist()) == {1, 2}
    assert set(sample_at(1, logits, rows_of(200, top_p=0.6, top_k=2), TRUNCATED).tolist()) == {1}


def test_without_a_top_p_even_the_least_likely_token_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of float32 could lose it, at some sizes; noise that always prefers it would show that."""
    noise = lambda seed, position, ids: 100.0 * (ids == 17).expand(len(seed), -1)  # noqa: E731
    monkeypatch.setattr(sampling, "gumbel_noise", noise)
    for vocab_size in range(260, 300):
        logits = torch.zeros(1, vocab_size)
        logits[0, 17] = -25.0  # 1e-11 of the others
        assert sample_at(1, logits, rows_of(1, top_k=1000), TRUNCATED).item() == 17
        assert sample_at(1, logits, rows_of(1, top_k=1000, top_p=0.99999), TRUNCATED).item() != 17


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (3.0, 0, 1.0), (1.0, 12, 0.9)]
)
def test_the_distribution_is_softmax(temperature: float, top_k: int, top_p: float) -> None:
    count = 40_000
    logits = logits_of(1, 60, scale=1.5)[0]
    kept = reference_set(logits, temperature, top_k, top_p)
    probabilities = torch.zeros(60, dtype=torch.float64)
    probabilities[kept] = torch.softmax(logits[kept].double() / temperature, 0)
    rows = rows_of(count, temperature, top_p, top_k)
    tokens = sample_at(2, logits.expand(count, -1), rows, TRUNCATED if top_k else RANDOM)
    assert chi_square(tokens, probabilities) < 1.6
    wrong = torch.softmax(logits.double() / (1.3 * temperature), 0)
    assert chi_square(tokens, wrong) > 3  # so the test can tell


def test_positions_of_one_seed_are_as_good_as_seeds() -> None:
    count = 40_000
    logits = logits_of(1, 60, scale=1.5)[0]
    rows = rows_of(count, seed=torch.full((count,), 11), position=range(count))
    tokens = sample_at(1, logits.expand(count, -1), rows, RANDOM)
    assert chi_square(tokens, torch.softmax(logits, 0)) < 1.6
    pairs = tokens[:-1] * 60 + tokens[1:]  # what follows what
    both = torch.softmax(logits, 0)
    assert chi_square(pairs, torch.outer(both, both).flatten()) < 1.3


def test_a_token_depends_on_its_logits_seed_and_position_alone() -> None:
    logits = logits_of(30, 400)
    choices = {
        "temperature": [0.0, 0.7, 1.0] * 10,
        "top_p": [1.0, 0.9, 1.0, 0.5, 1.0] * 6,
        "top_k": [0, 0, 3] * 10,
    }
    together = sample_at(2, logits, rows_of(30, **choices), TRUNCATED)
    for row in range(30):
        one = {name: values[row] for name, values in choices.items()}
        alone = sample_at(1, logits[row : row + 1], rows_of(1, **one, seed=torch.tensor([row])), TRUNCATED)
        assert alone[0] == together[row]
    moved = sample_at(2, logits, rows_of(30, **choices, position=8), TRUNCATED)
    greedy = torch.tensor(choices["temperature"]) == 0
    assert torch.equal(moved[greedy], together[greedy])
    assert not torch.equal(moved[~greedy], together[~greedy])


def test_unlimited_rows_exchange_one_pair_a_row() -> None:
    def main(collectives: Collectives) -> int:
        logits, start = torch.randn(5, 1000), collectives.rank * 1000
        sample(torch_operations, logits, rows_of(5), RANDOM, start, collectives)
        return collectives.gathered_bytes  # type: ignore[attr-defined, no-any-return]

    assert run_ranks(2, main) == [2 * 5 * 8] * 2


# --------------------------------------------------------------------------------- suppression


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_ids_are_suppressed_below_the_minimum_length(size: int, temperature: float) -> None:
    logits = logits_of(1, 40)[0]
    order = logits.argsort(descending=True).tolist()
    logits[order[:3]] += 20  # nothing else would be chosen
    rows = rows_of(
        6, temperature, position=range(5, 11), min_length=8, stop_ids=[[order[0], order[1], order[2], -1]]
    )
    tokens = sample_at(size, logits.expand(6, -1), rows, ALL).tolist()
    assert not set(tokens[:3]) & set(order[:3])
    assert set(tokens[3:]) <= set(order[:3])
    if temperature == 0:
        assert tokens == [order[3]] * 3 + [order[0]] * 3


@pytest.mark.parametrize("size", [1, 2])
def test_suppression_touches_nothing_else(size: int) -> None:
    """Rows above their minimum and empty stop ids aim at column 0, which must keep its logit."""
    logits = torch.zeros(4, 16)
    logits[:, 0], logits[:, 8] = 2.0, 3.0
    rows = rows_of(4, 0.0, position=1, min_length=[5, 5, 0, 5], stop_ids=[[-1, -1], [8, -1], [8, 0], [8, 0]])
    assert sample_at(size, logits, rows, ALL).tolist() == [8, 0, 8, 1]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.5), (2, 0.5)])
def test_when_everything_is_suppressed_there_is_still_a_token(
    size: int, temperature: float, top_k: int, top_p: float
) -> None:
    rows = rows_of(5, temperature, top_p, top_k, min_length=100, stop_ids=[list(range(11))])
    tokens = sample_at(size, logits_of(5, 11), rows, ALL)
    assert tokens.tolist() == [0] * 5


@pytest.mark.parametrize("size", [2, 4, 8])
def test_padding_never_wins(size: int) -> None:
    """17 tokens over up to 8 ranks of 8: some have one real token, others none."""
    logits = torch.full((200, 17), -1e30)
    rows = rows_of(200, temperature=100.0, top_p=0.9, top_k=20)
    for mode in (GREEDY, RANDOM, TRUNCATED):
        assert int(sample_at(size, logits, rows, mode).max()) < 17


# --------------------------------------------------------------------------------------- noise

MASK = (1 << 64) - 1


def splitmix64(z: int) -> int:
    """Vigna's reference (prng.di.unimi.it/splitmix64.c), without its state."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


GAMMA = 0x9E3779B97F4A7C15


def reference_noise(seed: int, position: int, token: int) -> tuple[float, float]:
    """The uniform number and the noise, in Python's unsigned integers and float64."""
    key = splitmix64((splitmix64((seed + GAMMA) & MASK) + position * GAMMA) & MASK)
    bits = splitmix64((key + (token + 1) * GAMMA) & MASK) & (MASK >> 1)
    uniform = min(max(bits, 1) / 2**63, 1 - 2**-24)
    return uniform, -math.log(-math.log1p(-uniform))


@settings(deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**22),
    token=st.integers(0, 2**20),
)
def test_noise_is_splitmix64(seed: int, position: int, token: int) -> None:
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), torch.tensor([token]))
    uniform, expected = reference_noise(seed, position, token)
    # near uniform = 1, float32 has 24 bits of 1 - uniform only
    assert float(noise) == pytest.approx(expected, rel=1e-5, abs=max(1e-5, 2**-24 / (1 - uniform)))


def test_large_noise_is_as_precise_as_small() -> None:
    """It decides which token wins, and comes from uniform numbers of 1e-5 and less."""
    noise = gumbel_noise(torch.tensor([5]), torch.tensor([9]), torch.arange(200_000))[0]
    largest = noise.topk(20)
    for value, token in zip(largest.values.tolist(), largest.indices.tolist(), strict=True):
        uniform, expected = reference_noise(5, 9, token)
        assert uniform < 2e-4
        assert value == pytest.approx(expected, rel=1e-6)


def test_noise_is_the_same_wherever_its_values_lie() -> None:
    """A rank computes a part of the vocabulary, a batch any rows: vector units must not tell."""
    seed, position = torch.arange(8) * 7919 - 3, torch.arange(8)
    full = gumbel_noise(seed, position, torch.arange(5000))
    generator = torch.Generator().manual_seed(3)
    for _ in range(100):
        start, row = (int(torch.randint(0, high, (1,), generator=generator)) for high in (4999, 8))
        length = int(torch.randint(1, 5000 - start + 1, (1,), generator=generator))
        part = gumbel_noise(seed[row:], position[row:], torch.arange(start, start + length))
        assert torch.equal(part, full[row:, start : start + length])


def uniforms(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Noise back to what should be uniform in (0, 1)."""
    return torch.exp(-torch.exp(-gumbel_noise(seed, position, ids).double()))


def test_noise_is_uniform_and_neighbours_are_independent() -> None:
    count = 300
    grid = uniforms(
        torch.arange(count).repeat_interleave(4), torch.arange(4).repeat(count), torch.arange(500)
    ).view(count, 4, 500)
    values = grid.flatten()
    histogram = torch.histc(values.float(), bins=200, min=0, max=1).double()
    expected = len(values) / 200
    assert float(((histogram - expected) ** 2 / expected).sum() / 199) < 1.4
    # Of n pairs, independent uniforms correlate by 1 / sqrt(n) or so.
    for first, second in (
        (grid[1:], grid[:-1]),  # neighbouring seeds
        (grid[:, 1:], grid[:, :-1]),  # neighbouring positions
        (grid[:, :, 1:], grid[:, :, :-1]),  # neighbouring ids
        (grid[1:, :-1], grid[:-1, 1:]),  # seed + 1 against position + 1
        (grid[:, 1:, :-1], grid[:, :-1, 1:]),  # position + 1 against id + 1
    ):
        pairs = torch.stack([first.flatten(), second.flatten()])
        bound = 4 / math.sqrt(pairs.shape[1])
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < bound
        assert abs(float(torch.corrcoef((pairs - 0.5).abs())[0, 1])) < bound


def test_seeds_that_differ_in_one_bit_share_nothing() -> None:
    seeds = torch.tensor([0, *(1 << bit for bit in range(63)), -(1 << 63)])
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), torch.arange(2000))
    assert float((torch.corrcoef(noise) - torch.eye(len(seeds))).abs().max()) < 0.12
    assert len(noise.unique(dim=0)) == len(seeds)


def test_noise_is_finite_in_both_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits of 0 and of 2**63 - 1, which a test would have to wait for."""
    for bits in (0, 2**63 - 1):
        monkeypatch.setattr(sampling, "_mix", lambda z, bits=bits: torch.full_like(z, bits))
        noise = gumbel_noise(torch.tensor([1]), torch.tensor([2]), torch.arange(40))
        assert noise.isfinite().all()
        assert float(noise[0, 0]) == pytest.approx(43.7 if bits == 0 else -2.8, abs=0.1)
