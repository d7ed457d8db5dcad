"""Top-k and top-p on operations, without a sort, against the torch definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.model.helpers import run_ranks
from tests.model.test_sampling import rows_of, through_slots
from tpworker.kernels.operands import SamplingRows
from tpworker.model import sampling
from tpworker.model.operations import operations_of
from tpworker.model.sampling import SamplingMode, sample
from tpworker.model.tp import Collectives
from tpworker.rank.collectives import SoleRank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

TRUNCATED = SamplingMode(random=True, truncate=True, suppress=False)
ROWS = 48
TOP_P = (1.0, 0.9, 0.5, 0.999, 0.01)
TOP_K = (0, 40, 1, 3, 1000, 20_000, 10**9)


def logits_like(kind: str, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """float of `dtype` on the GPU, [ROWS, vocab_size]. Some rows are special."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(ROWS, vocab_size, generator=generator)
    if kind == "flat":
        logits *= 0.3
    elif kind == "peaked":
        logits *= 2.5
        logits[:, torch.randint(vocab_size, (8,), generator=generator)] += 9
    else:
        logits = (logits * 2).round()  # many are equal
    logits[1, vocab_size // 3 :] = -math.inf
    logits[2, 1:] = -math.inf
    logits[3, ::2] = 0.0
    logits[3, 1::2] = -0.0
    return logits.to(dtype).cuda()


def every_kind() -> SamplingRows:
    """All pairs of TOP_P and TOP_K, and a row of temperature 0 in between."""
    pairs = [(p, k) for p in TOP_P for k in TOP_K]
    picked = [pairs[row % len(pairs)] for row in range(ROWS)]
    temperatures = [0.0 if row == 10 else (0.7, 1.0, 1.6)[row % 3] for row in range(ROWS)]
    rows = rows_of(ROWS, temperatures, [p for p, _ in picked], [k for _, k in picked])
    return through_slots(rows, TRUNCATED, torch.device("cuda"))


def sampled(
    logits: Tensor,
    rows: SamplingRows,
    mode: SamplingMode = TRUNCATED,
    vocab_start: int = 0,
    collectives: Collectives | None = None,
) -> Tensor:
    """By the kernels; the logits stay as they are."""
    ranks = collectives or SoleRank()
    return sample(operations_of(logits.device), logits.clone(), rows, mode, vocab_start, ranks)


def reference(logits: Tensor, rows: SamplingRows) -> Tensor:
    plain = sampled(logits, rows, SamplingMode(True, False, False))
    is_truncated = (rows.temperature > 0) & ((rows.top_p < 1) | (rows.top_k > 0))
    tokens = sampling._sample_from_sets(sampling._scaled(logits, rows), rows, is_truncated)
    return torch.where(is_truncated, tokens, plain)


@pytest.mark.parametrize("vocab_size", [97, 5000, 151_936, 300_001])
@pytest.mark.parametrize("kind", ["flat", "peaked", "ties"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tokens_of_the_definition(vocab_size: int, kind: str, dtype: torch.dtype) -> None:
    logits, rows = logits_like(kind, vocab_size, dtype), every_kind()
    differ = truncated = 0
    for position in range(8):
        rows.position.fill_(position)
        expected = reference(logits, rows)
        tokens = sampled(logits, rows)
        assert torch.equal(tokens, sampled(logits, rows))
        plain = sampled(logits, rows, SamplingMode(True, False, False))
        # A sum that equals the share but for rounding may fall on either side.
        differ += int((tokens != expected).sum())
        truncated += int((expected != plain).sum())
    assert differ <= 1
    assert truncated > 8, "sets that are never left show nothing"


def test_tokens_by_logits_that_are_nan_are_marked() -> None:
    logits, rows = logits_like("peaked", 5000, torch.bfloat16), every_kind()
    expected = sampled(logits, rows)
    logits[::2, 4000] = math.nan
    logits[4::8] = -math.nan
    tokens = sampled(logits, rows)
    assert torch.equal(tokens[1::2], expected[1::2])
    assert tokens[::2].tolist() == [~0 if row % 8 == 4 else ~4000 for row in range(0, ROWS, 2)]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_with_a_part_of_the_vocabulary_each(size: int) -> None:
    rows = every_kind()
    whole = logits_like("peaked", 1000, torch.bfloat16)
    local = -(-1000 // size)
    local = -(-local // 8) * 8
    padded = torch.full((ROWS, size * local), -math.inf, dtype=whole.dtype, device="cuda")
    padded[:, :1000] = whole

    def main(collectives: Collectives) -> Tensor:
        start = collectives.rank * local
        return sampled(padded[:, start : start + local], rows, TRUNCATED, start, collectives)

    expected = sampled(whole, rows)
    for tokens in run_ranks(size, main):
        assert torch.equal(tokens, expected)
