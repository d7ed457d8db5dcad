"""What a rank holds of a model: the weights of its layers, embedding and output head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tpworker.kernels.operands import Matrix
from tpworker.model.mlp import Mlp
from tpworker.model.moe import Moe


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer of one rank. H and K: its query and key-value heads (padding included)."""

    attention_norm: Tensor  # [hidden]
    qkv: Matrix  # [(H + 2 K) head_dim, hidden]: all query heads, then keys, then values
    query_norm: Tensor | None  # [head_dim]
    key_norm: Tensor | None  # [head_dim]
    output: Matrix  # [hidden, H head_dim]
    mlp_norm: Tensor  # [hidden]
    mlp: Mlp | Moe
    attention_post_norm: Tensor | None = None  # [hidden], of what attention returns
    mlp_post_norm: Tensor | None = None  # [hidden], of what the MLP returns
    is_local: bool = False  # a token sees those of a sliding window, see `WindowSpec`


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """A head for multi-token prediction, see `MtpSpec`."""

    embedding_norm: Tensor  # [hidden]
    hidden_norm: Tensor  # [hidden]; with `before_final_norm` divided by the final norm's weight
    projection: Matrix  # [hidden, 2 hidden], of (embedding, hidden state); whole on every rank
    layer: LayerWeights
    norm: Tensor | None  # [hidden]; None: the model's final norm


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of one rank."""

    embed: Tensor  # [vocab_local, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [hidden]
    lm_head: Matrix  # [vocab_local, hidden]; the embedding itself where embeddings are tied and not packed
    mtp: MtpWeights | None = None
