"""From published tensors to a rank's: which make up which, in what order, and of what layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tpworker.checkpoint.fp8 import Part, block_of, empty_weight, fill_made, fill_weight
from tpworker.checkpoint.regions import Region
from tpworker.errors import ModelError
from tpworker.kernels.operands import Fp8Weight, Matrix
from tpworker.kernels.operations import Operations
from tpworker.model.families import FAMILIES, ModelSpec, MoeNames, MoeSpec, WeightNames
from tpworker.model.fp8 import dequantise
from tpworker.model.linear import can_pack
from tpworker.model.mlp import Mlp
from tpworker.model.moe import Moe
from tpworker.model.operations import operations_of
from tpworker.model.tp import Shard, Split
from tpworker.model.weights import DecoderWeights, LayerWeights, MtpWeights

Fill = Callable[[Tensor, str, int, Split], None]
"""fill(out, name, dim, split): write this rank's part of a published tensor into `out`, which holds zeros."""

EachLayer = Callable[[Callable[[int], LayerWeights], Iterable[int]], Iterable[LayerWeights]]


def assemble(
    spec: ModelSpec,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill | None,
    *,
    with_mtp: bool = False,
    layers: EachLayer = map,
    sized_for: torch.device | None = None,
    regions: Sequence[Region] | None = None,
) -> DecoderWeights:
    """Build every tensor of a rank; `fill` is called for each published tensor that it is made of.

    Args:
        fill: None: nothing is filled or changed, as the regions hold what an earlier process built, or only
            sizes are wanted.
        with_mtp: the head for multi-token prediction, too; the spec has one.
        layers: as `map`, and may run several at once.
        sized_for: where the weights would be, if `device` is the meta device.
        regions: `num_regions` of them, on `device`, to have all tensors in; None: each has its own memory.
    """
    names = FAMILIES[spec.family].names
    operations = operations_of(device)
    build = _Builder(spec, shard, dtype, device, sized_for or device, fill, operations)
    if regions is not None:
        build = replace(build, region=regions[-1])

    def layer(number: int) -> LayerWeights:
        own = build if regions is None else replace(build, region=regions[number])
        return own.layer(number)

    embed = build.rows([(f"{names.embed}.weight", shard.vocab)])
    built = tuple(layers(layer, range(spec.num_layers + with_mtp)))
    final_norm = build.norm(names.final_norm, spec.hidden_size)
    head = embed if spec.tie_embeddings else build.rows([(f"{names.lm_head}.weight", shard.vocab)])
    mtp = build.mtp(built[-1], final_norm) if with_mtp else None
    return DecoderWeights(embed, built[: spec.num_layers], final_norm, operations.linear(head), mtp)


def num_regions(spec: ModelSpec, with_mtp: bool) -> int:
    """One for each layer, the head's too, and one for all that is in none."""
    return spec.num_layers + with_mtp + 1


@dataclass(frozen=True, slots=True)
class _Builder:
    """Allocates zeros and has them filled. Plain weights are dropped as soon as they are packed.

    What is changed once it is filled is changed only where `fills`.
    """

    spec: ModelSpec
    shard: Shard
    dtype: torch.dtype
    device: torch.device
    sized_for: torch.device
    filler: Fill | None
    operations: Operations
    region: Region | None = None

    # ------------------------------------------------------------------------------ parts of a layer

    def layer(self, number: int) -> LayerWeights:
        """One layer; number `num_layers` is that of the head for multi-token prediction."""
        spec, heads = self.spec, self.shard.heads
        names = FAMILIES[spec.family].names
        is_mtp = number == spec.num_layers
        names = names.of_mtp(number) if is_mtp else names.of_layer(number)
        queries = heads.queries.scaled(spec.head_dim)
        keys = heads.keys.scaled(spec.head_dim)
        is_mixture = spec.moe is not None and number in spec.moe.layers
        if is_mtp:
            assert spec.mtp is not None
            is_mixture = spec.mtp.has_experts
        return LayerWeights(
            attention_norm=self.norm(names.attention_norm, spec.hidden_size),
            qkv=self.qkv(names, queries, keys),
            query_norm=self.norm(names.query_norm, spec.head_dim) if spec.qk_norm else None,
            key_norm=self.norm(names.key_norm, spec.head_dim) if spec.qk_norm else None,
            output=self.row_linear(names.output, queries, spec.output_bias),
            mlp_norm=self.norm(names.mlp_norm, spec.hidden_size),
            mlp=self.moe(names) if is_mixture else self.mlp(names),
            attention_post_norm=self.post_norm(names.attention_post_norm),
            mlp_post_norm=self.post_norm(names.mlp_post_norm),
            is_local=spec.window is not None and number in spec.window.layers,
        )

    def qkv(self, names: WeightNames, queries: Split, keys: Split) -> Matrix:
        """All query heads, then keys, then values."""
        parts = [(names.query, queries), (names.key, keys), (names.value, keys)]
        rotated = queries.local + keys.local if self.spec.rope.interleaved else 0
        weight, bias = self.columns(parts, self.spec.qkv_bias, to_halves=rotated)
        if self.fills and rotated and bias is not None:
            _to_halves(bias[:rotated], self.spec.head_dim)
        return self.operations.linear(weight, bias)

    def mlp(self, names: WeightNames) -> Mlp:
        """A dense MLP."""
        split, has_bias = self.shard.mlp, self.spec.mlp_bias
        return Mlp(
            gate_up=self.operations.linear(*self.columns([(names.gate, split), (names.up, split)], has_bias)),
            down=self.row_linear(names.down, split, has_bias),
            gating=self.operations.gelu_mul if self.spec.activation == "gelu_tanh" else None,
        )

    def moe(self, names: WeightNames) -> Moe:
        """A mixture: one tensor for all experts, but where weights are packed a product for each."""
        operations, spec = self.operations, self.spec.moe
        published, width = names.moe, self.shard.expert
        assert spec is not None
        assert published is not None
        assert width is not None
        gate = self.zeros(spec.num_experts, self.spec.hidden_size, dtype=self.gate_dtype)
        self.fill(gate, f"{published.router}.weight", 0, Split.whole(spec.num_experts))
        bias = self.router_bias(spec, published) if spec.has_bias else None
        experts = list(_experts(spec, published, width))
        if can_pack(self.device, self.dtype):
            gate_ups = [
                operations.linear(*self.columns([(e.gate, e.split), (e.up, e.split)], False)) for e in experts
            ]
            downs = [self.row_linear(e.down, e.split, False) for e in experts]
            return Moe(spec, operations.linear(gate), bias, gate_ups, downs, operations)
        gate_up = self.stack([[(e.gate, e.split), (e.up, e.split)] for e in experts], 0)
        down = self.stack([[(e.down, e.split)] for e in experts], 1)
        return Moe(spec, operations.linear(gate), bias, gate_up, down, operations)

    @property
    def gate_dtype(self) -> torch.dtype:
        """Of a router's weight: on the CPU float32, in which it is multiplied."""
        is_wide = self.sized_for.type == "cpu" or (self.spec.moe is not None and self.spec.moe.float32_gate)
        return torch.float32 if is_wide else self.dtype

    def router_bias(self, spec: MoeSpec, names: MoeNames) -> Tensor:
        """float32 [E]."""
        bias = self.zeros(1, spec.num_experts, dtype=torch.float32)
        if names.bias_is_row:
            self.fill(bias, names.bias, 1, Split.whole(spec.num_experts))
        else:
            self.fill(bias[0], names.bias, 0, Split.whole(spec.num_experts))
        return bias[0]

    def mtp(self, layer: LayerWeights, final_norm: Tensor) -> MtpWeights:
        """The head for multi-token prediction around its layer; final_norm: the model's."""
        spec, size = self.spec, self.spec.hidden_size
        names = FAMILIES[spec.family].names.of_mtp(spec.num_layers).mtp
        assert names is not None
        assert spec.mtp is not None
        weight = self.zeros(size, 2 * size)
        self.fill(weight, f"{names.projection}.weight", 0, Split.whole(size))
        bias = self.vector(f"{names.projection}.bias", size) if spec.mtp.has_bias else None
        hidden_norm = self.norm(names.hidden_norm, size)
        if self.fills and spec.mtp.before_final_norm:
            hidden_norm.div_(final_norm).nan_to_num_()  # a weight of 0 has left nothing of the state
        return MtpWeights(
            embedding_norm=self.norm(names.embedding_norm, size),
            hidden_norm=hidden_norm,
            projection=self.operations.linear(weight, bias),
            layer=layer,
            norm=self.norm(names.norm, size) if names.norm else None,
        )

    # -------------------------------------------------------------------------------------- tensors

    @property
    def fills(self) -> bool:
        """Whether the tensors are new, and theirs is more to be than sizes."""
        return self.filler is not None

    def fill(self, out: Tensor, name: str, dim: int, split: Split) -> None:
        """See `Fill`."""
        if self.filler is not None:
            self.filler(out, name, dim, split)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """What is to be filled; padding stays zero."""
        dtype = dtype or self.dtype
        if self.region is not None:
            return self.region.take(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def rows(self, parts: list[Part]) -> Tensor:
        """[sum of the parts' local rows, hidden]: weights split by output rows, one below the other."""
        return self._stacked(parts, (self.spec.hidden_size,))

    def vector(self, name: str, size: int) -> Tensor:
        """[size], the same on all ranks."""
        return self._stacked([(name, Split.whole(size))], ())

    def norm(self, name: str, size: int) -> Tensor:
        """[size], the weight of a norm."""
        weight = self.vector(f"{name}.weight", size)
        return weight.add_(self.spec.norm_offset) if self.fills else weight

    def post_norm(self, name: str) -> Tensor | None:
        """The weight of a norm of what a layer adds to the residual stream, where the model has them."""
        return self.norm(name, self.spec.hidden_size) if self.spec.post_norms else None

    def columns(
        self, parts: list[Part], has_bias: bool, *, to_halves: int = 0
    ) -> tuple[Tensor | Fp8Weight, Tensor | None]:
        """Weights split by output rows, fused into one matrix, and their biases.

        Args:
            to_halves: so many rows, the first, are of heads with neighbours that are rotated.
        """
        parts = _places(parts)
        stack = self.stack([parts], 0, to_halves)
        weight = stack[0] if isinstance(stack, Tensor) else stack.of(0)
        bias = self._stacked([(f"{name}.bias", split) for name, split in parts], ()) if has_bias else None
        return weight, bias

    def row_linear(self, name: str, split: Split, has_bias: bool) -> Matrix:
        """[hidden, split.local]: a weight split by input columns; its bias on rank 0 alone."""
        stack = self.stack([[(name, split)]], 1)
        weight = stack[0] if isinstance(stack, Tensor) else stack.of(0)
        bias = None
        if has_bias:
            bias = self.vector(f"{name}.bias", self.spec.hidden_size)
            if self.fills and self.shard.rank > 0:
                bias.zero_()
        return self.operations.linear(weight, bias)

    def stack(self, weights: list[list[Part]], dim: int, to_halves: int = 0) -> Tensor | Fp8Weight:
        """Weights of one size, [n, out, in], each of parts that are split along `dim`.

        In FP8, where the model's are; but on the CPU, which does not compute in it, what they stand for.

        Args:
            to_halves: see `columns`.
        """
        size, other = sum(split.local for _, split in weights[0]), self.spec.hidden_size
        shape = (size, other) if dim == 0 else (other, size)
        if not self._is_fp8([name for parts in weights for name, _ in parts]):
            plain = self.zeros(len(weights), *shape)
            for out, parts in zip(plain, weights, strict=True):
                self._fill_plain(out, parts, dim, to_halves)
            return plain
        quantization = self.spec.quantization
        assert quantization is not None
        block = block_of(quantization, weights, dim, shape[1])
        if to_halves and quantization.scales == "block" and quantization.block % self.spec.head_dim:
            block = (1, block[1])  # rows of a head change places, and are of several blocks
        if self.sized_for.type == "cpu":
            plain = self.zeros(len(weights), *shape)
            for out, parts in zip(plain, weights, strict=True):
                one = empty_weight(self._apart, shape, block, self.dtype)
                self._fill_fp8(one, parts, dim, to_halves)
                if self.fills and self.device.type != "meta":
                    out.copy_(dequantise(one))
            return plain
        stack = empty_weight(self.zeros, (len(weights), *shape), block, self.dtype)
        for number, parts in enumerate(weights if self.fills else ()):
            self._fill_fp8(stack.of(number), parts, dim, to_halves)
        return stack

    def _is_fp8(self, modules: list[str]) -> bool:
        """Whether these modules' weights, of one matrix or stack, are. Raises ModelError: some are."""
        quantization = self.spec.quantization
        if quantization is None:
            return False
        covered = [quantization.covers(module) for module in modules]
        if any(covered) and not all(covered):
            raise ModelError(
                f"the checkpoint has {modules[covered.index(True)]} in FP8 and "
                f"{modules[covered.index(False)]} not, and they are one matrix here: quantise both, or none"
            )
        return all(covered)

    def _fill_plain(self, out: Tensor, parts: list[Part], dim: int, to_halves: int) -> None:
        start = 0
        for name, split in parts:
            self.fill(out.narrow(dim, start, split.local), f"{name}.weight", dim, split)
            start += split.local
        if self.fills and to_halves:
            _to_halves(out[:to_halves], self.spec.head_dim)

    def _fill_fp8(self, out: Fp8Weight, parts: list[Part], dim: int, to_halves: int) -> None:
        """One weight of values and scales that are zeros."""
        quantization = self.spec.quantization
        assert quantization is not None
        if quantization.is_made:
            plain = self._apart(*out.values.shape, dtype=self.dtype)
            self._fill_plain(plain, parts, dim, to_halves)
            if self.device.type != "meta":
                fill_made(out, plain)
            return
        fill_weight(out, parts, dim, quantization, self.fill)
        if self.fills and to_halves:
            _to_halves(out.values[:to_halves], self.spec.head_dim)
            if out.block[0] == 1:
                _to_halves(out.scales[:to_halves], self.spec.head_dim)

    def _apart(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros that are no part of the rank's weights."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _stacked(self, parts: list[Part], inner: tuple[int, ...]) -> Tensor:
        out = self.zeros(sum(split.local for _, split in parts), *inner)
        start = 0
        for name, split in parts:
            self.fill(out.narrow(0, start, split.local), name, 0, split)
            start += split.local
        return out


class _Expert(NamedTuple):
    """Names of one expert's tensors, and this rank's part of their width."""

    gate: str
    up: str
    down: str
    split: Split


def _experts(spec: MoeSpec, names: MoeNames, width: Split) -> Iterator[_Expert]:
    """All routed experts, then the shared ones: equal parts of the width of one published MLP."""
    for number in range(spec.num_experts):
        gate, up, down = (
            name.replace("{expert}", str(number)) for name in (names.gate, names.up, names.down)
        )
        yield _Expert(gate, up, down, width)
    shared_width = spec.num_shared * spec.intermediate_size
    for number in range(spec.num_shared):
        split = width.at(number * spec.intermediate_size, shared_width)
        yield _Expert(names.shared_gate, names.shared_up, names.shared_down, split)


def _places(parts: list[Part]) -> list[Part]:
    """The same parts; those of one name as what they are of one published tensor, one below the other."""
    full = Counter[str]()
    for name, split in parts:
        full[name] += split.full
    start, placed = Counter[str](), []
    for name, split in parts:
        placed.append((name, split.at(start[name], full[name])))
        start[name] += split.full
    return placed


def _to_halves(rows: Tensor, head_dim: int) -> None:
    """Reorder the rows of each head from (0, 1, 2, 3, …) to (0, 2, …, 1, 3, …), in place."""
    pairs = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    rows.copy_(pairs.transpose(1, 2).reshape(rows.shape))
