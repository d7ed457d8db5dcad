"""What a backend of attention over the paged KV cache must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tpworker.model.batch import Batch


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of the products of queries and keys before the softmax."""

    scale: float
    """They are multiplied by it."""
    window: int | None = None
    """So many tokens are seen, a token itself and those before it; None: all of them."""
    softcap: float | None = None
    """Scaled scores s become c tanh(s / c); None: they stay as they are."""

    @classmethod
    def plain(cls, head_dim: int) -> Scores:
        """As most models have it, and as all kernels take it."""
        return cls(head_dim**-0.5)


class Attention(Protocol):
    """A way to compute attention. Chosen once, when the decoder is built."""

    @property
    def reads_lengths(self) -> bool:
        """Whether it looks at lengths on the host in steps with chunks, which cannot be captured then."""
        ...

    def prepare(self, batch: Batch, block_size: int) -> Any:
        """What all layers of a step share. Called once a step, before the first layer."""
        ...

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, plan: Any) -> Tensor:
        """Causal attention of this step's tokens to all of their sequences, which the cache holds already.

        Args:
            queries: [T, heads_local, head_dim], rotated.
            keys, values: the layer's cache, [num_blocks, block_size, kv_heads_local, head_dim].
            plan: what `prepare` returned.

        Returns:
            [T, heads_local * head_dim], in the dtype of the queries.
        """
        ...
