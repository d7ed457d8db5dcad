"""One decoder for every family: embedding, layers of attention and MLP, final norm, output head.

Tensors are [T, ...]: all tokens of a step, whatever sequence they are of. D is the hidden size; H and K are
this rank's query and key-value heads. What is split over ranks, and how: `tpworker.model.tp`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpworker.kernels.operands import Places, Product
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
        local = sorted({layer.is_local for layer in weights.layers})
        self._kinds = {is_local: self._kind(is_local, max_model_len, attention) for is_local in local}
        self.attention = self._kinds[local[-1]].attention

    def _kind(self, is_local: bool, max_model_len: int, attention: Attention | None) -> _Kind:
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
                shard.num_heads, shard.num_kv_heads, spec.head_dim, table.dtype, table.device, scores
            )
        return _Kind(attention, *rope_tables(rope, spec.head_dim, max_model_len, table.device))

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute one step; its keys and values are in the cache afterwards.

        Returns:
            [R, D], after the final norm: the tokens of `sample_rows`, the same on all ranks.
        """
        operations, weights, eps = self.operations, self.weights, self.spec.rms_norm_eps
        add_up = partial(composed_ops.reduce_add_norm, operations, eps=eps, collectives=self.collectives)
        x = embed(batch.token_ids, weights.embed, self.shard, self.collectives)  # [T, D]
        if self._embed_scale != 1:
            x *= self._embed_scale
        # A rank's summand of x, still to be added up: the next norm does that.
        part: Tensor | Product | None = None
        post_norm: Tensor | None = None  # of the sum, before it is added to x
        prepared = {is_local: self._prepare(kind, batch, cache) for is_local, kind in self._kinds.items()}
        for number, layer in enumerate(weights.layers):
            attention, plan, places = prepared[layer.is_local]
            normed = add_up(x, part, layer.attention_norm, post_norm=post_norm)
            heads = layer.qkv(normed).view(len(x), -1, self.spec.head_dim)  # [T, H + 2 K, head_dim]
            attended = composed_ops.store_and_attend(
                operations,
                attention,
                plan,
                heads,
                _norms(layer),
                eps,
                places,
                cache.keys[number],
                cache.values[number],
            )
            part = Product(layer.output, attended)
            normed = add_up(x, part, layer.mlp_norm, post_norm=layer.attention_post_norm)
            part, post_norm = layer.mlp(normed), layer.mlp_post_norm
        last = None if part is None else composed_ops.tensor_of(operations, part)
        if batch.sample_rows is not None:
            x = x.index_select(0, batch.sample_rows)
            last = last if last is None else last.index_select(0, batch.sample_rows)
        normed = add_up(x, last, weights.final_norm, post_norm=post_norm)
        return composed_ops.tensor_of(operations, normed)

    def _prepare(self, kind: _Kind, batch: Batch, cache: KVCache) -> tuple[Attention, Any, Places]:
        """What the layers of a kind share in a step."""
        places = self.operations.places(
            batch.positions, batch.sequence_of, batch.block_tables, kind.cos, kind.sin, cache.block_size
        )
        return kind.attention, kind.attention.prepare(batch, cache.block_size), places

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
