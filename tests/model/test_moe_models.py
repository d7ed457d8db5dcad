"""Families of mixtures of experts against transformers, their routers too; and their checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from tests.model.helpers import CPU, Models, Rank, Reference, Work, references, run_ranks, shuffled_tables
from tpworker.checkpoint.weights import load_weights
from tpworker.errors import ModelError
from tpworker.model import moe
from tpworker.model.families import read_spec
from tpworker.model.moe import Moe
from tpworker.model.tp import Collectives, Shard

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
GLM: dict[str, Any] = BASE | {
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "attention_bias": True,
    "routed_scaling_factor": 1.5,
}
ERNIE: dict[str, Any] = BASE | {
    "num_attention_heads": 10,  # five for each key, as published: padded where they are shared out
    "moe_intermediate_size": 40,
    "moe_num_experts": 8,
    "moe_k": 3,
}
QWEN: dict[str, Any] = BASE | {"moe_intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 3}

CONFIGS: dict[str, Callable[[], Any]] = {
    "glm": lambda: Glm4MoeConfig(**GLM),
    "glm-groups": lambda: Glm4MoeConfig(
        **GLM | {"n_routed_experts": 12, "use_qk_norm": True, "n_shared_experts": 2},
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        first_k_dense_replace=2,
    ),
    "ernie": lambda: Ernie4_5_MoeConfig(**ERNIE),
    "ernie-some-layers": lambda: Ernie4_5_MoeConfig(
        **ERNIE | {"num_hidden_layers": 6, "tie_word_embeddings": False},
        moe_layer_start_index=1,
        moe_layer_end_index=4,
        moe_layer_interval=2,
        moe_num_shared_experts=0,
    ),
    "qwen": lambda: Qwen3MoeConfig(**QWEN, norm_topk_prob=True),
    "qwen-some-layers": lambda: Qwen3MoeConfig(
        **QWEN | {"num_hidden_layers": 5, "attention_bias": True}, decoder_sparse_step=2, mlp_only_layers=[1]
    ),
    "mixtral": lambda: MixtralConfig(**BASE, num_local_experts=4),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return references(CONFIGS, tmp_path_factory.mktemp)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacked weights, as on CUDA."""
    monkeypatch.setattr("tpworker.model.linear.can_pack", lambda device, dtype: False)
    monkeypatch.setattr("tpworker.checkpoint.weights.can_pack", lambda device, dtype: False)
    monkeypatch.setattr("tpworker.checkpoint.assembly.can_pack", lambda device, dtype: False)


# ----------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_transformers(models: Models, name: str, size: int) -> None:
    models(name).check(size)


@pytest.mark.parametrize("name", ["glm-groups", "ernie"])
@pytest.mark.usefixtures("unpacked")
def test_logits_of_stacked_weights(models: Models, name: str) -> None:
    models(name).check(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(models: Models, dtype: torch.dtype) -> None:
    """A choice that is nearly even may fall the other way: of most tokens the logits are near."""
    model = models("glm")

    result, reference = torch.cat(model.compute_on(2, dtype=dtype)[0]), torch.cat(model.expected())
    far = (result - reference).abs().amax(dim=-1) > 0.05 * reference.abs().max()
    assert far.float().mean() < 0.1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [1, 2])
def test_routers_choose_what_transformers_chooses(models: Models, name: str, size: int) -> None:
    """Every token's experts, and their weights."""
    model = models(name)
    theirs = _choices_of_transformers(model)
    spec = read_spec(model.folder)
    assert spec.moe is not None
    assert len(theirs) == len(spec.moe.layers)
    num_routed = spec.moe.experts_per_token

    def main(collectives: Collectives) -> list[tuple[Tensor, Tensor]]:
        rank = Rank.load(model.folder, collectives)
        found: list[tuple[Tensor, Tensor]] = []
        for layer in rank.decoder.weights.layers:
            if isinstance(layer.mlp, Moe):
                layer.mlp.router = _recorded(layer.mlp.router, found)
        rank.step([Work(0, 0, model.ids[0].tolist())], shuffled_tables(1, 40, 4, 64))
        return found

    for ours in run_ranks(size, main):
        for (ids, weights), (their_ids, their_weights) in zip(ours, theirs, strict=True):
            shared = torch.arange(spec.moe.num_shared, dtype=torch.int32) + spec.moe.num_experts
            assert torch.equal(ids[:, num_routed:], shared.expand(len(ids), -1))
            assert (weights[:, num_routed:] == 1).all()
            assert torch.equal(ids[:, :num_routed].sort(dim=-1).values, their_ids.sort(dim=-1).values)
            dense = torch.zeros(len(ids), spec.moe.num_experts)
            dense.scatter_(1, ids[:, :num_routed].long(), weights[:, :num_routed])
            dense.scatter_add_(1, their_ids.long(), -their_weights)
            torch.testing.assert_close(dense, torch.zeros_like(dense), rtol=0, atol=1e-4)
        assert len({tuple(sorted(row)) for row in ours[-1][0].tolist()}) > 3  # not always the same


def _recorded(router: moe.Router, found: list[tuple[Tensor, Tensor]]) -> moe.Router:
    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        found.append(router(x))
        return found[-1]

    return route


def _choices_of_transformers(model: Reference) -> list[tuple[Tensor, Tensor]]:
    """ids and weights of every mixture, of the first sequence."""
    found: list[tuple[Tensor, Tensor]] = []
    network = AutoModelForCausalLM.from_pretrained(model.folder).eval()
    for name, module in network.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda module, args, out: found.append((out[2].int(), out[1])))
    with torch.inference_mode():
        network(model.ids[:1])
    return found


@pytest.mark.parametrize("name", ["glm", "ernie"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_depend_on_the_batch(models: Models, name: str, dtype: torch.dtype) -> None:
    models(name).check_independence(dtype)


def to_mixture(dense: Path, mixture: Path, num_experts: int) -> None:
    """Write a Mixtral whose experts are a Llama's MLP, each with its hidden units in another order."""
    config = json.loads((dense / "config.json").read_text())
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
    }
    (mixture / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator()
    for name, tensor in load_file(dense / "model.safetensors").items():
        if ".mlp." not in name:
            tensors[name] = tensor
            continue
        part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[name.split(".")[-2]]
        prefix = name.split(".mlp.")[0] + ".block_sparse_moe"
        for expert in range(num_experts):
            generator.manual_seed(expert)  # one order for all three
            order = torch.randperm(config["intermediate_size"], generator=generator)
            permuted = tensor[:, order] if part == "w2" else tensor[order]
            tensors[f"{prefix}.experts.{expert}.{part}.weight"] = permuted.contiguous()
        tensors[f"{prefix}.gate.weight"] = torch.randn(
            num_experts, config["hidden_size"], generator=generator
        )
    save_file(tensors, mixture / "model.safetensors")


def test_experts_that_are_the_dense_mlp_in_another_order_change_nothing(tmp_path: Path) -> None:
    dense, mixture = tmp_path / "dense", tmp_path / "mixture"
    mixture.mkdir()
    reference = Reference.make(dense, LlamaConfig(**BASE))
    to_mixture(dense, mixture, 4)
    dataclasses.replace(reference, folder=mixture).check(2)


@pytest.mark.slow
def test_the_default_model_as_a_mixture(real_model: Path, tmp_path: Path) -> None:
    to_mixture(real_model, tmp_path, 3)
    ids = [504, 3575, 282, 4649, 314, 260, 1165, 9353, 411, 5109]

    def logits(folder: Path) -> list[Tensor]:
        def main(collectives: Collectives) -> Tensor:
            rank = Rank.load(folder, collectives, max_model_len=32)
            return rank.step([Work(0, 0, ids)], shuffled_tables(1, 32, 4, 64))

        return run_ranks(2, main)

    torch.testing.assert_close(logits(tmp_path)[0], logits(real_model)[0], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------- checkpoints


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("rank", [0, 1])
def test_stacks_hold_the_published_slices(models: Models, rank: int) -> None:
    """Of 40 hidden units 24 and 16: a multiple of 8 on every rank, padded with zeros."""
    folder = models("ernie").folder
    full = load_file(folder / "model.safetensors")
    spec = read_spec(folder)
    layers = load_weights(folder, spec, Shard.of(spec, rank, 2), torch.float32, CPU).layers
    mixture = layers[1].mlp
    assert isinstance(mixture, Moe)
    assert isinstance(mixture.gate_up, Tensor)
    assert isinstance(mixture.down, Tensor)
    assert mixture.gate_up.shape == (10, 48, 72)
    assert mixture.down.shape == (10, 72, 24)
    prefix = "model.layers.1.mlp"
    mine = slice(0, 24) if rank == 0 else slice(24, 40)
    length = mine.stop - mine.start
    for number in range(10):
        part = f"experts.{number}" if number < 8 else "shared_experts"
        start = 40 * (number - 8) if number >= 8 else 0
        gate, up, down = (full[f"{prefix}.{part}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        place = slice(start + mine.start, start + mine.stop)
        assert torch.equal(mixture.gate_up[number, :length], gate[place])
        assert torch.equal(mixture.gate_up[number, 24 : 24 + length], up[place])
        assert torch.equal(mixture.down[number, :, :length], down[:, place])
        assert not mixture.gate_up[number, length:24].any()
        assert not mixture.down[number, :, length:].any()
    assert torch.equal(mixture.gate.weight, full[f"{prefix}.gate.weight"])
    assert mixture.bias is not None
    assert torch.equal(mixture.bias, full[f"{prefix}.moe_statics.e_score_correction_bias"][0])


def _with_tensors(model: Reference, folder: Path, extra: dict[str, Tensor], **config: Any) -> Path:
    """A copy of the model with more tensors and a changed config."""
    values = json.loads((model.folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    save_file(load_file(model.folder / "model.safetensors") | extra, folder / "model.safetensors")
    return folder


GLM_MTP = {
    "model.layers.3.eh_proj.weight": torch.zeros(72, 144),
    "model.layers.3.enorm.weight": torch.zeros(72),
    "model.layers.3.hnorm.weight": torch.zeros(72),
    "model.layers.3.mlp.experts.0.up_proj.weight": torch.zeros(40, 72),
    "model.layers.3.shared_head.norm.weight": torch.zeros(72),
}
ERNIE_MTP = {
    "model.mtp_block.0.mlp.down_proj.weight": torch.zeros(72, 100),
    "model.mtp_linear_proj.0.weight": torch.zeros(72, 144),
    "model.mtp_emb_norm.0.weight": torch.zeros(72),
    "model.mtp_hidden_norm.0.weight": torch.zeros(72),
}


@pytest.mark.parametrize(("name", "extra"), [("glm", GLM_MTP), ("ernie", ERNIE_MTP)])
def test_layers_for_multi_token_prediction_are_named_and_left_out(
    models: Models,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    extra: dict[str, Tensor],
) -> None:
    model = models(name)
    folder = _with_tensors(model, tmp_path, extra)
    with caplog.at_level(logging.INFO, "tpworker"):
        dataclasses.replace(model, folder=folder).check(2)
    (message,) = [record.getMessage() for record in caplog.records if "multi-token" in record.getMessage()]
    assert f"not read: {len(extra)} tensors" in message
    assert min(extra) in message


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"num_nextn_predict_layers": 0}, "model.layers.3.eh_proj.weight"),
        ({}, "model.layers.4.eh_proj.weight"),
        ({}, "model.layers.3.mlp.experts.0.up_proj.weight"),  # a layer of the model, beyond num_hidden_layers
        ({}, "model.layers.1.mlp.experts.8.up_proj.weight"),
    ],
)
def test_other_layers_and_experts_are_not_left_out(
    models: Models, tmp_path: Path, change: dict[str, Any], tensor: str
) -> None:
    folder = _with_tensors(models("glm"), tmp_path, {tensor: torch.zeros(1)}, **change)
    spec = read_spec(folder)
    with pytest.raises(ModelError, match=f"has no use for .*{tensor}"):
        load_weights(folder, spec, Shard.of(spec, 0, 1), torch.float32, CPU)


def test_an_ernie_without_correction_bias(models: Models, tmp_path: Path) -> None:
    """moe_use_aux_free: false. Without it, there would be no tensor to read."""
    folder = _with_tensors(models("ernie"), tmp_path, {}, moe_use_aux_free=False)
    spec = read_spec(folder)
    with pytest.raises(ModelError, match=r"has no use for .*e_score_correction_bias"):
        load_weights(folder, spec, Shard.of(spec, 0, 1), torch.float32, CPU)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "correction" not in name},
        folder / "model.safetensors",
    )
    layer = load_weights(folder, spec, Shard.of(spec, 0, 1), torch.float32, CPU).layers[1]
    assert isinstance(layer.mlp, Moe)
    assert layer.mlp.bias is None
