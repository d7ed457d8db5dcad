"""Products of weights in FP8 against the definition: those with what the weight stands for.

With TRITON_INTERPRET=1 and Triton installed, what brings rows to FP8, and weights out of it, runs on the CPU,
in its interpreter; the products need a Hopper GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import DEVICE, HAS_GPU, IS_INTERPRETED, gate, hopper, near, randn
from tpworker.kernels.operands import Fp8Weight, Gated, Normed
from tpworker.model import composed_ops, fp8, layer_ops
from tpworker.model.operations import operations_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]
BF16 = torch.bfloat16
DTYPE = torch.float32 if IS_INTERPRETED else BF16  # the interpreter cuts off what bfloat16 should round
BY_CHANNEL = (1, 0)
BLOCKS = [BY_CHANNEL, (128, 128), (64, 128), (32, 32), (128, 16)]
every_block = pytest.mark.parametrize("block", BLOCKS, ids=str)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    pytest.importorskip("triton")
    with torch.inference_mode():
        yield


def fp8_weight(size_out: int, size_in: int, block: tuple[int, int], dtype: torch.dtype = BF16) -> Fp8Weight:
    """Scales differ by some powers of two; (1, 0): by channel."""
    rows, columns = block[0], block[1] or size_in
    scales = 0.01 * torch.exp2(torch.randn(-(-size_out // rows), -(-size_in // columns)))
    values = (100 * torch.randn(size_out, size_in)).clamp(-fp8.LARGEST, fp8.LARGEST).to(fp8.E4M3)
    return Fp8Weight(values.to(DEVICE), scales.to(DEVICE), (rows, columns), dtype)


def product(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """The definition, in float64 but for the weight's rounding, which it is without."""
    exact = fp8.dequantise(replace(weight, dtype=torch.float32)).double()
    y = x.double() @ exact.T
    return (y if bias is None else y + bias.double()).float()


# ------------------------------------------------------------------------------- into FP8, and out of it


@pytest.mark.parametrize("before", ["", "norm", "gate"])
@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("size", [96, 1152])
def test_rows_in_fp8(size: int, by_group: bool, before: str) -> None:
    """Each within half a step of E4M3, by the greatest of its row or group; a row of zeros is one."""
    from tpworker.kernels import fp8_kernels, triton_kernels

    x = randn(5, size * (1 + (before == "gate")), dtype=DTYPE, scale=3.0).to(DEVICE)
    x[1] *= 1000
    x[3] = 0
    norm = randn(size, dtype=DTYPE).to(DEVICE)
    given: Tensor | Normed | Gated = x
    expected = x.float()
    if before == "norm":
        given, expected = Normed(x, norm, 1e-6), triton_kernels.add_norm(x, None, norm, 1e-6).float()
    if before == "gate":
        given, expected = Gated(x), triton_kernels.silu_mul(x).float()
    values, scales = fp8_kernels.quantise(given, by_group)
    width = fp8_kernels.GROUP if by_group else size
    assert scales.shape == (8 if by_group else 5, -(-size // width))
    assert scales.stride(0) == 1
    wide = scales[:5].repeat_interleave(width, dim=1)[:, :size]
    error = (values[:5].float() * wide - expected).abs()
    # The interpreter's rounding to E4M3 does not carry: 31 becomes 16.
    relative, absolute = (1 / 2, 1 / 64) if IS_INTERPRETED else (1 / 16, 1 / 1024)
    assert (error <= (1 + 1e-5) * (relative * expected.abs() + absolute * wide)).all()
    assert (values[3].float() == 0).all()
    for start in range(0, size, width):
        reached = values[:5, start : start + width].float().abs().amax(dim=1)
        assert reached.tolist() == [448, 448, 448, 0, 448]


@every_block
def test_what_weights_stand_for(block: tuple[int, int]) -> None:
    from tpworker.kernels import fp8_kernels

    weight = fp8_weight(152, 208, block, DTYPE)
    assert torch.equal(fp8_kernels.dequantise(weight, DTYPE), fp8.dequantise(weight))


# ---------------------------------------------------------------------------------------------- few rows

CUTS: list[dict[str, Any]] = [
    {"outputs": 64, "step": 128},
    {"outputs": 64, "step": 256, "splits": 8, "stages": 2, "share": 2},
    {"outputs": 128, "step": 128, "splits": 2, "stages": 2, "share": 3},
    {"outputs": 128, "step": 128, "splits": 8, "stages": 3, "warps": 8},
]


@hopper
@every_block
@pytest.mark.parametrize("count", [1, 9, 64])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_products_of_few_rows(count: int, cut: dict[str, Any], block: tuple[int, int]) -> None:
    """Parts of blocks included; and what stands before and behind products, in the same kernel."""
    from tpworker.kernels import few_rows, skinny_kernel

    rule = few_rows.FewRows(**cut)
    for size_in, size_out, has_bias in ((1024, 768, False), (1104, 152, True)):
        weight, x = fp8_weight(size_out, size_in, block), randn(count, size_in).to(DEVICE)
        bias = randn(size_out).to(DEVICE) if has_bias else None
        expected = product(x, weight, bias).to(BF16)
        for _ in range(2):
            near(skinny_kernel.multiply(x, weight, bias, rule), expected)
            near(skinny_kernel.multiply(x, weight, bias, rule, gated=True), gate(expected), 1e-2)
        residual, norm = randn(count, size_out).to(DEVICE), randn(size_out).to(DEVICE)
        summed = residual.cpu().clone()
        normed = layer_ops.add_norm(summed, expected.cpu(), norm.cpu(), 1e-6)
        target = Normed(residual.clone(), norm, 1e-6)
        skinny_kernel.multiply_add(x, weight, bias, rule, target)
        near(target.x, summed)
        near(composed_ops.tensor_of(operations_of(DEVICE), target), normed)
        if size_out % 16 == 0:
            second = fp8_weight(272, size_out, block)
            behind = product(normed.to(DEVICE), second).to(BF16)
            near(skinny_kernel.multiply(target, second, None, rule), behind, 1e-2)
    assert not few_rows.counters(DEVICE).any()


@hopper
@pytest.mark.parametrize("block", BLOCKS[:2], ids=str)
@pytest.mark.parametrize("count", [1, 16])
def test_several_programs_of_a_processor_share_tiles(count: int, block: tuple[int, int]) -> None:
    """One product after the other; were there no room for all programs, this would not end."""
    from tpworker.kernels import few_rows, skinny_kernel

    weight, x = fp8_weight(4096, 4096, block), randn(count, 4096).to(DEVICE)
    rule = few_rows.FewRows(64, 256, splits=8, stages=2, share=4)
    for _ in range(3):
        x, before = skinny_kernel.multiply(x, weight, None, rule), x
        near(x, product(before, weight).to(BF16))
        x /= x.float().square().mean().sqrt()
    assert not few_rows.counters(DEVICE).any()


@hopper
@pytest.mark.parametrize("count", [1, 32, 33])
@pytest.mark.parametrize("size_out", [1024, 4096, 8512])
def test_products_of_few_rows_as_they_are_cut(size_out: int, count: int) -> None:
    from tpworker.kernels import skinny_kernel

    weight, x = fp8_weight(size_out, 2048, BY_CHANNEL), randn(count, 2048).to(DEVICE)
    rule = skinny_kernel.choose(count, weight, gated=False)
    assert rule is not None
    near(skinny_kernel.multiply(x, weight, None, rule), product(x, weight).to(BF16))


# --------------------------------------------------------------------------------------------- all of them


@hopper
@every_block
@pytest.mark.parametrize("size_in", [768, 1024])  # the library's product with blocks takes multiples of 512
@pytest.mark.parametrize(
    ("count", "has_bias"), [(1, True), (64, False), (65, True), (130, False), (600, True)]
)
def test_matrices(count: int, has_bias: bool, size_in: int, block: tuple[int, int]) -> None:
    """As the model uses them. From 65 rows on the input may be rounded to FP8, which has 3 bits."""
    from tpworker.kernels import triton_kernels

    operations = operations_of(DEVICE)
    weight, x = fp8_weight(1024, size_in, block), randn(count, size_in).to(DEVICE)
    bias = randn(1024).to(DEVICE) if has_bias else None
    matrix = operations.linear(weight, bias)
    expected = product(x, weight, bias).to(BF16)
    tolerance = 4e-2 if count > 64 else 5e-3
    near(matrix(x), expected, tolerance)
    gated = matrix.gated(x)
    assert isinstance(gated, Gated) == (count > 64)
    near(triton_kernels.computed(gated), gate(expected), 2 * tolerance)
    norm = randn(size_in).to(DEVICE)
    normed = operations.add_norm(x, None, norm, 1e-6)
    near(matrix(Normed(x, norm, 1e-6)), matrix(normed), tolerance)  # the norm's sums have another order
    residual = randn(count, 1024).to(DEVICE)
    summed = (residual + expected.float()).to(BF16)
    both = randn(count, 2 * size_in).to(DEVICE)
    assert torch.equal(matrix(Gated(both)), matrix(triton_kernels.silu_mul(both)))
    target = matrix.add_to(residual, x, randn(1024).to(DEVICE), 1e-6)
    assert target is not None
    assert target.x is residual
    near(residual, summed, tolerance)


@hopper
@pytest.mark.parametrize("block", [BY_CHANNEL, (128, 128)], ids=str)
@pytest.mark.parametrize("count", [64, 130])
def test_rows_beside_a_row_change_nothing(count: int, block: tuple[int, int]) -> None:
    matrix = operations_of(DEVICE).linear(fp8_weight(1024, 1024, block))
    x = randn(count, 1024).to(DEVICE)
    y = matrix(x)
    x[1:] = 1000 * torch.randn_like(x[1:])
    assert torch.equal(matrix(x)[0], y[0])


@hopper
def test_float16() -> None:
    operations = operations_of(DEVICE)
    weight = fp8_weight(256, 128, (128, 128), torch.float16)
    for count in (3, 70):
        x = randn(count, 128, dtype=torch.float16, scale=0.1).to(DEVICE)
        near(operations.linear(weight)(x), product(x, weight).half(), 2e-3)
