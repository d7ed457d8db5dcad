"""A Llama and a head for multi-token prediction in plain torch, to be trained with: what distill.py needs.

Modules have the names that checkpoints give them: those of a Llama's files, and of Qwen3-Next's head.

    at position i:  token i + 1 ─► embedding ─► norm ─┐
                    hidden i, behind the final norm ─► norm ─► fc ─► layer ─► norm ─► output head: token i + 2
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a Llama, as its config.json names them."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def read(cls, folder: Path) -> Sizes:
        """Raises ValueError: the folder has another model."""
        config = json.loads((folder / "config.json").read_text())
        other = [config[key] for key in ("attention_bias", "mlp_bias", "rope_scaling") if config.get(key)]
        if config.get("model_type") != "llama" or other:
            raise ValueError(f"{folder}: a plain Llama is needed, and this is {config.get('model_type')}")
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        return cls(**{name: config[name] for name in cls.__slots__})


class Rotation(NamedTuple):
    """Of some positions: [T, head_dim] each, in float32."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, sizes: Sizes, positions: Tensor) -> Rotation:
        powers = torch.arange(0, sizes.head_dim, 2, device=positions.device) / sizes.head_dim
        angles = positions.float()[:, None] / sizes.rope_theta**powers
        angles = torch.cat((angles, angles), dim=-1)
        return cls(angles.cos(), angles.sin())

    def __call__(self, heads: Tensor) -> Tensor:
        """[B, H, T, head_dim]"""
        first, second = heads.float().chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (heads.float() * self.cos + turned * self.sin).to(heads.dtype)


class Norm(nn.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight.to(x.dtype)


class Cache(NamedTuple):
    """Keys and values of a layer for sequences that grow together: [B, K, longest, head_dim] each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, sizes: Sizes, batch: int, longest: int, like: Tensor) -> Cache:
        shape = (batch, sizes.num_key_value_heads, longest, sizes.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape))


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, kv_width = (
            sizes.head_dim * heads for heads in (sizes.num_attention_heads, sizes.num_key_value_heads)
        )
        self.q_proj = nn.Linear(sizes.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(sizes.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(sizes.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, cache: Cache | None, position: int) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.sizes.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotation(q), rotation(k)
        if cache is None:
            groups = self.sizes.num_attention_heads // self.sizes.num_key_value_heads
            k, v = (kv.repeat_interleave(groups, dim=1) for kv in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # one token: the query heads of a group are as many queries of its key head
            cache.keys[:, :, position] = k[:, :, 0]
            cache.values[:, :, position] = v[:, :, 0]
            k, v = cache.keys[:, :, : position + 1], cache.values[:, :, : position + 1]
            grouped = q.view(batch, self.sizes.num_key_value_heads, -1, self.sizes.head_dim)
            out = F.scaled_dot_product_attention(grouped, k, v).reshape(q.shape)
        out = out.transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(out)


class Mlp(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = Norm(sizes.hidden_size, sizes.rms_norm_eps)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = Norm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp = Mlp(sizes)

    def forward(self, x: Tensor, rotation: Rotation, cache: Cache | None = None, position: int = 0) -> Tensor:
        """[B, T, D]; with a cache, T is 1 and the token is at `position`."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache, position)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The model whose outputs are learnt. Its weights do not change."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_hidden_layers))
        self.norm = Norm(sizes.hidden_size, sizes.rms_norm_eps)
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)

    @classmethod
    def read(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Llama:
        """From a folder with one file of weights."""
        model = cls(Sizes.read(folder))
        weights = load_file(folder / "model.safetensors")
        own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        model.load_state_dict({"lm_head.weight": own["embed_tokens.weight"]} | own)
        return model.to(device, dtype).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states behind the final norm, [B, T, D], of tokens int64 [B, T]."""
        rotation = Rotation.of(self.sizes, torch.arange(tokens.shape[1], device=tokens.device))
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rotation)
        return self.norm(x)

    def decode(self, tokens: Tensor, caches: Sequence[Cache], position: int) -> Tensor:
        """Of the next token of each sequence, int64 [B]: [B, D]."""
        rotation = Rotation.of(self.sizes, torch.tensor([position], device=tokens.device))
        x = self.embed_tokens(tokens)[:, None]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotation, cache, position)
        return self.norm(x)[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V], in float32."""
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device


class Head(nn.Module):
    """See the module; the names are those behind `mtp.` in a checkpoint."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        size, eps = sizes.hidden_size, sizes.rms_norm_eps
        self.pre_fc_norm_embedding = Norm(size, eps)
        self.pre_fc_norm_hidden = Norm(size, eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([Layer(sizes)])
        self.norm = Norm(size, eps)

    @classmethod
    def beginning(cls, model: Llama) -> Head:
        """One to be trained, in float32: its layer is the model's last, its sum half of each input."""
        head = cls(model.sizes).to(model.device)
        head.layers[0].load_state_dict(model.layers[-1].state_dict())
        head.norm.load_state_dict(model.norm.state_dict())
        half = torch.eye(model.sizes.hidden_size) / 2
        with torch.no_grad():
            head.fc.weight.copy_(torch.cat((half, half), dim=1))
        return head

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """[B, T, D]: as `Llama.logits` takes it.

        Args:
            embeddings: [B, T, D], of the token behind each.
            hidden: [B, T, D], the model's at each; further drafts: the head's own.
        """
        both = (self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden))
        rotation = Rotation.of(self.sizes, torch.arange(hidden.shape[1], device=hidden.device))
        return self.norm(self.layers[0](self.fc(torch.cat(both, dim=-1)), rotation))
