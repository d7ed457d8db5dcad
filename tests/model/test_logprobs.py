"""Logprob rows: torch's own log_softmax, whole and in parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.model.helpers import run_ranks
from tests.model.test_sampling import logits_of
from tpworker.kernels.operands import LOGPROB_ROW, MOST_LOGPROBS
from tpworker.model import torch_operations
from tpworker.model.logprobs import logprob_rows
from tpworker.model.tp import Collectives

NOBODY = -1  # an id that stands for no token


def rows_at(size: int, logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits [R, V] split over `size` ranks, padded with -inf: the rows, the same on all ranks bit by bit."""
    count, vocab_size = logits.shape
    local = 8 * -(-vocab_size // (8 * size))
    full = torch.full((count, size * local), -math.inf, dtype=logits.dtype)
    full[:, :vocab_size] = logits

    def main(collectives: Collectives) -> Tensor:
        start = collectives.rank * local
        part = full[:, start : start + local].clone()
        rows = logprob_rows(torch_operations, part, tokens, start, collectives)
        assert torch.equal(
            part.float().view(torch.int32), full[:, start : start + local].float().view(torch.int32)
        ), "the logits were changed"
        return rows

    results = run_ranks(size, main)
    bits = [result.view(torch.int32) for result in results]
    assert all(torch.equal(other, bits[0]) for other in bits)
    assert results[0].shape == (count, LOGPROB_ROW)
    assert results[0].dtype == torch.float32
    return results[0]


def expected_top(logits: Tensor) -> list[list[int]]:
    """The likeliest of each row, best first, of equal ones the lowest id first; those of -inf are none."""
    found = []
    for row in logits.tolist():
        order = sorted(range(len(row)), key=lambda token: (-row[token], token))
        found.append([token for token in order[:MOST_LOGPROBS] if row[token] > -math.inf])
    return found


def check(rows: Tensor, logits: Tensor, tokens: Tensor) -> None:
    """Own logprob, the likeliest and their ids, against log_softmax in float64."""
    logprobs = logits.double().log_softmax(dim=-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(rows[:, 0].double(), own, rtol=1e-6, atol=2e-6)
    for row, top in enumerate(expected_top(logits)):
        ids = rows[row, 1 + MOST_LOGPROBS :].long().tolist()
        assert ids == top + [NOBODY] * (MOST_LOGPROBS - len(top))
        values = rows[row, 1 : 1 + MOST_LOGPROBS].double()
        torch.testing.assert_close(values[: len(top)], logprobs[row, top], rtol=1e-6, atol=2e-6)
        assert (values[len(top) :] == -math.inf).all()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("vocab_size", [1, 7, 19, 20, 21, 64, 1000, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_log_softmax(size: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Fewer tokens than a row tells of, on a rank or altogether; ranks that have nothing but padding."""
    count = 6
    logits = logits_of(count, vocab_size, scale=3.0, seed=vocab_size).to(dtype)
    tokens = torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(size))
    check(rows_at(size, logits, tokens), logits.float(), tokens)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_of_equal_ones_the_lowest_ids_are_told_of(size: int) -> None:
    """Also where the last one told of has equals on other ranks, and where all are equal."""
    logits = torch.stack(
        [
            torch.zeros(200),
            (torch.arange(200) % 7).float(),
            torch.where(torch.arange(200) < 150, -1.0, 2.0),
            torch.randint(-2, 3, (200,), generator=torch.Generator().manual_seed(1)).float(),
        ]
    )
    check(rows_at(size, logits, torch.tensor([199, 0, 150, 77])), logits, torch.tensor([199, 0, 150, 77]))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_finite", [1, 5, 19, 20, 21])
def test_few_tokens_that_are_possible(size: int, num_finite: int) -> None:
    logits = torch.full((3, 100), -math.inf)
    places = torch.randperm(100, generator=torch.Generator().manual_seed(num_finite))[:num_finite]
    logits[:, places] = logits_of(3, num_finite)
    check(rows_at(size, logits, places[:1].repeat(3)), logits, places[:1].repeat(3))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_large_logits_and_small_ones(size: int) -> None:
    """Nothing overflows, and the likeliest token of a sure model has 0 and not a little more."""
    logits = logits_of(4, 100)
    logits[0] *= 1e4
    logits[1] += 3e38
    logits[2] -= 3e38
    logits[3, 50] = 200.0
    tokens = torch.tensor([int(logits[0].argmax()), 3, 4, 50])
    rows = rows_at(size, logits, tokens)
    check(rows, logits, tokens)
    assert rows[0, 0] == rows[3, 0] == 0
    assert (rows[:, : 1 + MOST_LOGPROBS] <= 0).all()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("place", [0, 30, 99])
def test_a_row_of_nan_is_nan_and_no_other(size: int, place: int) -> None:
    """Wherever the one NaN stands: all of its logprobs; ids are of tokens, or of none."""
    logits, tokens = logits_of(3, 100), torch.tensor([5, ~6, 7])
    logits[1, place] = math.nan
    rows = rows_at(size, logits, tokens)
    assert rows[1, : 1 + MOST_LOGPROBS].isnan().all()
    ids = rows[1, 1 + MOST_LOGPROBS :]
    assert ((ids >= NOBODY) & (ids < 100)).all()
    check(rows[[0, 2]], logits[[0, 2]], tokens[[0, 2]])


@pytest.mark.parametrize("size", [1, 2])
def test_everything_is_nan(size: int) -> None:
    rows = rows_at(size, torch.full((2, 100), math.nan), torch.tensor([~0, 5]))
    assert rows[:, : 1 + MOST_LOGPROBS].isnan().all()
    assert (rows[:, 1 + MOST_LOGPROBS :] == NOBODY).all()


def test_a_marked_token_is_the_token() -> None:
    """~token, as sampling marks tokens by logits that are NaN."""
    logits = logits_of(2, 50)
    assert torch.equal(rows_at(2, logits, torch.tensor([~3, 40])), rows_at(2, logits, torch.tensor([3, ~40])))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_rows(size: int) -> None:
    rows_at(size, torch.zeros(0, 50), torch.zeros(0, dtype=torch.int64))


def test_ids_are_exact_in_the_largest_vocabularies() -> None:
    """float32 holds integers to 2**24."""
    collectives = run_ranks(1, lambda collectives: collectives)[0]
    start = (1 << 24) - 30
    rows = logprob_rows(
        torch_operations, logits_of(2, 30), torch.tensor([start, start + 29]), start, collectives
    )
    ids = rows[:, 1 + MOST_LOGPROBS :].long()
    assert ids.tolist() == [[start + token for token in top] for top in expected_top(logits_of(2, 30))]
