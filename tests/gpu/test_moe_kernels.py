"""The kernels of the mixture of experts against `tpworker.model.moe`.

With TRITON_INTERPRET=1 and Triton installed, they run on the CPU, in its interpreter: small sizes, float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import DEVICE, HAS_GPU, IS_INTERPRETED, captured, near, on_gpu
from tpworker.model import moe
from tpworker.model.families import MoeSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]
# The interpreter cuts off what bfloat16 should round.
DTYPE = torch.float32 if IS_INTERPRETED else torch.bfloat16
COUNTS = (1, 3, 37) if IS_INTERPRETED else (1, 3, 17, 64, 200, 575, 2048)  # each but 3 with a plan of its own
FEW_COUNTS = (1, 64, 575)


def make_spec(num_experts: int, chosen: int, width: int, **fields: Any) -> MoeSpec:
    """Of one layer."""
    return MoeSpec(
        layers=(0,), num_experts=num_experts, experts_per_token=chosen, intermediate_size=width, **fields
    )


GLM: dict[str, Any] = {"num_shared": 1, "score": "sigmoid", "has_bias": True, "norm_min": 1e-20}
ERNIE: dict[str, Any] = {"num_shared": 2, "has_bias": True, "norm_min": 1e-12, "float32_gate": True}
SMALL = {
    "odd": (72, make_spec(5, 2, 40)),
    "sigmoid": (80, make_spec(16, 4, 24, **GLM, scale=2.5)),
    "softmax": (96, make_spec(12, 3, 56, **ERNIE)),
    "groups": (64, make_spec(24, 4, 16, num_groups=4, top_groups=2, **GLM)),
    "all": (64, make_spec(6, 6, 16, normalise=False)),
}
LARGE = {
    "glm-4.5-air-tp4": (4096, make_spec(128, 8, 352, **GLM)),
    "glm-4.5-air-tp8": (4096, make_spec(128, 8, 176, **GLM)),
    "ernie-4.5-21b-a3b-tp4": (2560, make_spec(64, 6, 384, **ERNIE)),
    "qwen3-30b-a3b-tp1": (2048, make_spec(128, 8, 768)),
    "mixtral-8x7b-tp8": (4096, make_spec(8, 2, 1792)),
    "deepseek-groups": (1024, make_spec(256, 8, 128, num_groups=8, top_groups=4, **GLM, scale=2.5)),
}  # intermediate_size is one rank's part
SHAPES = SMALL if IS_INTERPRETED else SMALL | LARGE
every_shape = pytest.mark.parametrize(("hidden", "spec"), SHAPES.values(), ids=SHAPES.keys())
# Compiling is what takes long: all plans with some of the shapes, some plans with all.
_THOROUGH = ("odd", "softmax", "glm-4.5-air-tp4", "ernie-4.5-21b-a3b-tp4")
_CASES = [
    (name, count)
    for name in SHAPES
    for count in (COUNTS if name in _THOROUGH or IS_INTERPRETED else FEW_COUNTS)
]
every_case = pytest.mark.parametrize(
    ("hidden", "spec", "count"),
    [(*SHAPES[name], count) for name, count in _CASES],
    ids=[f"{name}-{count}" for name, count in _CASES],
)


@dataclasses.dataclass
class Layer:
    """Random weights, on the device."""

    gate: Tensor
    bias: Tensor | None
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, hidden: int, spec: MoeSpec, dtype: torch.dtype = DTYPE) -> Layer:
        stacked, width = spec.num_experts + spec.num_shared, spec.intermediate_size

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device=DEVICE, dtype=dtype) * shape[-1] ** -0.5

        return cls(
            gate=normal(spec.num_experts, hidden, dtype=torch.float32 if spec.float32_gate else dtype),
            bias=torch.randn(spec.num_experts, device=DEVICE) * 0.05 if spec.has_bias else None,
            gate_up=normal(stacked, 2 * width, hidden),
            down=normal(stacked, hidden, width),
        )


@pytest.fixture
def fused() -> Any:
    """The module of kernels."""
    pytest.importorskip("triton")
    from tpworker.kernels import moe_kernels

    return moe_kernels


@pytest.fixture
def routing() -> Any:
    """The module of the router's kernels."""
    pytest.importorskip("triton")
    from tpworker.kernels import moe_routing

    return moe_routing


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def inputs(count: int, hidden: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(count, hidden, device=DEVICE).to(dtype)


def random_choices(count: int, spec: MoeSpec) -> tuple[Tensor, Tensor]:
    """Any experts with the same chance, and the shared ones; weights of 0 to 1."""
    chosen = torch.rand(count, spec.num_experts, device=DEVICE).argsort(-1)[:, : spec.experts_per_token]
    shared = torch.arange(spec.num_experts, spec.num_experts + spec.num_shared, device=DEVICE)
    ids = torch.cat((chosen, shared.expand(count, -1)), -1).to(torch.int32)
    return ids, torch.rand(ids.shape, device=DEVICE)


def reference(x: Tensor, ids: Tensor, weights: Tensor, layer: Layer) -> Tensor:
    """In float32: in bfloat16 torch rounds more often than the kernels do."""
    result = moe.experts(x.float(), ids, weights, layer.gate_up.float(), layer.down.float())
    return result.to(x.dtype)


# ---------------------------------------------------------------------------------------------- routing


@every_case
def test_route(routing: Any, hidden: int, spec: MoeSpec, count: int) -> None:
    """The reference's choices, but where two experts are equal but for rounding."""
    layer, x = Layer.of(hidden, spec), inputs(count, hidden)
    ids, weights = routing.route(x, layer.gate, layer.bias, spec)
    expected_ids, expected = moe.route(x, layer.gate, layer.bias, spec)
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    is_same = ids == expected_ids
    assert float(is_same.float().mean()) > 0.998
    torch.testing.assert_close(weights[is_same], expected[is_same], rtol=1e-3, atol=1e-6)
    again = routing.route(x, layer.gate, layer.bias, spec)
    assert torch.equal(ids, again[0])
    assert torch.equal(weights, again[1])


@every_shape
def test_of_equal_experts_the_lower_ones(routing: Any, hidden: int, spec: MoeSpec) -> None:
    x, layer = inputs(3, hidden), Layer.of(hidden, spec)
    bias = torch.zeros(spec.num_experts, device=DEVICE) if spec.has_bias else None
    ids, weights = routing.route(x, torch.zeros_like(layer.gate), bias, spec)
    assert torch.equal(ids, moe.route(x, torch.zeros_like(layer.gate), bias, spec)[0])
    assert ids[0].tolist() == [
        *range(spec.experts_per_token),
        *range(spec.num_experts, spec.num_experts + spec.num_shared),
    ]
    assert weights.isfinite().all()


@every_shape
def test_what_is_not_a_number_still_has_experts(fused: Any, routing: Any, hidden: int, spec: MoeSpec) -> None:
    """A row of NaN (a padding row may hold anything) must not lead the products out of their weights."""
    layer, x = Layer.of(hidden, spec), inputs(4, hidden)
    x[2] = torch.nan
    ids, weights = routing.route(x, layer.gate, layer.bias, spec)
    expected_ids, _ = routing.route(x[:2], layer.gate, layer.bias, spec)
    assert ids.min() >= 0
    assert ids.max() < spec.num_experts + spec.num_shared
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert torch.equal(ids[:2], expected_ids)
    result = fused.experts(x, ids, weights, layer.gate_up, layer.down)
    assert result[[0, 1, 3]].isfinite().all(), "a row's result is its own"


# ---------------------------------------------------------------------------------------------- experts


@every_case
def test_experts(fused: Any, hidden: int, spec: MoeSpec, count: int) -> None:
    layer, x = Layer.of(hidden, spec), inputs(count, hidden)
    ids, weights = random_choices(count, spec)
    result = fused.experts(x, ids, weights, layer.gate_up, layer.down)
    near(result, reference(x, ids, weights, layer))
    again = fused.experts(x, ids, weights, layer.gate_up, layer.down)
    assert torch.equal(result, again), "the same sums in the same order"


@every_case
def test_all_tokens_to_the_same_experts(fused: Any, hidden: int, spec: MoeSpec, count: int) -> None:
    """Most experts have no tokens, some have all of them."""
    layer, x = Layer.of(hidden, spec), inputs(count, hidden)
    ids, weights = random_choices(count, spec)
    ids[:] = ids[0].clone()
    result = fused.experts(x, ids, weights, layer.gate_up, layer.down)
    near(result, reference(x, ids, weights, layer))


@pytest.mark.parametrize("name", ["softmax", "all"])
@pytest.mark.parametrize(
    ("count", "rows", "is_sorted"),
    [(9, 16, False), (3, 32, False), (30, 32, False), (20, 16, True), (37, 16, True), (37, 64, True)],
)
def test_every_way(fused: Any, name: str, count: int, rows: int, is_sorted: bool) -> None:
    """Choices found by the programs themselves, and sorted beforehand, in one tile an expert or several."""
    hidden, spec = SMALL[name]
    plan = fused.Plan(rows, is_sorted, fused.Tile(32, 64, 4, 3), fused.Tile(64, 32, 4, 3))
    layer, x = Layer.of(hidden, spec), inputs(count, hidden)
    ids, weights = random_choices(count, spec)
    result = fused.experts_by(plan, x, ids, weights, layer.gate_up, layer.down)
    near(result, reference(x, ids, weights, layer))


@on_gpu
@pytest.mark.parametrize("name", ["softmax", "groups"])
@pytest.mark.parametrize("count", [1, 64, 575])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(fused: Any, routing: Any, name: str, count: int, dtype: torch.dtype) -> None:
    hidden, spec = SMALL[name]
    layer, x = Layer.of(hidden, spec, dtype), inputs(count, hidden, dtype)
    ids, weights = routing.route(x, layer.gate, layer.bias, spec)
    expected_ids, expected = moe.route(x, layer.gate, layer.bias, spec)
    is_same = ids == expected_ids
    assert float(is_same.float().mean()) > 0.998
    torch.testing.assert_close(weights[is_same], expected[is_same], rtol=1e-3, atol=1e-6)
    result = fused.experts(x, ids, weights, layer.gate_up, layer.down)
    near(result, reference(x, ids, weights, layer), 1e-3 if dtype == torch.float16 else 1e-5)


@on_gpu
@pytest.mark.parametrize("name", ["glm-4.5-air-tp4", "ernie-4.5-21b-a3b-tp4"])
@pytest.mark.parametrize("count", [1, 4, 16, 64, 256])
def test_a_layer_in_a_graph(fused: Any, routing: Any, name: str, count: int) -> None:
    """Router and experts, captured twice in a row; replayed with inputs that go to other experts."""
    hidden, spec = LARGE[name]
    layer, source = Layer.of(hidden, spec), inputs(count, hidden)

    def work() -> Tensor:
        x = source
        for _ in range(2):
            ids, weights = routing.route(x, layer.gate, layer.bias, spec)
            x = fused.experts(x, ids, weights, layer.gate_up, layer.down)
            x = x / x.float().std(-1, keepdim=True).to(x.dtype)
        return x

    graph, result = captured(work)
    for replay in range(8):
        source.copy_(inputs(count, hidden))
        if replay % 4 == 3:
            source.copy_(source[:1].expand_as(source).clone())  # all tokens alike
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, work()), "with a graph or without, bit by bit"
        assert result.isfinite().all()
    ids, weights = routing.route(source, layer.gate, layer.bias, spec)
    result = fused.experts(source, ids, weights, layer.gate_up, layer.down)
    near(result, reference(source, ids, weights, layer))


@on_gpu
def test_what_the_benchmark_compares_with() -> None:
    """The layer of torch's own parts is the same layer."""
    from benchmarks.steps.moe import library_layer

    hidden, spec = LARGE["ernie-4.5-21b-a3b-tp4"]
    layer, x = Layer.of(hidden, spec), inputs(20, hidden)
    result = library_layer(x, layer.gate, layer.bias, spec, layer.gate_up, layer.down)
    near(result, reference(x, *moe.route(x, layer.gate, layer.bias, spec), layer), 1e-2)
