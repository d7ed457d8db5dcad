"""CUDA kernels against their torch references, FlashAttention 3 against the paged reference, and a decoder.

With TRITON_INTERPRET=1 and Triton installed, the fused kernels' tests run on the CPU, in its interpreter.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from tests.model.helpers import CPU, SPEC, Work, make_batch, shuffled_tables, tiny_model
from tests.model.test_sampling import logits_of, rows_of, through_slots
from tpworker.checkpoint.weights import dummy_weights, load_weights
from tpworker.kernels.operands import Normed, SamplingRows
from tpworker.model import composed_ops, layer_ops, torch_operations
from tpworker.model.attention import choose, flash
from tpworker.model.attention.paged import PagedAttention
from tpworker.model.attention.split import SplitAttention
from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder, KVCache
from tpworker.model.families import RopeSpec, read_spec
from tpworker.model.operations import operations_of
from tpworker.model.rope import rope_tables
from tpworker.model.sampling import SamplingMode, gumbel_noise, sample
from tpworker.model.tp import Shard
from tpworker.rank.collectives import SoleRank

CONFIG_FOLDER = Path(__file__).parents[2] / "benchmarks" / "configs"
HAS_GPU = torch.cuda.is_available()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not HAS_GPU
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no CUDA device")
on_hopper = pytest.mark.skipif(
    not HAS_GPU or flash.why_not(128, torch.bfloat16, DEVICE) is not None,
    reason=f"no FlashAttention 3: {flash.why_not(128, torch.bfloat16, DEVICE)}",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one rank has: hidden size, query and key-value heads, size of a head, MLP width, vocabulary."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocab: int
    has_norm: bool = True
    rotary_dim: int | None = None  # None: all of a head


SHAPES = {
    "qwen3-0.6b": Shape(1024, 16, 8, 128, 3072, 151936),
    "qwen3-8b": Shape(4096, 32, 8, 128, 12288, 151936),
    "qwen3-8b-tp2": Shape(4096, 16, 4, 128, 6144, 75968),
    "qwen3-8b-tp4": Shape(4096, 8, 2, 128, 3072, 37984),
    "smollm2": Shape(576, 9, 3, 64, 1536, 49152, has_norm=False),
    "smollm2-tp2": Shape(576, 6, 2, 64, 768, 24576, has_norm=False),
    "glm-4.5-air-tp4": Shape(4096, 24, 2, 128, 2736, 37888, has_norm=False, rotary_dim=64),
    "odd": Shape(72, 5, 1, 20, 100, 131, rotary_dim=12),
}
ROWS = (1, 3) if IS_INTERPRETED else (1, 16, 64, 256)
# The interpreter cuts off what bfloat16 should round.
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.bfloat16, torch.float32)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
# Kernels that take long to compile: in float32, which nobody serves, for some shapes alone.
_FEW = ("smollm2-tp2", "glm-4.5-air-tp4", "odd")
_CASES = [(name, dtype) for name in SHAPES for dtype in DTYPES if dtype == DTYPES[0] or name in _FEW]
every_case = pytest.mark.parametrize(
    ("shape", "dtype"), [(SHAPES[name], dtype) for name, dtype in _CASES], ids=[f"{n}-{d}" for n, d in _CASES]
)
every_count = pytest.mark.parametrize("count", ROWS)


@pytest.fixture
def fused() -> Any:
    """The module of kernels."""
    pytest.importorskip("triton")
    from tpworker.kernels import triton_kernels

    return triton_kernels


@pytest.fixture
def sampling() -> Any:
    """The module of those that choose tokens."""
    pytest.importorskip("triton")
    from tpworker.kernels import sampling_kernel

    return sampling_kernel


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def near(result: Tensor, reference: Tensor, tolerance: float | None = None) -> None:
    """The error's norm is small against the reference's; nothing is missing or not finite."""
    reference = reference.to(result.device)
    tolerance = tolerance or {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(result.dtype, 1e-5)
    assert result.shape == reference.shape
    assert result.dtype == reference.dtype
    assert result.isfinite().all()
    error = (result.double() - reference.double()).norm() / reference.double().norm()
    assert float(error) < tolerance


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Made on the CPU, fresh in every call."""
    return (torch.randn(shape) * scale).to(dtype)


# --------------------------------------------------------------------------------------- fused kernels


@every_shape
@every_count
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm(fused: Any, shape: Shape, count: int, dtype: torch.dtype) -> None:
    x, summand = randn(count, shape.hidden, dtype=dtype), randn(count, shape.hidden, dtype=dtype)
    weight = randn(shape.hidden, dtype=dtype)
    x_there = x.to(DEVICE, copy=True)
    near(fused.add_norm(x_there, None, weight.to(DEVICE), 1e-6), layer_ops.add_norm(x, None, weight, 1e-6))
    assert torch.equal(x_there.cpu(), x)
    normed = fused.add_norm(x_there, summand.to(DEVICE), weight.to(DEVICE), 1e-6)
    near(normed, layer_ops.add_norm(x, summand, weight, 1e-6))
    assert torch.equal(x_there.cpu(), x), "the residual stream is the same, bit by bit"


@every_shape
@every_count
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(fused: Any, shape: Shape, count: int, dtype: torch.dtype) -> None:
    gate_up = randn(count, 2 * shape.width, dtype=dtype)
    near(fused.silu_mul(gate_up.to(DEVICE)), layer_ops.silu_mul(gate_up))


@every_shape
@every_count
@pytest.mark.parametrize(("block_size", "dtype"), [(16, DTYPES[0]), (64, DTYPES[-1])])
def test_norm_rotate_store(fused: Any, shape: Shape, count: int, block_size: int, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(
        SPEC, num_layers=1, num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim
    )
    num_blocks = 2 * count + 2
    caches = [
        KVCache(spec, Shard.of(spec, 0, 1), num_blocks, block_size, dtype, device) for device in (CPU, DEVICE)
    ]
    heads = randn(count, shape.heads + 2 * shape.kv_heads, shape.head_dim, dtype=dtype)
    weights = (randn(shape.head_dim, dtype=dtype), randn(shape.head_dim, dtype=dtype))
    tables = (torch.randperm(2 * count) + 1).view(count, 2).to(torch.int32)
    positions = torch.randint(0, 2 * block_size, (count,))
    batch = Batch(positions, positions, torch.arange(count), tables, positions, positions, count, 1)
    cos, sin = rope_tables(RopeSpec(theta=1e4), shape.rotary_dim or shape.head_dim, 2 * block_size, CPU)
    arrays = (positions, batch.sequence_of, tables, cos, sin)
    places = layer_ops.places(*arrays, block_size)
    there = fused.places(*(x.to(DEVICE) for x in arrays), block_size)
    for ours, theirs in zip(there, places, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    norms = weights if shape.has_norm else None
    query = layer_ops.norm_rotate_store(heads, norms, 1e-6, places, caches[0].keys[0], caches[0].values[0])
    result = fused.norm_rotate_store(
        heads.to(DEVICE),
        (weights[0].to(DEVICE), weights[1].to(DEVICE)) if shape.has_norm else None,
        1e-6,
        there,
        caches[1].keys[0],
        caches[1].values[0],
    )
    near(result, query)
    near(caches[1].keys[0], caches[0].keys[0])
    assert torch.equal(caches[1].values[0].cpu(), caches[0].values[0])


def product_case(
    count: int, size_in: int, size_out: int, has_bias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Input, weight, bias, and the product in float32."""
    x, weight = randn(count, size_in, dtype=dtype), randn(size_out, size_in, dtype=dtype, scale=0.05)
    bias = randn(size_out, dtype=dtype) if has_bias else None
    x, weight, bias = (None if y is None else y.to(DEVICE) for y in (x, weight, bias))
    assert x is not None
    assert weight is not None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    return x, weight, bias, expected.float()


def gate(product: Tensor) -> Tensor:
    """The reference on the CPU."""
    return layer_ops.silu_mul(product.cpu())


def gated_tolerance(dtype: torch.dtype) -> float | None:
    """Gate and up are rounded before they are multiplied, and may round apart."""
    return 1e-2 if dtype == torch.bfloat16 else None


@every_case
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_of_one_row(fused: Any, shape: Shape, has_bias: bool, dtype: torch.dtype) -> None:
    from tpworker.kernels import skinny_kernel

    for size_in, size_out in ((shape.hidden, 2 * shape.width), (shape.width, shape.hidden)):
        x, weight, bias, expected = product_case(1, size_in, size_out, has_bias, dtype)
        for rule in (skinny_kernel.OneRow(), skinny_kernel.OneRow(4, 256)):
            near(skinny_kernel.multiply(x, weight, bias, rule), expected.to(dtype))
            result = skinny_kernel.multiply(x, weight, bias, rule, gated=True)
            near(result, gate(expected.to(dtype)), gated_tolerance(dtype))


hopper = pytest.mark.skipif(
    not HAS_GPU or torch.cuda.get_device_capability()[0] != 9, reason="there is no Hopper GPU"
)
CUTS = [
    {"outputs": 64, "step": 64},
    {"outputs": 128, "step": 64, "stages": 3, "warps": 8},
    {"outputs": 64, "step": 128, "splits": 4, "stages": 3},
    {"outputs": 64, "step": 128, "splits": 8, "stages": 6},
]


@hopper
@pytest.mark.parametrize("count", [1, 2, 16, 23, 64])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_products_of_few_rows(fused: Any, count: int, cut: dict[str, Any]) -> None:
    """Parts of a row of the weight included; what is not a multiple of anything, too."""
    from tpworker.kernels import few_rows, skinny_kernel

    dtype = torch.bfloat16
    for size_in, size_out, has_bias in ((1024, 768, False), (1096, 152, True), (3072, 1024, True)):
        rule = few_rows.FewRows(**cut)
        x, weight, bias, expected = product_case(count, size_in, size_out, has_bias, dtype)
        for _ in range(2):
            near(skinny_kernel.multiply(x, weight, bias, rule), expected.to(dtype))
            result = skinny_kernel.multiply(x, weight, bias, rule, gated=True)
            near(result, gate(expected.to(dtype)), gated_tolerance(dtype))
        assert not few_rows.counters(x.device).any()


@pytest.mark.parametrize("name", ["qwen3-0.6b", "smollm2-tp2", "odd"])
@pytest.mark.parametrize(("has_bias", "dtype"), [(False, DTYPES[0]), (True, DTYPES[-1])])
def test_sums_and_norms_in_products_of_one_row(
    fused: Any, name: str, has_bias: bool, dtype: torch.dtype
) -> None:
    from tpworker.kernels import skinny_kernel

    rules = [skinny_kernel.OneRow(), skinny_kernel.OneRow(4, 256)]
    check_sums_and_norms(1, SHAPES[name].width, SHAPES[name].hidden, has_bias, dtype, rules)


@hopper
@pytest.mark.parametrize("count", [1, 3, 16, 64])
@pytest.mark.parametrize("sizes", [(3072, 1024), (1096, 152)])
def test_sums_and_norms_in_products_of_few_rows(fused: Any, count: int, sizes: tuple[int, int]) -> None:
    from tpworker.kernels import few_rows

    rules = [few_rows.FewRows(**cut) for cut in CUTS]
    check_sums_and_norms(count, *sizes, count == 16, torch.bfloat16, rules)


def check_sums_and_norms(
    count: int, size_in: int, size: int, has_bias: bool, dtype: torch.dtype, rules: list[Any]
) -> None:
    """x += W a, and V RMSNorm(x), in the products' kernels: against one operation after the other."""
    from tpworker.kernels import skinny_kernel

    a, weight, bias, product = product_case(count, size_in, size, has_bias, dtype)
    x, norm = randn(count, size, dtype=dtype).to(DEVICE), randn(size, dtype=dtype).to(DEVICE)
    expected_x = x.cpu().clone()
    expected = layer_ops.add_norm(expected_x, product.to(dtype).cpu(), norm.cpu(), 1e-6)
    second = randn(520, size, dtype=dtype, scale=0.05).to(DEVICE)
    expected_product = (expected.double() @ second.cpu().double().T).to(dtype)
    tolerance = 1e-2 if dtype == torch.bfloat16 else None  # the norm's two factors are not rounded together
    for rule in rules:
        target = Normed(x.clone(), norm, 1e-6)
        skinny_kernel.multiply_add(a, weight, bias, rule, target)
        near(target.x, expected_x)
        near(composed_ops.tensor_of(operations_of(DEVICE), target), expected)
        for other in rules:
            near(skinny_kernel.multiply(target, second, None, other), expected_product, tolerance)
            result = skinny_kernel.multiply(target, second, None, other, gated=True)
            near(result, gate(expected_product), tolerance)


def on_device(rows: SamplingRows) -> SamplingRows:
    return SamplingRows(*(getattr(rows, field.name).to(DEVICE) for field in dataclasses.fields(rows)))


@every_shape
@every_count
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_tokens(sampling: Any, shape: Shape, count: int, dtype: torch.dtype) -> None:
    """In bfloat16 many logits are equal: the first must win. Some rows are -inf as a whole."""
    logits = logits_of(count, shape.vocab).to(dtype)
    logits[:, -3:] = -torch.inf
    if count > 1:
        logits[1] = -torch.inf
    best, token = sampling.best_tokens(logits.to(DEVICE), rows_of(count), False, 1000)
    values, index = logits.float().max(dim=-1)
    assert torch.equal(best.cpu(), values)
    assert torch.equal(token.cpu(), index + 1000)


@pytest.mark.parametrize("vocab", [131, 151936])
@pytest.mark.parametrize("random", [False] if IS_INTERPRETED else [False, True])
def test_tokens_by_logits_that_are_nan(sampling: Any, vocab: int, random: bool) -> None:
    """One in a row, of either sign, in any block, or nothing else: the first is taken, and marked."""
    logits = logits_of(8, vocab)
    there = on_device(rows_of(8, 1.0 if random else 0.0))
    _, plain = sampling.best_tokens(logits.to(DEVICE), there, random, 1000)
    logits[1, vocab - 1] = torch.nan
    logits[2, [3, vocab // 2]] = -torch.nan
    logits[4] = -torch.inf
    logits[4, vocab - 2] = torch.nan
    logits[5] = torch.nan
    best, token = sampling.best_tokens(logits.to(DEVICE), there, random, 1000)
    is_nan = logits.isnan().any(dim=1)
    assert torch.equal(best.isnan().cpu(), is_nan)
    assert token[is_nan].tolist() == [~(1000 + column) for column in (vocab - 1, 3, vocab - 2, 0)]
    assert torch.equal(token.cpu()[~is_nan], plain.cpu()[~is_nan])


@every_shape
@every_count
def test_random_tokens(sampling: Any, shape: Shape, count: int) -> None:
    """The reference's noise: a token may differ only where two scores are equal but for rounding."""
    logits = logits_of(count, shape.vocab).bfloat16()
    temperature = [(0.0, 0.7, 1.0, 3.0)[row % 4] for row in range(count)]
    seed = torch.randint(-(2**63), 2**63 - 1, (count,))
    rows = rows_of(count, temperature, seed=seed, position=torch.randint(0, 40000, (count,)).tolist())
    best, token = sampling.best_tokens(logits.to(DEVICE), on_device(rows), True, 777)
    there = on_device(rows)
    scores = logits.float().to(DEVICE) / torch.where(there.temperature == 0, 1.0, there.temperature)[:, None]
    noise = gumbel_noise(there.seed, there.position, torch.arange(777, 777 + shape.vocab, device=DEVICE))
    scores += noise.masked_fill_((there.temperature == 0)[:, None], 0)
    expected, index = scores.max(dim=-1)
    torch.testing.assert_close(best, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.gather(1, (token - 777)[:, None])[:, 0], expected, rtol=1e-6, atol=1e-6)
    assert int((token - 777 != index).sum()) <= count // 50


# ------------------------------------------------------------------------------------- CUDA throughout


def captured(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run once, then capture; host synchronisation inside is an error."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # what `work` reads is there
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = work()
    return graph, result


def batch_to(batch: Batch, device: torch.device) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()})


@on_gpu
@pytest.mark.parametrize(
    "mode",
    [SamplingMode(random, truncate, suppress)
     for random, truncate in ((False, False), (True, False), (True, True)) for suppress in (False, True)],
)  # fmt: skip
def test_sampling_in_a_graph(mode: SamplingMode) -> None:
    """Whole `sample`, captured: the CPU's tokens, also after the rows' seeds and positions have changed."""
    count, vocab = 16, 5000
    logits = logits_of(count, vocab, scale=3.0).bfloat16()
    temperature = [(0.0, 0.7, 1.0, 3.0)[row % 4] if mode.random else 0.0 for row in range(count)]
    top_p, top_k = ([0.9, 1.0] * 8, [0, 20, 7, 0] * 4) if mode.truncate else (1.0, 0)
    stops = [[1, 2, int(logits[0].argmax())]]
    rows = rows_of(count, temperature, top_p, top_k, min_length=20 * mode.suppress, stop_ids=stops)
    there, source = through_slots(rows, mode, DEVICE), logits.to(DEVICE)
    work = torch.empty_like(logits, device=DEVICE)

    def step() -> Tensor:
        return sample(operations_of(DEVICE), work.copy_(source), there, mode, 0, SoleRank())

    graph, tokens = captured(step)
    equal = 0
    for seed in range(4):
        rows.seed += seed
        rows.position += 9 * seed
        for ours, theirs in ((there.seed, rows.seed), (there.position, rows.position)):
            ours.copy_(theirs[: len(ours)])  # none where the mode does not look at it
        graph.replay()
        expected = sample(torch_operations, logits.float(), rows, mode, 0, SoleRank())
        equal += int((tokens.cpu() == expected).sum())
    assert equal >= 4 * count - 1  # logarithms of CPU and GPU may round apart


def attention_case(
    shape: Shape, block_size: int, decodes: list[int], chunks: list[tuple[int, int]]
) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """A batch of decoding sequences of these lengths and chunks (start, length), and its tensors."""
    spans = [(length - 1, 1) for length in decodes] + chunks
    plan = [Work(s, start, [0] * length, decode=s < len(decodes)) for s, (start, length) in enumerate(spans)]
    longest = 64 * -(-max(start + length for start, length in spans) // 64) + 128
    num_blocks = 1 + len(spans) * -(-longest // block_size)
    tables = shuffled_tables(len(spans), longest, block_size, num_blocks)
    cache = (num_blocks, block_size, shape.kv_heads, shape.head_dim)
    batch = make_batch(plan, tables, block_size)
    queries = randn(len(batch.token_ids), shape.heads, shape.head_dim, scale=2.0)
    return batch, queries, randn(*cache), randn(*cache)


def reference_attention(shape: Shape, batch: Batch, *tensors: Tensor) -> Tensor:
    paged = PagedAttention(shape.heads, shape.kv_heads, shape.head_dim, torch.float32)
    queries, keys, values = (x.float() for x in tensors)
    return paged(queries, keys, values, paged.prepare(batch, keys.shape[1]))


def split_attention(shape: Shape, processors: int = 132) -> SplitAttention:
    others = PagedAttention(shape.heads, shape.kv_heads, shape.head_dim, torch.float32)
    return SplitAttention(shape.heads, shape.kv_heads, shape.head_dim, others, processors)


@every_case
@pytest.mark.parametrize(
    ("lengths", "block_size"), [([650], 16), ([1, 17, 300, 64, 63, 65, 31], 64), ([5] * 40, 16)]
)
def test_split_attention(
    fused: Any, shape: Shape, block_size: int, dtype: torch.dtype, lengths: list[int]
) -> None:
    batch, *tensors = attention_case(shape, block_size, lengths, [])
    queries, keys, values = (x.to(dtype) for x in tensors)
    expected = reference_attention(shape, batch, queries, keys, values).to(dtype)
    attention = split_attention(shape, 20 if IS_INTERPRETED else 132)
    there = batch_to(batch, DEVICE)
    plan = attention.prepare(there, block_size)
    for _ in range(2):  # as two layers would
        near(attention(queries.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), plan), expected)


@every_case
@pytest.mark.parametrize("lengths", [[650], [1, 2, 17, 300, 64, 63, 65, 31], [5] * 40])
def test_store_and_attend(fused: Any, shape: Shape, dtype: torch.dtype, lengths: list[int]) -> None:
    """Heads as the product leaves them: attention and what the cache holds then, against the reference."""
    batch, _, keys, values = attention_case(shape, 16, lengths, [])
    heads = randn(len(lengths), shape.heads + 2 * shape.kv_heads, shape.head_dim, dtype=dtype)
    norms = (randn(shape.head_dim, dtype=dtype), randn(shape.head_dim, dtype=dtype))
    cos, sin = rope_tables(RopeSpec(theta=1e4), shape.rotary_dim or shape.head_dim, 1024, CPU)
    spec = dataclasses.replace(
        SPEC, num_layers=1, num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim
    )
    results = []
    for device in (CPU, DEVICE):
        cache = KVCache(spec, Shard.of(spec, 0, 1), len(keys), 16, dtype, device)
        cache.keys[0].copy_(keys)
        cache.values[0].copy_(values)
        there = batch_to(batch, device)
        others = PagedAttention(shape.heads, shape.kv_heads, shape.head_dim, dtype)
        attention = SplitAttention(shape.heads, shape.kv_heads, shape.head_dim, others, 132)
        arrays = (
            there.positions,
            there.sequence_of,
            there.block_tables,
            cos.to(device),
            sin.to(device),
        )
        attend = partial(composed_ops.store_and_attend, operations_of(device))
        kv = (cache.keys[0], cache.values[0])
        here = (heads.to(device), tuple(norm.to(device) for norm in norms) if shape.has_norm else None)
        if device == DEVICE and len(results):
            places = fused.places(*arrays, 16)
            plan = attention.prepare(there, 16)
            for _ in range(2):
                out = attend(attention, plan, *here, 1e-6, places, *kv)
        else:
            places = layer_ops.places(*arrays, 16)
            plan = others.prepare(there, 16)
            out = attend(others, plan, *here, 1e-6, places, *kv)
        results.append((out, cache.keys[0], cache.values[0]))
    for result, reference in zip(results[1], results[0], strict=True):
        near(result, reference)
    assert torch.equal(results[1][2].cpu(), results[0][2])


@on_hopper
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "odd"])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("share_schedule", [True, False])
@pytest.mark.parametrize(
    ("decodes", "chunks"),
    [
        ([650], []),
        ([1, 17, 600, 1300, 64, 63, 65], []),
        ([], [(0, 200)]),
        ([], [(100, 70), (0, 1), (64, 64)]),
        ([650, 3, 129], [(0, 130), (512, 257)]),
    ],
)
def test_flash_attention(
    name: str, block_size: int, share_schedule: bool, decodes: list[int], chunks: list[tuple[int, int]]
) -> None:
    shape = SHAPES[name]
    batch, *tensors = attention_case(shape, block_size, decodes, chunks)
    expected = reference_attention(shape, batch, *tensors).bfloat16()
    attention = flash.FlashAttention(
        shape.heads, shape.kv_heads, shape.head_dim, torch.bfloat16, share_schedule=share_schedule
    )
    queries, keys, values = (x.to(DEVICE) for x in tensors)
    near(attention(queries, keys, values, attention.prepare(batch_to(batch, DEVICE), block_size)), expected)


BACKENDS: dict[str, Callable[[Shape], Any]] = {
    "split": split_attention,
    "flash": lambda shape: flash.FlashAttention(
        shape.heads, shape.kv_heads, shape.head_dim, torch.bfloat16, share_schedule=False
    ),
    "flash-shared": lambda shape: flash.FlashAttention(
        shape.heads, shape.kv_heads, shape.head_dim, torch.bfloat16
    ),
}


@on_hopper
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 4, 64, 256])
def test_attention_replays_at_other_lengths(count: int, backend: str) -> None:
    """Captured at a length of 1 each, as a start-up would; rows of length 0 stay finite."""
    shape = SHAPES["qwen3-8b-tp2"]
    batch, *tensors = attention_case(shape, 16, [1400 if count < 64 else 300] * count, [])
    there = batch_to(batch, DEVICE)
    there.lengths.fill_(1)
    attention = BACKENDS[backend](shape)
    queries, keys, values = (x.to(DEVICE) for x in tensors)
    longest = int(batch.lengths.max())

    def step() -> Tensor:
        return attention(queries, keys, values, attention.prepare(there, 16))

    graph, result = captured(step)
    for _ in range(4):
        lengths = torch.randint(0 if count > 1 else 1, longest + 1, (count,), dtype=torch.int32)
        lengths[0] = longest
        there.lengths.copy_(lengths)
        result.fill_(torch.nan)
        graph.replay()
        batch.lengths = lengths
        expected = reference_attention(shape, batch, *tensors).bfloat16()
        assert result.isfinite().all()
        near(result[lengths.to(DEVICE) > 0], expected[lengths > 0])


@on_hopper
def test_flash_attention_is_chosen_where_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    chosen = choose(16, 8, 128, torch.bfloat16, DEVICE)
    assert isinstance(chosen, SplitAttention)
    assert isinstance(chosen.others, flash.FlashAttention)
    assert "FlashAttention 3" in caplog.text
    caplog.clear()
    chosen = choose(16, 8, 128, torch.float32, DEVICE)
    assert isinstance(chosen, SplitAttention)
    assert isinstance(chosen.others, PagedAttention)
    assert "float32" in caplog.text
    with pytest.raises(ValueError, match="--block-size 128"):
        flash.FlashAttention(16, 8, 128, torch.bfloat16).prepare(attention_case(
            SHAPES["qwen3-8b"], 128, [5], [])[0], 128)  # fmt: skip


# ------------------------------------------------------------- kernels that start before others have ended


def differing_replays(work: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch, replays: int) -> int:
    """How many replays with early starts gave other bits than kernels launched one after the other."""
    from tpworker.kernels import pdl

    monkeypatch.setattr(pdl, "ENABLED", False)
    plain, expected = captured(work)
    monkeypatch.setattr(pdl, "ENABLED", True)
    early, result = captured(work)
    plain.replay()
    assert expected.isfinite().all()
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(replays):
        early.replay()
        differing += (result != expected).any()
    return int(differing)


@on_hopper
def test_early_starts_beside_copies_and_joins(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after copies, fills and another stream's work, which are launched plainly."""
    weight, source = randn(4096).to(DEVICE), randn(8, 4096).to(DEVICE)
    x, zeros, side = torch.empty_like(source), torch.empty_like(source), torch.cuda.Stream()

    def work() -> Tensor:
        x.copy_(source)
        first = fused.add_norm(x, None, weight, 1e-6)
        zeros.zero_()
        second = fused.add_norm(first, zeros, weight, 1e-6)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            doubled = second * 2
        torch.cuda.current_stream().wait_stream(side)
        return fused.silu_mul(fused.add_norm(doubled, second, weight, 1e-6))

    assert differing_replays(work, monkeypatch, 2000) == 0


@on_hopper
@pytest.mark.parametrize("count", [1, 3, 16, 64])
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b"])
def test_early_starts_change_no_bit(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few layers of a model, over and over: a kernel that did not wait would be seen."""
    spec = dataclasses.replace(read_spec(CONFIG_FOLDER / name), num_layers=3)
    shard = Shard.of(spec, 0, 1)
    decoder = Decoder(spec, dummy_weights(spec, shard, torch.bfloat16, DEVICE), shard, SoleRank(), 1024)
    cache = KVCache(spec, shard, 1 + 32 * count, 16, torch.bfloat16, DEVICE)
    for layer in (*cache.keys, *cache.values):
        layer.normal_()
    lengths = torch.randint(1, 500, (count,)).tolist()
    plan = [Work(slot, length - 1, [slot + 5], True) for slot, length in enumerate(lengths)]
    batch = batch_to(make_batch(plan, shuffled_tables(count, 512, 16, 1 + 32 * count), 16), DEVICE)

    def work() -> Tensor:
        return decoder.logits(decoder.forward(batch, cache))

    assert differing_replays(work, monkeypatch, 1000) == 0


CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(
        vocab_size=1031, hidden_size=256, intermediate_size=520, num_hidden_layers=3, head_dim=128,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    ),
    "smollm2": lambda: LlamaConfig(
        vocab_size=1031, hidden_size=576, intermediate_size=520, num_hidden_layers=3, head_dim=64,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=256,
    ),
}  # fmt: skip


@on_hopper
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("is_split", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_on_cuda(name: str, is_split: bool, block_size: int, tmp_path: Path) -> None:
    """A prompt in chunks, then decode steps by one captured graph, against transformers in float32."""
    model = tiny_model(tmp_path, CONFIGS[name]())
    ids = torch.randint(0, 1031, (2, 60))
    reference = model(ids).logits
    spec = read_spec(tmp_path)
    shard = Shard.of(spec, 0, 1)
    weights = load_weights(tmp_path, spec, shard, torch.bfloat16, DEVICE)
    decoder = Decoder(spec, weights, shard, SoleRank(), 256)
    assert isinstance(decoder.attention, SplitAttention)
    if not is_split:
        decoder = Decoder(spec, weights, shard, SoleRank(), 256, decoder.attention.others)
    check_on_cuda(decoder, ids, reference, block_size)


def check_on_cuda(decoder: Decoder, ids: Tensor, reference: Tensor, block_size: int) -> None:
    """Token ids [2, 60] in every kind of step, of one rank in bfloat16, against logits of them in float32."""
    spec, shard = decoder.spec, decoder.shard
    cache = KVCache(spec, shard, 64, block_size, torch.bfloat16, DEVICE)
    tables = shuffled_tables(2, 128, block_size, 64)

    def compute(*plan: Work) -> Tensor:
        batch = batch_to(make_batch(plan, tables, block_size), DEVICE)
        return decoder.logits(decoder.forward(batch, cache)).float()[:, : spec.vocab_size]

    near(compute(Work(0, 0, ids[0, :30].tolist())), reference[0, :30], 0.03)
    mixed = compute(Work(0, 30, [int(ids[0, 30])], True), Work(1, 0, ids[1, :20].tolist()))
    near(mixed, torch.cat([reference[0, 30:31], reference[1, :20]]), 0.03)
    near(compute(Work(1, 20, ids[1, 20:31].tolist())), reference[1, 20:31], 0.03)

    state = batch_to(make_batch([Work(s, 31, [int(ids[s, 31])], True) for s in (0, 1)], tables, block_size),
                     DEVICE)  # fmt: skip
    graph, logits = captured(lambda: decoder.logits(decoder.forward(state, cache)))
    for position in range(31, 60):
        state.token_ids.copy_(ids[:, position])
        state.positions.fill_(position)
        state.lengths.fill_(position + 1)
        graph.replay()
        near(logits.float()[:, : spec.vocab_size], reference[:, position], 0.03)


@on_gpu
def test_padding_is_minus_infinity_and_never_sampled() -> None:
    logits = torch.zeros(4, 64, dtype=torch.bfloat16, device=DEVICE)
    logits[:, 60:] = -torch.inf
    rows = through_slots(rows_of(4, [0.0, 0.5, 1.0, 9.0]), SamplingMode(True, False, False), DEVICE)
    tokens = sample(operations_of(DEVICE), logits, rows, SamplingMode(True, False, False), 0, SoleRank())
    assert int(tokens.max()) < 60
    assert int(tokens[0]) == 0
