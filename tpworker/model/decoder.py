"""One decoder for every family: embedding, layers of attention and MLP, final norm, output head.

Tensors are [T, ...]: all tokens of a step, whatever sequence they are of. D is the hidden size; H and K are
this rank's query and key-value heads. What is split over ranks, and how: `tpworker.model.tp`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tpworker.model.attention import Attention, PagedAttention
from tpworker.model.batch import Batch
from tpworker.model.families import ModelSpec, RopeSpec
from tpworker.model.kv_cache import KVCache
from tpworker.model.tp import Collectives, Shard, embed
from tpworker.model.weights import DecoderWeights, LayerWeights

__all__ = ["Batch", "Decoder", "KVCache"]


class Decoder:
    """A rank's part of a model.

    In a pure decode step, `forward` and `logits` run without host synchronisation if the attention backend
    does (`PagedAttention` does not: it reads lengths on the host).

    Args:
        spec: the model.
        weights: this rank's, all on one device, in one dtype.
        shard: what this rank holds.
        collectives: the rank's group, of `shard.size` ranks.
        max_model_len: positions are below it; may exceed the model's own.
        attention: the backend; None: the torch reference.
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
        self.attention: Attention = attention or PagedAttention(
            shard.num_heads, shard.num_kv_heads, spec.head_dim, weights.embed.dtype
        )
        self._cos, self._sin = rope_tables(spec.rope, spec.head_dim, max_model_len, weights.embed.device)

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute one step; its keys and values are in the cache afterwards.

        Returns:
            [R, D], after the final norm: the tokens of `sample_rows`, the same on all ranks.
        """
        weights = self.weights
        x = embed(batch.token_ids, weights.embed, self.shard, self.collectives)  # [T, D]
        cos = self._cos.index_select(0, batch.positions)[:, None]  # [T, 1, head_dim]
        sin = self._sin.index_select(0, batch.positions)[:, None]
        rows = cache.rows_of(batch)
        plan = self.attention.prepare(batch, cache.block_size)
        for number, layer in enumerate(weights.layers):
            query, key, value = self._project(layer, self._norm(x, layer.attention_norm), cos, sin)
            cache.write(number, rows, key, value)
            attended = self.attention(query, cache.keys[number], cache.values[number], plan)
            x += self.collectives.all_reduce(layer.output(attended))
            x += self.collectives.all_reduce(self._mlp(layer, self._norm(x, layer.mlp_norm)))
        if batch.sample_rows is not None:
            x = x.index_select(0, batch.sample_rows)
        return self._norm(x, weights.final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """From hidden [R, D] to float32 [R, vocab_local]: tokens from `vocab_start` on, padding is -inf."""
        logits = self.weights.lm_head(hidden).float()
        if self.shard.vocab.num_real < self.shard.vocab.local:
            logits[:, self.shard.vocab.num_real :] = float("-inf")
        return logits

    def _project(
        self, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, head_dim], keys and values [T, K, head_dim]; the first two rotated."""
        num_heads, num_kv_heads, head_dim = self.shard.num_heads, self.shard.num_kv_heads, self.spec.head_dim
        heads = layer.qkv(x).view(x.shape[0], -1, head_dim)  # [T, H + 2 K, head_dim]
        num_rotated = num_heads + num_kv_heads
        rotated = heads[:, :num_rotated]
        if layer.query_norm is not None and layer.key_norm is not None:
            query = self._norm(heads[:, :num_heads], layer.query_norm)
            key = self._norm(heads[:, num_heads:num_rotated], layer.key_norm)
            rotated = torch.cat((query, key), dim=1)
        rotated = rotate(rotated, cos, sin)
        return rotated[:, :num_heads], rotated[:, num_heads:], heads[:, num_rotated:]

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        """[T, D] to this rank's summand of [T, D]."""
        gate, up = layer.gate_up(x).chunk(2, dim=-1)
        return layer.down(F.silu(gate).mul_(up))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""
        return F.rms_norm(x, weight.shape, weight, self.spec.rms_norm_eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its angle; computed in float32.

    Args:
        x: [T, heads, head_dim].
        cos, sin: float32 [T, 1, head_dim] rows of `rope_tables`.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def rope_tables(
    rope: RopeSpec, head_dim: int, num_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: float32 [num_positions, head_dim] each.

    Both halves hold the same angles; the first half of the sines is negated, so that x * cos + swapped * sin
    is the rotation (Su et al., arXiv 2104.09864). Llama 3's scaling: `apply_scaling` of Meta's llama-models.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.scaling is not None:
        scaling = rope.scaling
        wavelengths = 2 * math.pi / frequencies
        context = scaling.original_max_position_embeddings
        # 0: a wavelength of context / low_freq_factor or more, to be stretched; 1: one of
        # context / high_freq_factor or less, to be kept; in between, a mixture of both.
        kept = (context / wavelengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        kept = kept.clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(device), torch.cat((-sin, sin), dim=-1).to(device)
