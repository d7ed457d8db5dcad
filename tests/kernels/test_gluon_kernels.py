"""The kernels in Gluon compile for Hopper, with the Triton there is; tests/gpu shows what they compute."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.absent_gpu import needs_triton, pretend
from tpworker.kernels.operands import Cut, Fp8Weight, NewTokens, Normed

pytestmark = needs_triton
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def absent_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpworker.kernels import few_rows_kernel, pdl

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(pdl, "is_supported", lambda: True)
    monkeypatch.setattr(few_rows_kernel, "num_processors", lambda device: 132)
    monkeypatch.setattr(few_rows_kernel, "counters", lambda device: torch.zeros(1056, dtype=torch.int32))
    pretend(monkeypatch)


def compile_all(work: Callable[[], None], count: int) -> None:
    from tpworker.rank.rehearsal import rehearse

    sizes: list[int] = []
    knobs: Any = importlib.import_module("triton").knobs
    before, knobs.compilation.listener = (
        knobs.compilation.listener,
        lambda *, metadata, **_: sizes.append(metadata["shared"]),
    )
    try:
        assert rehearse(work, lambda: None) == count
    finally:
        knobs.compilation.listener = before
    assert len(sizes) == count, "a kernel did not compile"
    assert max(sizes) <= 227 << 10, "more shared memory than a processor has"


@pytest.mark.parametrize(("size_in", "size_out"), [(1024, 4096), (2048, 1024), (4096, 24576), (16384, 64)])
@pytest.mark.parametrize("num_rows", [1, 16, 32, 64])
def test_products_of_few_rows(num_rows: int, size_in: int, size_out: int) -> None:
    from tpworker.kernels.few_rows import cut_few
    from tpworker.kernels.few_rows_kernel import multiply_few

    rule = cut_few(num_rows, size_out, size_in, 132)
    x, weight = torch.empty(num_rows, size_in, dtype=BF16), torch.empty(size_out, size_in, dtype=BF16)
    bias, residual = torch.empty(size_out, dtype=BF16), torch.empty(num_rows, size_out, dtype=BF16)
    normed = Normed(x, x[0], 1e-6, x, torch.empty(16, num_rows))

    def work() -> None:
        multiply_few(x, weight, bias, rule, False, None)
        multiply_few(normed, weight, None, rule, True, None)
        multiply_few(x, weight, None, rule, False, Normed(residual, bias, 1e-6))

    compile_all(work, 3)


@pytest.mark.parametrize("block", [(1, 4096), (128, 128), (64, 16)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 64])
def test_products_of_few_rows_in_fp8(num_rows: int, block: tuple[int, int]) -> None:
    from tpworker.kernels.few_rows import cut_few_fp8
    from tpworker.kernels.few_rows_kernel import multiply_few

    rule = cut_few_fp8(num_rows, 1024, 4096, 132)
    x, values = torch.empty(num_rows, 4096, dtype=BF16), torch.empty(1024, 4096, dtype=torch.float8_e4m3fn)
    scales = torch.empty(1024 // block[0], 4096 // block[1])
    weight = Fp8Weight(values, scales, block, BF16)
    bias, residual = torch.empty(1024, dtype=BF16), torch.empty(num_rows, 1024, dtype=BF16)
    normed = Normed(x, x[0], 1e-6, x, torch.empty(16, num_rows))

    def work() -> None:
        multiply_few(x, weight, bias, rule, False, None)
        multiply_few(normed, weight, None, rule, True, None)
        multiply_few(x, weight, None, rule, False, Normed(residual, bias, 1e-6))

    compile_all(work, 3)


@pytest.mark.parametrize("cut", [Cut(1, 2), Cut(4, 2), Cut(32, 4)], ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "width"),
    [(16, 8, 128, 1), (12, 1, 128, 1), (9, 3, 64, 1), (20, 4, 128, 3), (9, 3, 64, 5), (24, 2, 128, 2)],
)
def test_decode_attention(num_heads: int, num_kv_heads: int, head_dim: int, width: int, cut: Cut) -> None:
    from tpworker.kernels.ring_kernel import attend

    cut = replace(cut, turns=1 + (width * num_heads > 16 * num_kv_heads))
    heads = torch.empty(3 * width, num_heads + 2 * num_kv_heads, head_dim, dtype=BF16)
    keys = torch.empty(8, 16, num_kv_heads, head_dim, dtype=BF16)
    tables, lengths = torch.empty(3, 40, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    parts, group = 3 * num_kv_heads * cut.num_parts, width * num_heads // num_kv_heads
    sums = torch.empty(parts * group, head_dim)
    partial = (sums, sums[:, 0].clone(), sums[:, 0].clone(), torch.zeros(3 * num_kv_heads, dtype=torch.int32))
    weight, angle = torch.empty(head_dim, dtype=BF16), torch.empty(3 * width, 1, head_dim // 2)
    new = NewTokens((weight, weight), 1e-6, angle, angle, torch.empty(3 * width, dtype=torch.int64))

    def work() -> None:
        attend(heads, keys, keys, tables, lengths, partial, cut, new)
        attend(heads, keys, keys, tables, lengths, partial, cut, replace(new, norms=None))

    compile_all(work, 2)
