"""Plans of mixtures, and their kernels compiled for Hopper; tests/gpu shows what they compute."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.absent_gpu import needs_triton, pretend
from tpworker.kernels.moe_plans import Plan, Tile, Weights, plan
from tpworker.kernels.operands import Fp8Weight

BF16 = torch.bfloat16
BY_CHANNEL, BLOCKS, CRUMBS = (1, 4096), (128, 128), (16, 16)


def stack(shape: tuple[int, int, int], block: tuple[int, int] | None) -> Weights:
    """Empty, of 16 bits without a block."""
    if block is None:
        return torch.empty(shape, dtype=BF16)
    scales = torch.empty(shape[0], -(-shape[1] // block[0]), -(-shape[2] // block[1]))
    return Fp8Weight(torch.empty(shape, dtype=torch.float8_e4m3fn), scales, block, BF16)


def plan_of(num_tokens: int, block: tuple[int, int] | None, dtype: torch.dtype = BF16) -> Plan:
    return plan(num_tokens, 8 * num_tokens, dtype, stack((16, 192, 256), block), stack((16, 256, 96), block))


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 32, 33, 64, 65, 1 << 16])
@pytest.mark.parametrize("block", [None, BY_CHANNEL, BLOCKS, (64, 32), CRUMBS])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_inputs_are_rounded_to_fp8_where_they_are_many(
    num_tokens: int, block: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    how = plan_of(num_tokens, block, dtype)
    is_fp8 = block in (BY_CHANNEL, BLOCKS, (64, 32))
    assert how.rounds_inputs == (is_fp8 and num_tokens > 64 and dtype != torch.float32)
    assert how.is_sorted or num_tokens <= how.rows, "a program finds the tokens of all its rows"


@pytest.mark.parametrize(
    ("block", "step", "scale_rows", "scale_columns"),
    [
        (None, 128, 0, 0),
        (BY_CHANNEL, 128, 1, 0),
        ((128, 256), 128, 128, 0),  # all inputs of a row have one
        (BLOCKS, 128, 128, 128),
        ((64, 32), 32, 64, 32),
        (CRUMBS, 32, 16, 16),  # of each element: a step of 16 would be shorter than the matrix units take
    ],
)
def test_a_step_has_one_scale(
    block: tuple[int, int] | None, step: int, scale_rows: int, scale_columns: int
) -> None:
    options = Tile(64, 128, 4, 3).options(stack((3, 64, 256), block))
    assert options["STEP"] == step
    assert (options["SCALE_ROWS"], options["SCALE_COLUMNS"]) == (scale_rows, scale_columns)


@needs_triton
@pytest.mark.parametrize("block", [None, BY_CHANNEL, BLOCKS, CRUMBS], ids=str)
def test_kernels_compile_for_hopper(
    block: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those of all plans, and no processor has too little shared memory for them."""
    from tpworker.kernels import moe_kernels, pdl
    from tpworker.rank.rehearsal import rehearse

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(pdl, "is_supported", lambda: True)
    pretend(monkeypatch)
    gate_up, down = stack((4, 384, 256), block), stack((4, 256, 192), block)
    sizes: list[tuple[str, int]] = []
    knobs: Any = importlib.import_module("triton").knobs
    monkeypatch.setattr(
        knobs.compilation,
        "listener",
        lambda *, metadata, **_: sizes.append((metadata["name"], metadata["shared"])),
    )

    def work() -> None:
        for num_tokens in (1, 32, 64, 65, 300):
            ids = torch.empty(num_tokens, 3, dtype=torch.int32)
            x = torch.empty(num_tokens, 256, dtype=BF16)
            moe_kernels.experts(x, ids, torch.empty(ids.shape), gate_up, down)

    assert rehearse(work, lambda: None) == len(sizes)
    assert {"_gate_up", "_down"} <= {name for name, _ in sizes}
    assert max(size for _, size in sizes) <= 227 << 10
