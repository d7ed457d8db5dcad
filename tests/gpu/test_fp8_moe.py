"""Experts with weights in FP8 against the definition: those with what the weights stand for, in float32.

With TRITON_INTERPRET=1 and Triton installed, they run on the CPU, in its interpreter: small sizes, float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import DEVICE, HAS_GPU, IS_INTERPRETED, captured, near, on_gpu
from tests.gpu.test_moe_kernels import (
    DTYPE,
    ERNIE,
    GLM,
    fused,
    inputs,
    make_spec,
    random_choices,
)
from tpworker.kernels.operands import Fp8Weight
from tpworker.model import fp8, moe
from tpworker.model.families import MoeSpec

__all__ = ["fused"]  # a fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]
# Both inputs of a product in FP8: 0.05 is what rounding them costs, and the interpreter cuts off instead.
ROUNDED = 0.12 if IS_INTERPRETED else 0.06
BY_CHANNEL = ((1, 0), (1, 0))
BLOCKS = ((128, 128), (128, 128))
SMALL = {
    "channel": (80, make_spec(7, 3, 48, **GLM), BY_CHANNEL),
    "blocks": (160, make_spec(6, 2, 128, **ERNIE), BLOCKS),
    "parts": (96, make_spec(5, 3, 96), ((32, 64), (64, 32))),
    "crumbs": (80, make_spec(4, 2, 48), ((16, 8), (8, 16))),
}
LARGE = {
    "glm-4.5-air": (4096, make_spec(32, 8, 1408, **GLM), BY_CHANNEL),
    "glm-4.5-air-tp8": (4096, make_spec(128, 8, 176, **GLM), BY_CHANNEL),
    "qwen3-30b-a3b": (2048, make_spec(128, 8, 768), BLOCKS),
    "qwen3-30b-a3b-tp4": (2048, make_spec(128, 8, 192), ((64, 128), (128, 64))),
}
SHAPES = SMALL if IS_INTERPRETED else SMALL | LARGE
COUNTS = (1, 17, 70) if IS_INTERPRETED else (1, 16, 17, 33, 64, 65, 575, 2048)  # both sides of all plans
every_shape = pytest.mark.parametrize(("hidden", "spec", "blocks"), SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def fp8_weight(shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype = DTYPE) -> Fp8Weight:
    """Scales differ by some powers of two; columns 0: all."""
    *several, size_out, size_in = shape
    rows, columns = block[0], block[1] or size_in
    scales = torch.exp2(torch.randn(*several, -(-size_out // rows), -(-size_in // columns), device=DEVICE))
    values = (100 * torch.randn(shape, device=DEVICE)).clamp_(-fp8.LARGEST, fp8.LARGEST)
    return Fp8Weight(values.to(fp8.E4M3), scales * (0.005 * size_in**-0.5), (rows, columns), dtype)


def stacks(hidden: int, spec: MoeSpec, blocks: Any) -> tuple[Fp8Weight, Fp8Weight]:
    stacked, width = spec.num_experts + spec.num_shared, spec.intermediate_size
    return (
        fp8_weight((stacked, 2 * width, hidden), blocks[0]),
        fp8_weight((stacked, hidden, width), blocks[1]),
    )


def reference(x: Tensor, choices: tuple[Tensor, Tensor], gate_up: Fp8Weight, down: Fp8Weight) -> Tensor:
    """Weights are not rounded to 16 bits, but where a scale has few inputs: the kernels round there too."""
    dtypes = (torch.float32 if weight.block[1] >= 32 else weight.dtype for weight in (gate_up, down))
    exact = (
        fp8.dequantise(replace(w, dtype=dtype)) for w, dtype in zip((gate_up, down), dtypes, strict=True)
    )
    return moe.experts(x.float(), *choices, *(weight.float() for weight in exact)).to(x.dtype)


@every_shape
@pytest.mark.parametrize("count", COUNTS)
def test_experts(fused: Any, hidden: int, spec: MoeSpec, blocks: Any, count: int) -> None:
    x, choices, (gate_up, down) = (
        inputs(count, hidden),
        random_choices(count, spec),
        stacks(hidden, spec, blocks),
    )
    how = fused.plan(count, choices[0].numel(), x.dtype, gate_up, down)
    assert not (how.rounds_inputs and count <= 64), "few tokens are multiplied as they are"
    result = fused.experts(x, *choices, gate_up, down)
    near(result, reference(x, choices, gate_up, down), ROUNDED if how.rounds_inputs else None)
    assert torch.equal(result, fused.experts(x, *choices, gate_up, down)), "the same sums in the same order"


@pytest.mark.parametrize("name", ["channel", "blocks", "parts"])
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("rounds", [False, True])
def test_every_way(fused: Any, name: str, rows: int, rounds: bool) -> None:
    """All tokens to the same experts, in several tiles each; inputs as they are, and in FP8."""
    hidden, spec, blocks = SMALL[name]
    x, (ids, weights), (gate_up, down) = (
        inputs(70, hidden),
        random_choices(70, spec),
        stacks(hidden, spec, blocks),
    )
    ids[:] = ids[0].clone()
    how = fused.Plan(rows, True, fused.Tile(32, 64, 4, 3), fused.Tile(64, 32, 4, 3), rounds)
    result = fused.experts_by(how, x, ids, weights, gate_up, down)
    near(result, reference(x, (ids, weights), gate_up, down), ROUNDED if rounds else None)


@every_shape
def test_the_smallest_numbers_count(fused: Any, hidden: int, spec: MoeSpec, blocks: Any) -> None:
    """E4M3 has numbers with fewer bits below 2^-6, and they are not zero."""
    x, choices, (gate_up, down) = inputs(5, hidden), random_choices(5, spec), stacks(hidden, spec, blocks)
    for weight in (gate_up, down):
        weight.values.copy_((weight.values.float() / 448 * 7 / 512).to(fp8.E4M3))
        weight.scales.mul_(2.0**14)
    near(fused.experts(x, *choices, gate_up, down), reference(x, choices, gate_up, down))


@on_gpu
@pytest.mark.parametrize("count", [4, 64, 575])
def test_a_layer_in_a_graph(fused: Any, count: int) -> None:
    """Replayed with inputs that go to other experts: the same bits as without a graph."""
    hidden, spec, blocks = LARGE["qwen3-30b-a3b-tp4"]
    gate_up, down = stacks(hidden, spec, blocks)
    x, (ids, weights) = inputs(count, hidden), random_choices(count, spec)

    def work() -> Tensor:
        first = fused.experts(x, ids, weights, gate_up, down)
        second: Tensor = fused.experts(first, ids, weights, gate_up, down)
        return second

    graph, result = captured(work)
    for _ in range(4):
        x.copy_(inputs(count, hidden))
        ids.copy_(random_choices(count, spec)[0])
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, work())


@on_gpu
@pytest.mark.parametrize("count", [3, 64, 200])
def test_float16(fused: Any, count: int) -> None:
    hidden, spec, blocks = SMALL["blocks"]
    gate_up, down = (replace(weight, dtype=torch.float16) for weight in stacks(hidden, spec, blocks))
    x, choices = inputs(count, hidden, torch.float16), random_choices(count, spec)
    how = fused.plan(count, choices[0].numel(), x.dtype, gate_up, down)
    result = fused.experts(x, *choices, gate_up, down)
    near(result, reference(x, choices, gate_up, down), ROUNDED if how.rounds_inputs else None)
