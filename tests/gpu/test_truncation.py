"""Min-p, top-k and top-p by kernels, without a sort, against the torch definition.

With TRITON_INTERPRET=1 and Triton installed they run on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import DEVICE, HAS_GPU, IS_INTERPRETED, on_gpu
from tests.model.helpers import run_ranks
from tests.model.test_sampling import rows_of, through_slots
from tpworker.kernels.operands import SamplingRows
from tpworker.model import sampling
from tpworker.model.sampling import SamplingMode, sample
from tpworker.model.tp import Collectives
from tpworker.rank.collectives import SoleRank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]
VOCABS = (97, 700) if IS_INTERPRETED else (97, 5000, 151_936, 300_001)
POSITIONS = 1 if IS_INTERPRETED else 8
DTYPES = (torch.bfloat16,) if IS_INTERPRETED else (torch.bfloat16, torch.float32)

TRUNCATED = SamplingMode(random=True, truncate=True, suppress=False)
ROWS = 48
TOP_P = (1.0, 0.9, 0.5, 0.999, 0.01)
TOP_K = (0, 40, 1, 3, 1000, 20_000, 10**9)
MIN_P = (0.0, 0.05, 0.3, 1e-4, 1.0, 1e-30)


@pytest.fixture(autouse=True)
def _logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has none of the library that kernels take theirs from: numpy's stand in."""
    if not IS_INTERPRETED:
        return
    tl = pytest.importorskip("triton.language")
    from tpworker.kernels import sampling_kernel

    def by(function: Any) -> Any:
        def apply(x: Any) -> Any:
            handle = x.handle
            return tl.tensor(type(handle)(function(handle.data), handle.dtype), x.type)

        return apply

    library = SimpleNamespace(log=by(np.log), log1p=by(np.log1p))
    monkeypatch.setattr(sampling_kernel, "libdevice", library)


def logits_like(kind: str, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """float of `dtype` where the kernels run, [ROWS, vocab_size]. Some rows are special."""
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
    return logits.to(dtype).to(DEVICE)


def every_kind(has_min_p: bool = False) -> SamplingRows:
    """All pairs of TOP_P and TOP_K, and a row of temperature 0 in between.

    has_min_p: and MIN_P in turn, some of it without top-k, top-p or both.
    """
    pairs = [(p, k) for p in TOP_P for k in TOP_K]
    picked = [pairs[row % len(pairs)] for row in range(ROWS)]
    temperatures = [0.0 if row == 10 else (0.7, 1.0, 1.6)[row % 3] for row in range(ROWS)]
    min_p = [MIN_P[row % len(MIN_P)] if has_min_p else 0.0 for row in range(ROWS)]
    rows = rows_of(ROWS, temperatures, [p for p, _ in picked], [k for _, k in picked], min_p=min_p)
    if has_min_p:
        rows.top_p[ROWS // 2 :] = 1.0
        rows.top_k[ROWS * 3 // 4 :] = 0
    return through_slots(rows, TRUNCATED, DEVICE)


def sampled(
    logits: Tensor,
    rows: SamplingRows,
    mode: SamplingMode = TRUNCATED,
    vocab_start: int = 0,
    collectives: Collectives | None = None,
) -> Tensor:
    """By the kernels; the logits stay as they are."""
    from tpworker.kernels import cuda_operations

    ranks = collectives or SoleRank()
    return sample(cuda_operations, logits.clone(), rows, mode, vocab_start, ranks)


def reference(logits: Tensor, rows: SamplingRows) -> Tensor:
    plain = sampled(logits, rows, SamplingMode(True, False, False))
    is_limited = (rows.top_p < 1) | (rows.top_k > 0) | (rows.log_min_p > -math.inf)
    is_truncated = (rows.temperature > 0) & is_limited
    tokens = sampling._sample_from_sets(sampling._scaled(logits, rows), rows, is_truncated)
    return torch.where(is_truncated, tokens, plain)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("kind", ["flat", "peaked", "ties"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_min_p", [False, True], ids=["", "min_p"])
def test_the_tokens_of_the_definition(
    vocab_size: int, kind: str, dtype: torch.dtype, has_min_p: bool
) -> None:
    logits, rows = logits_like(kind, vocab_size, dtype), every_kind(has_min_p)
    differ = truncated = 0
    for position in range(POSITIONS):
        rows.position.fill_(position)
        expected = reference(logits, rows)
        tokens = sampled(logits, rows)
        assert torch.equal(tokens, sampled(logits, rows))
        plain = sampled(logits, rows, SamplingMode(True, False, False))
        # A sum that equals the share but for rounding may fall on either side.
        differ += int((tokens != expected).sum())
        truncated += int((expected != plain).sum())
    assert differ <= 1
    assert truncated > POSITIONS, "sets that are never left show nothing"


@pytest.mark.parametrize("vocab_size", VOCABS[:2])
def test_min_p_admits_what_the_definition_admits(vocab_size: int) -> None:
    """A greatest logit, and copies of another, of which the last bits decide. If they are in, they win."""
    from tpworker.kernels.truncation_kernel import sample_truncated

    count = 32 if IS_INTERPRETED else 400
    rows = rows_of(count, [(1.0, 0.7, 1.6, 0.31)[row % 4] for row in range(count)])
    rows.log_min_p.copy_(-torch.linspace(0.001, 2.0, count))
    greatest = torch.linspace(-20, 20, count).roll(7)
    border = greatest.double() + rows.log_min_p.double() * rows.temperature.double()
    steps = torch.arange(count) % 9 - 4
    logits = (border * (1 + steps * 2.0**-24)).float()[:, None].repeat(1, vocab_size)
    logits[:, 50] = greatest
    scaled = sampling._scaled(logits, rows)
    is_in = scaled[:, 0] - scaled[:, 50] >= rows.log_min_p
    assert count // 4 < int(is_in.sum()) < count * 3 // 4
    there = through_slots(rows, TRUNCATED, DEVICE)
    found = torch.zeros_like(is_in)
    for position in range(10):
        there.position.fill_(position)
        tokens = torch.zeros(count, dtype=torch.int64, device=DEVICE)
        sample_truncated(logits.to(DEVICE), there, tokens)
        found |= tokens.cpu() != 50
    assert torch.equal(found, is_in)


def test_tokens_by_logits_that_are_nan_are_marked() -> None:
    vocab_size = VOCABS[1]
    logits, rows = logits_like("peaked", vocab_size, torch.bfloat16), every_kind(has_min_p=True)
    expected = sampled(logits, rows)
    logits[::2, vocab_size - 20] = math.nan
    logits[4::8] = -math.nan
    tokens = sampled(logits, rows)
    assert torch.equal(tokens[1::2], expected[1::2])
    assert tokens[::2].tolist() == [~0 if row % 8 == 4 else ~(vocab_size - 20) for row in range(0, ROWS, 2)]


@on_gpu  # ranks are threads, and the interpreter runs one kernel at a time
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_with_a_part_of_the_vocabulary_each(size: int) -> None:
    rows = every_kind(has_min_p=True)
    whole = logits_like("peaked", 1000, torch.bfloat16)
    local = -(-1000 // size)
    local = -(-local // 8) * 8
    padded = torch.full((ROWS, size * local), -math.inf, dtype=whole.dtype, device=DEVICE)
    padded[:, :1000] = whole

    def main(collectives: Collectives) -> Tensor:
        start = collectives.rank * local
        return sampled(padded[:, start : start + local], rows, TRUNCATED, start, collectives)

    expected = sampled(whole, rows)
    for tokens in run_ranks(size, main):
        assert torch.equal(tokens, expected)
