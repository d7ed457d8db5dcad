"""Packed and plain weights give the same products."""

from __future__ import annotations

import psutil
import pytest
import torch
import torch.nn.functional as F

from tpworker.model.linear import Linear, can_pack, padded_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 32), (37, 72), (8, 5), (200, 576)])
def test_products(dtype: torch.dtype, has_bias: bool, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    linear = Linear(weight.clone(), bias)
    assert linear.is_packed == can_pack(weight.device, dtype)
    for rows in (1, 3, 16, 70):
        x = torch.randn(rows, shape[1]).to(dtype)
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(linear(x).double(), expected, rtol=tolerance, atol=tolerance * 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_inputs", [64, 576, 768, 1024, 1536, 4096])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, num_inputs: int) -> None:
    """Bit by bit, so that a request's tokens do not depend on the batch."""
    generator = torch.Generator().manual_seed(num_inputs)
    linear = Linear(torch.randn(640, num_inputs, generator=generator).to(dtype))
    if not linear.is_packed:
        pytest.skip(f"this CPU has no packed {dtype} weights")
    x = torch.randn(130, num_inputs, generator=generator).to(dtype)
    together = linear(x)
    for rows in (*range(1, 18), 31, 64, 65):
        for start in (0, 63):
            assert torch.equal(linear(x[start : start + rows]), together[start : start + rows])


def test_row_counts_are_padded_to_a_few_sizes() -> None:
    sizes = [padded_rows(count) for count in range(1, 4097)]
    assert all(count <= size < 1.25 * count for count, size in enumerate(sizes, 1))
    assert len({*sizes}) == 44
    assert sizes[511] == 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_the_number_of_row_counts(dtype: torch.dtype) -> None:
    """oneDNN keeps something for each that it meets: a GB for these. With padding, 70 to 115 MB."""
    linear = Linear(torch.randn(24576, 576).to(dtype))
    if not linear.is_packed:
        pytest.skip(f"this CPU has no packed {dtype} weights")
    x = torch.randn(200, 576).to(dtype)
    linear(x)
    before = psutil.Process().memory_info().rss
    for rows in range(1, 201):
        linear(x[:rows])
    assert psutil.Process().memory_info().rss - before < 400 * 2**20


def test_weights_of_other_devices_stay_as_they_are() -> None:
    weight = torch.empty(4, 3, device="meta")
    linear = Linear(weight)
    assert not linear.is_packed
    assert linear.weight is weight
    assert linear(torch.empty(2, 3, device="meta")).shape == (2, 4)
