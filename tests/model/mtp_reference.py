"""Heads for multi-token prediction as they are published, in plain torch: nothing here is tpworker's.

One sequence at a time, one head at a time, one expert at a time, in float32.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.model.helpers import tiny_model


@dataclasses.dataclass(frozen=True)
class Form:
    """How a family publishes its head."""

    layer: str
    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str
    takes_normed: bool = True
    """It is fed states from behind the norm before the output head; else from before it."""
    neighbours: bool = False
    """Entries 2 i and 2 i + 1 of a head are rotated against each other, not i and i + half."""


def glm(num_layers: int) -> Form:
    prefix = f"model.layers.{num_layers}"
    return Form(
        layer=prefix,
        embedding_norm=f"{prefix}.enorm",
        hidden_norm=f"{prefix}.hnorm",
        projection=f"{prefix}.eh_proj",
        norm=f"{prefix}.shared_head.norm",
    )


ERNIE = Form(
    layer="model.mtp_block.0",
    embedding_norm="model.mtp_emb_norm.0",
    hidden_norm="model.mtp_hidden_norm.0",
    projection="model.mtp_linear_proj.0",
    norm="model.norm",
    takes_normed=False,
    neighbours=True,
)
QWEN3_NEXT = Form(
    layer="mtp.layers.0",
    embedding_norm="mtp.pre_fc_norm_embedding",
    hidden_norm="mtp.pre_fc_norm_hidden",
    projection="mtp.fc",
    norm="mtp.norm",
)


def form_of(config: dict[str, Any]) -> Form:
    """By the architecture of a config.json."""
    architecture = config["architectures"][0]
    if architecture.startswith("Glm4"):
        return glm(config["num_hidden_layers"])
    return ERNIE if architecture.startswith("Ernie") else QWEN3_NEXT


def head_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a head's tensors, by its model's config.json."""
    form, architecture, size = form_of(config), config["architectures"][0], config["hidden_size"]
    head_dim = config.get("head_dim") or size // config["num_attention_heads"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    has_bias = config.get("attention_bias") or config.get("use_bias") or architecture.startswith("Qwen2")
    shapes: dict[str, tuple[int, ...]] = {
        f"{form.embedding_norm}.weight": (size,),
        f"{form.hidden_norm}.weight": (size,),
        f"{form.projection}.weight": (size, 2 * size),
        f"{form.layer}.input_layernorm.weight": (size,),
        f"{form.layer}.post_attention_layernorm.weight": (size,),
        f"{form.layer}.self_attn.o_proj.weight": (size, queries),
    }
    if form.norm != "model.norm":
        shapes[f"{form.norm}.weight"] = (size,)
    if config.get("use_bias"):
        shapes[f"{form.projection}.bias"] = (size,)
        shapes[f"{form.layer}.self_attn.o_proj.bias"] = (size,)
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"{form.layer}.self_attn.{name}_proj.weight"] = (rows, size)
        if has_bias:
            shapes[f"{form.layer}.self_attn.{name}_proj.bias"] = (rows,)
    if config.get("use_qk_norm") or architecture.startswith("Qwen3"):
        shapes |= {f"{form.layer}.self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    prefix = f"{form.layer}.mlp"
    num_experts = config.get("n_routed_experts") or config.get("moe_num_experts")
    if architecture.startswith("Ernie") and config.get("moe_layer_start_index") != 0:
        num_experts = None  # built as layer 0, which is dense
    if num_experts is None:
        return shapes | _mlp_shapes(prefix, size, config["intermediate_size"], config.get("use_bias"))
    width = config["moe_intermediate_size"]
    num_shared = config.get("n_shared_experts") or config.get("moe_num_shared_experts") or 1
    shapes[f"{prefix}.gate.weight"] = (num_experts, size)
    if architecture.startswith("Glm4"):
        shapes[f"{prefix}.gate.e_score_correction_bias"] = (num_experts,)
    else:
        shapes[f"{prefix}.moe_statics.e_score_correction_bias"] = (1, num_experts)
    for expert in range(num_experts):
        shapes |= _mlp_shapes(f"{prefix}.experts.{expert}", size, width, False)
    return shapes | _mlp_shapes(f"{prefix}.shared_experts", size, num_shared * width, False)


def _mlp_shapes(prefix: str, size: int, width: int, has_bias: bool | None) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows, columns in (("gate", width, size), ("up", width, size), ("down", size, width)):
        shapes[f"{prefix}.{name}_proj.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{prefix}.{name}_proj.bias"] = (rows,)
    return shapes


def random_head(config: dict[str, Any], seed: int = 5) -> dict[str, Tensor]:
    """Tensors of a head, as random as `tiny_model` makes a model's."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in head_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = torch.rand(shape, generator=generator) + 0.5
        elif "correction_bias" in name:
            tensors[name] = 0.1 * noise
        else:
            tensors[name] = 0.3 * noise if name.endswith("bias") else noise * 0.6 / shape[-1] ** 0.5
    return tensors


def make_checkpoint(folder: Path, config: Any) -> Any:
    """A tiny model of transformers with a head, saved to `folder`; returns the model."""
    model = tiny_model(folder, config)
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}
    path.write_text(json.dumps(values))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | random_head(values), folder / "model.safetensors", {"format": "pt"})
    return model


@dataclasses.dataclass(frozen=True)
class ReferenceHead:
    """The head of a folder, for whole sequences."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    form: Form

    @classmethod
    def load(cls, folder: Path) -> ReferenceHead:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        return cls(config, {name: t.float() for name, t in tensors.items()}, form_of(config))

    def __call__(self, states: Sequence[Tensor], tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of one sequence from its beginning.

        Args:
            states: of each position [D], as `takes` says.
            tokens: the token behind each position.

        Returns:
            What the head makes of each position: states [T, D] to be fed again, and logits [T, vocab].
        """
        form = self.form
        embedded = torch.stack([self.tensors["model.embed_tokens.weight"][token] for token in tokens])
        inputs = (
            self.normed(embedded, form.embedding_norm),
            self.normed(torch.stack(list(states)), form.hidden_norm),
        )
        x = self.linear(torch.cat(inputs, dim=-1), form.projection)
        x = x + self.attention(self.normed(x, f"{form.layer}.input_layernorm"))
        x = x + self.mlp(self.normed(x, f"{form.layer}.post_attention_layernorm"))
        normed = self.normed(x, form.norm)
        head = self.tensors.get("lm_head.weight")
        if head is None or self.config.get("tie_word_embeddings"):
            head = self.tensors["model.embed_tokens.weight"]
        return (normed if form.takes_normed else x), normed @ head.T

    def takes(self, model: Any, ids: Tensor) -> Tensor:
        """The states of a model of transformers that the head is fed, [S, T, D] for ids [S, T]."""
        seen: list[tuple[Tensor, Tensor]] = []

        def note(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            seen.append((inputs[0], output))

        handle = model.model.norm.register_forward_hook(note)
        with torch.inference_mode():
            model(ids)
        handle.remove()
        ((before, behind),) = seen
        return behind if self.form.takes_normed else before

    # ------------------------------------------------------------------------------ parts

    def normed(self, x: Tensor, name: str) -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return self.tensors[f"{name}.weight"] * x * torch.rsqrt(mean + self.config["rms_norm_eps"])

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def rotated(self, head: Tensor) -> Tensor:
        """A head [T, head_dim] of positions 0, 1, …"""
        rope = self.config.get("rope_parameters") or {}
        partial = rope.get("partial_rotary_factor", self.config.get("partial_rotary_factor", 1.0))
        size = int(head.shape[-1] * partial)
        theta = rope.get("rope_theta") or self.config["rope_theta"]
        out = head.clone()
        for pair in range(size // 2):
            angles = torch.arange(len(head)) * theta ** (-2 * pair / size)
            one, other = (2 * pair, 2 * pair + 1) if self.form.neighbours else (pair, pair + size // 2)
            out[:, one] = head[:, one] * angles.cos() - head[:, other] * angles.sin()
            out[:, other] = head[:, other] * angles.cos() + head[:, one] * angles.sin()
        return out

    def attention(self, x: Tensor) -> Tensor:
        prefix = f"{self.form.layer}.self_attn"
        num_heads, num_kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        queries = self.linear(x, f"{prefix}.q_proj").chunk(num_heads, dim=-1)
        keys = self.linear(x, f"{prefix}.k_proj").chunk(num_kv_heads, dim=-1)
        values = self.linear(x, f"{prefix}.v_proj").chunk(num_kv_heads, dim=-1)
        if f"{prefix}.q_norm.weight" in self.tensors:
            queries = tuple(self.normed(query, f"{prefix}.q_norm") for query in queries)
            keys = tuple(self.normed(key, f"{prefix}.k_norm") for key in keys)
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        outputs = []
        for number, query in enumerate(queries):
            of = number * num_kv_heads // num_heads
            scores = self.rotated(query) @ self.rotated(keys[of]).T / query.shape[-1] ** 0.5
            outputs.append(scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ values[of])
        return self.linear(torch.cat(outputs, dim=-1), f"{prefix}.o_proj")

    def gated(self, x: Tensor, name: str) -> Tensor:
        gate = self.linear(x, f"{name}.gate_proj")
        return self.linear(F.silu(gate) * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def mlp(self, x: Tensor) -> Tensor:
        prefix = f"{self.form.layer}.mlp"
        if f"{prefix}.gate.weight" not in self.tensors:
            return self.gated(x, prefix)
        logits = self.linear(x, f"{prefix}.gate")
        if self.form is ERNIE:
            scores = logits.softmax(dim=-1)
            bias = self.tensors[f"{prefix}.moe_statics.e_score_correction_bias"][0]
            count, scale = self.config["moe_k"], 1.0
        else:
            scores = logits.sigmoid()
            bias = self.tensors[f"{prefix}.gate.e_score_correction_bias"]
            count, scale = self.config["num_experts_per_tok"], self.config["routed_scaling_factor"]
        rows = []
        for row, score in zip(x, scores, strict=True):
            chosen = (score + bias).topk(count).indices.tolist()
            total = sum(score[expert] for expert in chosen)
            parts = (score[e] / total * scale * self.gated(row, f"{prefix}.experts.{e}") for e in chosen)
            rows.append(sum(parts, self.gated(row, f"{prefix}.shared_experts")))
        return torch.stack(rows)
