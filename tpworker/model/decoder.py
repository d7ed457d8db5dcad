"""One decoder for every family: embedding, layers of attention and MLP, final norm, output head.

Tensors are [T, ...]: all tokens of a step, whatever sequence they are of. D is the hidden size; H and K are
this rank's query and key-value heads. What is split over ranks, and how: `tpworker.model.tp`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpworker.kernels.operands import Normed, Places, Product
from tpworker.model import composed_ops
from tpworker.model.attention import Attention, Scores
from tpworker.model.attention import choose as choose_attention
from tpworker.model.batch import Batch
from tpworker.model.families import ModelSpec
from tpworker.model.kv_cache import KVCache
from tpworker.model.operations import operations_of
from tpworker.model.rope import rope_tables
from tpworker.model.tp import Collectives, Shard, embed
from tpworker.model.weights import DecoderWeights, LayerWeights

__all__ = ["Batch", "Decoder", "KVCache"]


@dataclass(slots=True)
class Residual:
    """The residual stream of a step, and what is still to be added to it: the next norm does that."""

    x: Tensor  # [T, D], the same on all ranks; changed in place
    part: Tensor | Product | None = None  # [T, D], this rank's summand
    post_norm: Tensor | None = None  # [D], of the norm of the sum before it is added


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the layers of one kind share in a step."""

    attention: Attention
    plan: Any  # what `attention.prepare` returned
    places: Places


@dataclass(frozen=True, slots=True)
class _Kind:
    """How layers of one kind attend: those with a sliding window, or those without."""

    attention: Attention
    cos: Tensor  # float32 [max_model_len, rotary_dim], see `rope_tables`
    sin: Tensor


class Decoder:
    """A rank's part of a model.

    In a pure decode step, `forward` and `logits` run without host synchronisation and can be captured in a
    CUDA graph if the attention backend can (`PagedAttention` cannot: it reads lengths on the host).

    Args:
        spec: the model.
        weights: this rank's, all on one device, in one dtype.
        shard: what this rank holds.
        collectives: the rank's group, of `shard.size` ranks.
        max_model_len: positions are below it; may exceed the model's own.
        attention: the backend of layers with plain scores; None: the best that there is for the device.
        kv_dtype: of keys and values; None: that of the weights.

    Attributes:
        attention: the backend of all layers; of two, the one for windows, which can do the least.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: DecoderWeights,
        shard: Shard,
        collectives: Collectives,
        max_model_len: int,
        attention: Attention | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        assert (collectives.rank, collectives.size) == (shard.rank, shard.size)
        self.spec = spec
        self.weights = weights
        self.shard = shard
        self.collectives = collectives
        self.vocab_start = shard.vocab_start
        table = weights.embed
        self.operations = operations_of(table.device)
        # Rounded as transformers rounds it.
        self._embed_scale = float(torch.tensor(spec.embed_scale, dtype=table.dtype))
        local = {layer.is_local for layer in weights.layers}
        kinds = local if weights.mtp is None else local | {weights.mtp.layer.is_local}
        self._local = sorted(local)
        self._kinds = {
            is_local: self._kind(is_local, max_model_len, attention, kv_dtype) for is_local in sorted(kinds)
        }
        self.attention = self._kinds[self._local[-1]].attention

    def _kind(
        self, is_local: bool, max_model_len: int, attention: Attention | None, kv_dtype: torch.dtype | None
    ) -> _Kind:
        """Of the layers with a window (`is_local`), or of the others."""
        spec, shard, table = self.spec, self.shard, self.weights.embed
        scale, rope = spec.attention_scale or spec.head_dim**-0.5, spec.rope
        scores = Scores(scale, softcap=spec.attention_softcap)
        if is_local:
            assert spec.window is not None
            rope = spec.window.rope or rope
            # One that all tokens are within is none, and any kernel takes it.
            if spec.window.size < max_model_len:
                scores = replace(scores, window=spec.window.size)
        if attention is None or scores != Scores.plain(spec.head_dim):
            attention = choose_attention(
                shard.num_heads,
                shard.num_kv_heads,
                spec.head_dim,
                table.dtype,
                table.device,
                scores,
                kv_dtype,
            )
        return _Kind(attention, *rope_tables(rope, spec.head_dim, max_model_len, table.device))

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute one step; its keys and values are in the cache afterwards.

        Returns:
            [R, D], after the final norm: the tokens of `sample_rows`, the same on all ranks.
        """
        residual = Residual(self.embed(batch.token_ids))
        prepared = {is_local: self.prepare(is_local, batch, cache) for is_local in self._local}
        for number, layer in enumerate(self.weights.layers):
            keys, values = cache.keys[number], cache.values[number]
            self.run_layer(layer, residual, prepared[layer.is_local], keys, values)
        return self.finish(residual, self.weights.final_norm, batch.sample_rows)

    # ----------------------------------------- a step's parts, which `tpworker.model.mtp` shares

    def embed(self, token_ids: Tensor) -> Tensor:
        """From int64 [T] to [T, D], the same on all ranks."""
        x = embed(token_ids, self.weights.embed, self.shard, self.collectives)
        if self._embed_scale != 1:
            x *= self._embed_scale
        return x

    def prepare(self, is_local: bool, batch: Batch, cache: KVCache) -> Prepared:
        """Once a step, for the layers with a window (`is_local`), or for the others."""
        attention = self._kinds[is_local].attention
        return Prepared(
            attention, attention.prepare(batch, cache.block_size), self.places(is_local, batch, cache)
        )

    def places(self, is_local: bool, batch: Batch, cache: KVCache) -> Places:
        """Of the step's tokens, in the layers with a window (`is_local`), or in the others."""
        kind = self._kinds[is_local]
        return self.operations.places(
            batch.positions, batch.sequence_of, batch.block_tables, kind.cos, kind.sin, cache.block_size
        )

    def run_layer(
        self, layer: LayerWeights, residual: Residual, prepared: Prepared, keys: Tensor, values: Tensor
    ) -> None:
        """One layer, whose cache is `keys` and `values`; the residual stream is behind it afterwards."""
        attended = composed_ops.store_and_attend(
            self.operations,
            prepared.attention,
            prepared.plan,
            self._heads(layer, residual),
            _norms(layer),
            self.spec.rms_norm_eps,
            prepared.places,
            keys,
            values,
        )
        residual.part, residual.post_norm = Product(layer.output, attended), layer.attention_post_norm
        normed = self._add_up(residual, layer.mlp_norm)
        residual.part, residual.post_norm = layer.mlp(normed), layer.mlp_post_norm

    def store(
        self, layer: LayerWeights, residual: Residual, places: Places, keys: Tensor, values: Tensor
    ) -> None:
        """Of a layer only what `run_layer` leaves in its cache."""
        heads, eps = self._heads(layer, residual), self.spec.rms_norm_eps
        self.operations.norm_rotate_store(heads, _norms(layer), eps, places, keys, values)

    def finish(self, residual: Residual, weight: Tensor, rows: Tensor | None) -> Tensor:
        """The norm of this weight of the stream's rows, [R, D]; None: of all."""
        part = residual.part
        last = None if part is None else composed_ops.tensor_of(self.operations, part)
        if rows is not None:
            residual.x = residual.x.index_select(0, rows)
            last = last if last is None else last.index_select(0, rows)
        residual.part = last
        return composed_ops.tensor_of(self.operations, self._add_up(residual, weight))

    def _heads(self, layer: LayerWeights, residual: Residual) -> Tensor:
        """[T, H + 2 K, head_dim]: query heads, key heads, value heads."""
        normed = self._add_up(residual, layer.attention_norm)
        return layer.qkv(normed).view(len(residual.x), -1, self.spec.head_dim)

    def _add_up(self, residual: Residual, weight: Tensor) -> Tensor | Normed:
        """The norm of the stream, with all that was still to be added."""
        return composed_ops.reduce_add_norm(
            self.operations,
            residual.x,
            residual.part,
            weight,
            self.spec.rms_norm_eps,
            self.collectives,
            residual.post_norm,
        )

    def excerpt(self) -> Decoder:
        """A decoder of few layers that runs every kernel which this one does.

        It has the first layer of each kind behind each kind, since a layer also depends on the one before it.
        """
        layers, excerpt = self.weights.layers, copy.copy(self)
        firsts: dict[tuple[type, type, bool], LayerWeights] = {}
        for before, layer in zip((None, *layers), layers, strict=False):
            firsts.setdefault((type(before and before.mlp), type(layer.mlp), layer.is_local), layer)
        excerpt.weights = replace(self.weights, layers=tuple(firsts.values()))
        return excerpt

    def step_bytes(self, num_tokens: int) -> int:
        """Memory that a step of so many tokens takes beside weights and cache, about, at its widest place."""
        spec, shard = self.spec, self.shard
        heads = (shard.num_heads + 2 * shard.num_kv_heads + shard.num_heads) * spec.head_dim
        widest = max(heads, 3 * shard.mlp.local)
        if spec.moe is not None and shard.expert is not None:
            chosen = spec.moe.experts_per_token + spec.moe.num_shared
            widest = max(widest, chosen * (3 * shard.expert.local + spec.hidden_size))
        return num_tokens * (4 * spec.hidden_size + widest) * self.weights.embed.element_size()

    def logits(self, hidden: Tensor) -> Tensor:
        """From hidden [R, D] to [R, vocab_local]: tokens from `vocab_start` on, padding is -inf.

        Of the dtype that `Operations.ready_logits` makes of the weights'.
        """
        logits = self.operations.ready_logits(self.weights.lm_head(hidden))
        if (cap := self.spec.logit_softcap) is not None:
            logits = logits.div_(cap).tanh_().mul_(cap)
        if self.shard.vocab.num_real < self.shard.vocab.local:
            logits[:, self.shard.vocab.num_real :].fill_(float("-inf"))  # an assignment waits, on CUDA
        return logits


def _norms(layer: LayerWeights) -> tuple[Tensor, Tensor] | None:
    """The weights of the norms of query and key heads, where the model has them."""
    if layer.query_norm is None or layer.key_norm is None:
        return None
    return layer.query_norm, layer.key_norm
