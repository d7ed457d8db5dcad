"""The head for multi-token prediction (MTP): a model's own drafts of the tokens behind the next.

What it computes, and where that was published: `MtpSpec` and the families. It is one layer more, run by the
decoder's code. Its keys and values at position i are of (h_i, token i + 1), and stand in layer number
`num_layers` of the cache. T tokens; D is the hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder, Residual
from tpworker.model.kv_cache import KVCache
from tpworker.model.weights import MtpWeights


class MtpHead:
    """A rank's part of the head. As the decoder, it runs without host synchronisation in a decode step.

    Rows that only pad a batch write to the null block, and read finite values there.

    Args:
        decoder: of the model, whose embedding, output head, group and attention it uses.
        weights: `decoder.weights.mtp`.
    """

    def __init__(self, decoder: Decoder, weights: MtpWeights) -> None:
        assert decoder.weights.mtp is weights
        assert decoder.spec.mtp is not None
        self._decoder = decoder
        self._weights = weights
        self._before_final_norm = decoder.spec.mtp.before_final_norm
        self._number = decoder.spec.num_layers

    def forward(self, batch: Batch, hidden: Tensor, tokens: Tensor, cache: KVCache) -> Tensor:
        """Run the head at the batch's tokens; its keys and values are in the cache afterwards.

        Args:
            batch: its `token_ids` and `sample_rows` are not looked at.
            hidden: [T, D], the model's output, after its final norm, at each of the batch's tokens; for a
                further draft, whose batch is one position on, what this returned.
            tokens: int64 [T], the token behind each of them.
            cache: of `num_layers` + 1 layers.

        Returns:
            [T, D], the same on all ranks: what `logits` takes for the token behind `tokens`, and `forward`
            for the one behind that.
        """
        decoder, layer = self._decoder, self._weights.layer
        residual = self._begin(hidden, tokens)
        prepared = decoder.prepare(layer.is_local, batch, cache)
        decoder.run_layer(layer, residual, prepared, cache.keys[self._number], cache.values[self._number])
        norm = self._weights.norm
        return decoder.finish(residual, decoder.weights.final_norm if norm is None else norm, None)

    def keep(self, batch: Batch, hidden: Tensor, tokens: Tensor, cache: KVCache) -> None:
        """Of `forward`, only what it leaves in the cache: what a step without drafts does for later ones."""
        decoder, layer = self._decoder, self._weights.layer
        residual = self._begin(hidden, tokens)
        places = decoder.places(layer.is_local, batch, cache)
        decoder.store(layer, residual, places, cache.keys[self._number], cache.values[self._number])

    def logits(self, hidden: Tensor) -> Tensor:
        """From hidden [R, D] to [R, vocab_local], as `Decoder.logits`."""
        return self._decoder.logits(hidden)

    def _begin(self, hidden: Tensor, tokens: Tensor) -> Residual:
        """The residual stream before the layer."""
        decoder, weights = self._decoder, self._weights
        eps = decoder.spec.rms_norm_eps
        embedded = decoder.operations.add_norm(decoder.embed(tokens), None, weights.embedding_norm, eps)
        if self._before_final_norm:
            normed = hidden * weights.hidden_norm
        else:
            normed = decoder.operations.add_norm(hidden, None, weights.hidden_norm, eps)
        return Residual(weights.projection(torch.cat((embedded, normed), dim=-1)))
