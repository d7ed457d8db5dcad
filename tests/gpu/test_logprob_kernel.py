"""What a rank's part of the vocabulary contributes to logprobs, by kernels: against the definition.

With TRITON_INTERPRET=1 and Triton installed they run on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import DEVICE, HAS_GPU, IS_INTERPRETED, captured, on_gpu
from tpworker.kernels.operands import MOST_LOGPROBS
from tpworker.model import logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]
# 20 and 21: as many as are told of; 64: one group; 300,001: larger groups.
VOCABS = (
    (5, 20, 21, 40, 64, 5000, 300_001) if IS_INTERPRETED else (5, 20, 21, 40, 64, 49_152, 151_936, 300_001)
)
every_vocab = pytest.mark.parametrize("vocab", VOCABS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
KINDS = 10


@pytest.fixture
def parts() -> Any:
    """The function of the kernels."""
    pytest.importorskip("triton")
    from tpworker.kernels.logprob_kernel import logprob_parts

    return logprob_parts


def make_logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """On the CPU; rows of KINDS kinds in turn."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=draw) * 3
    logits[1::KINDS] = logits[1::KINDS].round()  # many are equal
    logits[2::KINDS] = 1.5  # all are
    logits[3::KINDS, 7:] = -math.inf  # less than are told of
    logits[4::KINDS, 1:] = -math.inf
    logits[5::KINDS] = logits[5::KINDS].sort(dim=-1).values  # the best are the last, in one group
    logits[6::KINDS] = -3e38
    logits[6::KINDS, ::2] = -0.0
    logits[6::KINDS, 1::4] = 0.0
    logits[7::KINDS] = -math.inf
    logits[7::KINDS, ::3] = -50.0  # none of them is near 0
    logits[8::KINDS, : vocab - 1] = logits[8::KINDS, : vocab - 1].clamp(max=1.0)
    logits[8::KINDS, vocab - 1] = 60.0
    return logits.to(dtype)


def make_tokens(rows: int, vocab: int, start: int, seed: int = 0) -> Tensor:
    """Here and elsewhere, both ends, and tokens by logits that are NaN."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(start, start + vocab, (rows,), generator=draw)
    tokens[::6] = start
    tokens[1::6] = start + vocab - 1
    tokens[2::6] = start + vocab
    tokens[3::6] = start - 1 if start else 1 << 22
    tokens[::4] = ~tokens[::4]
    return tokens


def alike(result: Tensor, expected: Tensor) -> None:
    """Equal but for the sums, which are added up in another order."""
    result = result.cpu().clone()
    assert result.shape == (len(expected), 3 + 2 * MOST_LOGPROBS)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result[:, 1], expected[:, 1], rtol=1e-5, atol=0)
    result[:, 1] = expected[:, 1]
    assert torch.equal(result, expected), (result != expected).nonzero()


@every_vocab
@every_dtype
@pytest.mark.parametrize("start", [0, 151_000])
def test_parts(parts: Any, vocab: int, dtype: torch.dtype, start: int) -> None:
    rows = KINDS if vocab > 100_000 else 3 * KINDS
    logits, tokens = make_logits(rows, vocab, dtype), make_tokens(rows, vocab, start)
    source = logits.to(DEVICE, copy=True)
    result = parts(source, tokens.to(DEVICE), start)
    alike(result, logprobs.logprob_parts(logits, tokens, start))
    assert torch.equal(source.cpu(), logits)
    assert torch.equal(parts(source, tokens.to(DEVICE), start), result)


@pytest.mark.parametrize("vocab", [40, 9000])
def test_the_lowest_ids_of_equal_logits_wherever_they_are(parts: Any, vocab: int) -> None:
    """Equal ones at the border of what is told of: in many groups, with better ones behind them."""
    logits = torch.full((4, vocab), -1.0)
    logits[0, ::7] = 2.0
    logits[1, 30:] = 2.0
    logits[1, -4:] = 3.0
    logits[2, ::7] = 2.0
    logits[2, -11::2] = 2.5
    logits[3, -25:] = 2.0
    result = parts(logits.to(DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE), 500).cpu()
    for row in range(4):
        best = sorted(range(vocab), key=lambda column: (-float(logits[row, column]), column))[:MOST_LOGPROBS]
        assert result[row, 3 + MOST_LOGPROBS :].tolist() == [500 + column for column in best]
        assert result[row, 3 : 3 + MOST_LOGPROBS].tolist() == logits[row, best].tolist()


@pytest.mark.parametrize("vocab", [40, 5000])
def test_sums_of_rows_with_nan_are_nan(parts: Any, vocab: int) -> None:
    """Of either sign, one or nothing else; other rows are as they were."""
    logits, tokens = make_logits(2 * KINDS, vocab, torch.bfloat16), make_tokens(2 * KINDS, vocab, 0)
    expected = logprobs.logprob_parts(logits, tokens, 0)
    logits[0, vocab - 1] = math.nan
    logits[2, 3] = -math.nan
    logits[4] = math.nan
    logits[6] = -math.nan
    logits[8] = -math.inf
    logits[8, vocab // 2] = math.nan
    result = parts(logits.to(DEVICE), tokens.to(DEVICE), 0).cpu()
    is_nan = logits.isnan().any(dim=1)
    assert torch.equal(result[:, 1].isnan(), is_nan)
    alike(result[~is_nan], expected[~is_nan])


@every_dtype
@pytest.mark.parametrize(("vocab", "size"), [(1000, 2), (1000, 3), (97, 4), (40, 8)])
def test_ranks_with_a_part_of_the_vocabulary_each(
    parts: Any, dtype: torch.dtype, vocab: int, size: int
) -> None:
    """Merged they are those of the whole, even where a rank has nothing but padding."""
    local = -(-vocab // size)
    local = -(-local // 8) * 8
    padded = torch.full((KINDS, size * local), -math.inf, dtype=dtype)
    padded[:, :vocab] = make_logits(KINDS, vocab, dtype)
    tokens = make_tokens(KINDS, vocab, 0) % vocab
    each = [
        parts(padded[:, rank * local : (rank + 1) * local].to(DEVICE), tokens.to(DEVICE), rank * local)
        for rank in range(size)
    ]
    alike(logprobs._merged(torch.stack(each)), logprobs.logprob_parts(padded[:, :vocab], tokens, 0))


def test_a_part_that_is_padding_adds_nothing(parts: Any) -> None:
    logits = torch.full((2, 70), -math.inf, device=DEVICE)
    result = parts(logits, torch.tensor([0, 3], device=DEVICE), 0)
    assert (result[:, : 3 + MOST_LOGPROBS] == torch.tensor(
        [-math.inf, 0.0, -math.inf, *[-math.inf] * MOST_LOGPROBS], device=DEVICE
    )).all()  # fmt: skip
    assert (result[:, 3 + MOST_LOGPROBS :] == -1).all()


def test_rows_with_something_between_them(parts: Any) -> None:
    wide, tokens = make_logits(KINDS, 256, torch.float32), make_tokens(KINDS, 200, 9)
    expected = logprobs.logprob_parts(wide[:, :200], tokens, 9)
    alike(parts(wide.to(DEVICE)[:, :200], tokens.to(DEVICE), 9), expected)
    assert parts(wide.to(DEVICE)[:0, :200], tokens[:0].to(DEVICE), 9).shape == (0, expected.shape[1])


@on_gpu
def test_rows_further_apart_than_32_bits_tell(parts: Any) -> None:
    vocab, far = 151_936, 1 << 30
    buffer = torch.empty(2 * far + vocab, dtype=torch.bfloat16, device=DEVICE)
    spread = buffer.as_strided((3, vocab), (far, 1))
    logits, tokens = make_logits(3, vocab, torch.bfloat16), make_tokens(3, vocab, 0)
    spread.copy_(logits)
    alike(parts(spread, tokens.to(DEVICE), 0), logprobs.logprob_parts(logits, tokens, 0))


@on_gpu
def test_replayed_with_other_logits(parts: Any) -> None:
    rows, vocab = 64, 151_936
    logits = make_logits(rows, vocab, torch.bfloat16).to(DEVICE)
    tokens = make_tokens(rows, vocab, 0).to(DEVICE)
    graph, result = captured(lambda: parts(logits, tokens, 0))
    for seed in range(1, 4):
        source = make_logits(rows, vocab, torch.bfloat16, seed).roll(seed, dims=0)
        chosen = make_tokens(rows, vocab, 0, seed)
        logits.copy_(source)
        tokens.copy_(chosen)
        graph.replay()
        torch.cuda.synchronize()
        alike(result, logprobs.logprob_parts(source, chosen, 0))
