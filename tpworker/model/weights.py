"""From a folder of safetensors to one rank's weights, reading only that rank's slices; and random weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from tpworker.model.checkpoint import Checkpoint
from tpworker.model.families import FAMILIES, ModelSpec
from tpworker.model.linear import Linear, can_pack
from tpworker.model.tp import Shard, Split

Progress = Callable[[int, int], None]  # bytes done, bytes in all, of this rank's weights

_DUMMY_STD = 0.02
_DUMMY_PERIOD = 4_194_301  # a prime: no two rows of a matrix are alike, although the values repeat


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer of one rank. H and K: its query and key-value heads, F: its MLP width (padding included)."""

    attention_norm: Tensor  # [hidden]
    qkv: Linear  # [(H + 2 K) head_dim, hidden]: all query heads, then keys, then values
    query_norm: Tensor | None  # [head_dim]
    key_norm: Tensor | None  # [head_dim]
    output: Linear  # [hidden, H head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # [2 F, hidden]: gate, then up
    down: Linear  # [hidden, F]


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of one rank."""

    embed: Tensor  # [vocab_local, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [hidden]
    lm_head: Linear  # [vocab_local, hidden]; the embedding itself where embeddings are tied and not packed


def load_weights(
    folder: Path,
    spec: ModelSpec,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda done, total: None,
) -> DecoderWeights:
    """Read one rank's slices of model.safetensors, or of the files of model.safetensors.index.json.

    Raises:
        ModelError: a file is missing, truncated or no safetensors; a tensor is missing, has another shape
            than config.json says, is not of a float type, or is one that this decoder has no use for.
    """
    checkpoint = Checkpoint(folder)
    family = FAMILIES[spec.family]
    total = shard_bytes(spec, shard, dtype, device)
    done = 0

    def fill(out: Tensor, name: str, dim: int, split: Split) -> None:
        nonlocal done
        checkpoint.read_into(out, name, dim, split)
        done += out.nbytes
        progress(min(done, total), total)

    with torch.no_grad():
        weights = _assemble(spec, shard, dtype, device, fill)
    tied = (re.escape(f"{family.names.lm_head}.weight"),) if spec.tie_embeddings else ()
    checkpoint.refuse_unread(ignored=family.ignored_tensors + tied, architecture=spec.architecture)
    progress(total, total)
    return weights


def dummy_weights(
    spec: ModelSpec, shard: Shard, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> DecoderWeights:
    """Random weights for benchmarks: normal with σ 0.02, norms 1, biases 0. Other TP sizes, other models."""
    generator = torch.Generator(device=device).manual_seed(seed * 64 + shard.rank)
    period = torch.empty(_DUMMY_PERIOD, dtype=dtype, device=device)
    period.normal_(0, _DUMMY_STD, generator=generator)
    position = 0

    def fill(out: Tensor, name: str, dim: int, split: Split) -> None:
        nonlocal position
        if name.endswith(".bias"):
            out.zero_()
        elif out.dim() == 1:
            out.fill_(1)
        else:  # copies run at the speed of memory, random numbers do not
            flat = out.view(-1)
            start = 0
            while start < flat.numel():
                length = min(flat.numel() - start, _DUMMY_PERIOD - position)
                flat[start : start + length] = period[position : position + length]
                start += length
                position = (position + length) % _DUMMY_PERIOD

    with torch.no_grad():
        return _assemble(spec, shard, dtype, device, fill)


def shard_bytes(spec: ModelSpec, shard: Shard, dtype: torch.dtype, device: torch.device | None = None) -> int:
    """Bytes of one rank's weights on `device` (None: the CPU), for sizing; nothing is allocated."""
    weights = _assemble(spec, shard, dtype, torch.device("meta"), lambda out, name, dim, split: None)
    total = sum(tensor.nbytes for tensor in _tensors(weights))
    if spec.tie_embeddings and not can_pack(device or torch.device("cpu"), dtype):
        total -= weights.embed.nbytes  # one tensor for both; packed, the output head is a copy
    return total


def num_parameters(spec: ModelSpec) -> int:
    """Parameters of the whole model, each counted once."""
    shard = Shard.of(spec, 0, 1)
    weights = _assemble(spec, shard, torch.float32, torch.device("meta"), lambda out, name, dim, split: None)
    padded = sum(tensor.numel() for tensor in _tensors(weights))
    spare_vocab = (shard.vocab.local - spec.vocab_size) * spec.hidden_size
    spare_mlp = (shard.mlp.local - spec.intermediate_size) * (3 * spec.hidden_size + 2 * spec.mlp_bias)
    total = padded - 2 * spare_vocab - spec.num_layers * spare_mlp
    return total - spec.tie_embeddings * spec.vocab_size * spec.hidden_size


def _tensors(weights: DecoderWeights) -> Iterator[Tensor]:
    """Every tensor of a rank, a tied output head as if it were one more."""
    parts: list[DecoderWeights | LayerWeights] = [weights, *weights.layers]
    for part in parts:
        for item in (getattr(part, field.name) for field in fields(part)):
            if isinstance(item, Linear):
                yield item.weight
                if item.bias is not None:
                    yield item.bias
            elif isinstance(item, Tensor):
                yield item


Fill = Callable[[Tensor, str, int, Split], None]
"""fill(out, name, dim, split): write this rank's part of a published tensor into `out`, which holds zeros."""


def _assemble(
    spec: ModelSpec, shard: Shard, dtype: torch.dtype, device: torch.device, fill: Fill
) -> DecoderWeights:
    """Build every tensor of a rank; `fill` is called for each published tensor that it is made of."""
    names = FAMILIES[spec.family].names
    build = _Builder(spec.hidden_size, dtype, device, fill)
    embed = build.rows([(f"{names.embed}.weight", shard.vocab)])
    layers = tuple(_assemble_layer(spec, shard, build, layer) for layer in range(spec.num_layers))
    final_norm = build.vector(f"{names.final_norm}.weight", spec.hidden_size)
    head = embed if spec.tie_embeddings else build.rows([(f"{names.lm_head}.weight", shard.vocab)])
    return DecoderWeights(embed, layers, final_norm, Linear(head))


def _assemble_layer(spec: ModelSpec, shard: Shard, build: _Builder, layer: int) -> LayerWeights:
    """One layer. Plain weights are dropped as soon as they are packed, so the peak is one layer above."""
    names = FAMILIES[spec.family].names
    queries = shard.heads.queries.scaled(spec.head_dim)
    keys = shard.heads.keys.scaled(spec.head_dim)

    def name(pattern: str) -> str:
        return pattern.format(layer=layer)

    qkv = [(name(names.query), queries), (name(names.key), keys), (name(names.value), keys)]
    gate_up = [(name(names.gate), shard.mlp), (name(names.up), shard.mlp)]
    on_rank_0 = shard.rank == 0  # the bias of a sum over ranks is added once
    return LayerWeights(
        attention_norm=build.vector(name(names.attention_norm) + ".weight", spec.hidden_size),
        qkv=build.column_linear(qkv, spec.qkv_bias),
        query_norm=build.vector(name(names.query_norm) + ".weight", spec.head_dim) if spec.qk_norm else None,
        key_norm=build.vector(name(names.key_norm) + ".weight", spec.head_dim) if spec.qk_norm else None,
        output=build.row_linear(name(names.output), queries, spec.output_bias, on_rank_0),
        mlp_norm=build.vector(name(names.mlp_norm) + ".weight", spec.hidden_size),
        gate_up=build.column_linear(gate_up, spec.mlp_bias),
        down=build.row_linear(name(names.down), shard.mlp, spec.mlp_bias, on_rank_0),
    )


@dataclass(frozen=True, slots=True)
class _Builder:
    """Allocates zeros and has them filled."""

    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    fill: Fill

    def rows(self, parts: list[tuple[str, Split]]) -> Tensor:
        """[sum of the parts' local rows, hidden]: weights split by output rows, one below the other."""
        return self._stacked(parts, (self.hidden_size,))

    def vector(self, name: str, size: int) -> Tensor:
        """[size], the same on all ranks."""
        return self._stacked([(name, Split.whole(size))], ())

    def column_linear(self, parts: list[tuple[str, Split]], has_bias: bool) -> Linear:
        """Weights split by output rows, fused into one matrix, with their biases."""
        weight = self.rows([(name + ".weight", split) for name, split in parts])
        bias = self._stacked([(name + ".bias", split) for name, split in parts], ()) if has_bias else None
        return Linear(weight, bias)

    def row_linear(self, name: str, split: Split, has_bias: bool, on_rank_0: bool) -> Linear:
        """[hidden, split.local]: a weight split by input columns; its bias on rank 0 alone."""
        weight = torch.zeros(self.hidden_size, split.local, dtype=self.dtype, device=self.device)
        self.fill(weight, name + ".weight", 1, split)
        bias = None
        if has_bias:
            bias = self.vector(name + ".bias", self.hidden_size)
            if not on_rank_0:
                bias.zero_()
        return Linear(weight, bias)

    def _stacked(self, parts: list[tuple[str, Split]], inner: tuple[int, ...]) -> Tensor:
        size = sum(split.local for _, split in parts)
        out = torch.zeros(size, *inner, dtype=self.dtype, device=self.device)
        start = 0
        for name, split in parts:
            self.fill(out.narrow(0, start, split.local), name, 0, split)
            start += split.local
        return out
