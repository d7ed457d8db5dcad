"""Weights in FP8 from files: every rank's values and scales, memory, dummy weights, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoint.refusals import refused
from tests.checkpoint.test_mtp_weights import make
from tests.model.fp8_checkpoints import FORMS, FP8_CONFIG, compressed, publish
from tests.model.helpers import CPU, SPEC
from tpworker.checkpoint.assembly import assemble
from tpworker.checkpoint.checkpoint import Checkpoint
from tpworker.checkpoint.likeness import check_likeness
from tpworker.checkpoint.tensor_file import write_tensors
from tpworker.checkpoint.weight_files import WeightFiles
from tpworker.checkpoint.weights import dummy_weights, load_weights, shard_bytes
from tpworker.errors import ModelError
from tpworker.kernels.operands import Fp8Weight, Matrix
from tpworker.model.families import FP8, MADE, ModelSpec, MoeSpec, Quantization, read_spec
from tpworker.model.fp8 import dequantise, quantise
from tpworker.model.linear import Linear
from tpworker.model.tp import Shard
from tpworker.model.weights import DecoderWeights
from tpworker.rank.kept import HostMemory

GPU = torch.device("cuda")
MOE = MoeSpec(layers=(1,), num_experts=4, experts_per_token=2, intermediate_size=24, num_shared=1)
MIXTURE = dataclasses.replace(SPEC, family="glm4_moe", moe=MOE)


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep weights as they were read, so that they can be compared."""
    for module in ("model.linear", "checkpoint.weights", "checkpoint.assembly"):
        monkeypatch.setattr(f"tpworker.{module}.can_pack", lambda device, dtype: False)


def as_on_gpus(folder: Path, rank: int, size: int, quantization: str | None = None) -> DecoderWeights:
    """What a rank on a GPU holds, with its head for multi-token prediction."""
    spec = read_spec(folder, quantization)
    checkpoint = Checkpoint(WeightFiles(folder), {})
    shard = Shard.of(spec, rank, size)
    fill = checkpoint.read_into
    return assemble(spec, shard, torch.float32, CPU, fill, with_mtp=True, sized_for=GPU)


def as_on_cpus(folder: Path, rank: int, size: int) -> DecoderWeights:
    spec = read_spec(folder)
    return load_weights(folder, spec, Shard.of(spec, rank, size), torch.float32, CPU, with_mtp=True)


def products(weights: DecoderWeights) -> Iterator[Tensor | Fp8Weight]:
    """The weights of all attention and MLPs, in order."""
    assert weights.mtp is not None
    for layer in (*weights.layers, weights.mtp.layer):
        for part in (layer.qkv, layer.output, *parts_of(layer.mlp)):
            if isinstance(part, Linear):
                yield part.weight if part.fp8 is None else part.fp8
            else:
                assert isinstance(part, (Tensor, Fp8Weight))
                yield part


def parts_of(mlp: Any) -> list[Matrix | Tensor | Fp8Weight]:
    return [mlp.gate_up, mlp.down]


def meant(weight: Tensor | Fp8Weight) -> Tensor:
    return dequantise(weight) if isinstance(weight, Fp8Weight) else weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["glm", "ernie", "qwen3"])
def test_every_rank_has_what_the_published_weights_stand_for(tmp_path: Path, name: str, form: str) -> None:
    folder = publish(make(name, tmp_path / "model"), tmp_path, form)
    for size in (1, 2, 4, 3):
        for rank in range(size):
            expected = list(products(as_on_cpus(tmp_path / "plain", rank, size)))
            on_gpus = list(products(as_on_gpus(folder, rank, size)))
            on_cpus = list(products(as_on_cpus(folder, rank, size)))
            assert [isinstance(weight, Fp8Weight) for weight in on_gpus].count(
                False
            ) == 2  # layer 1's attention
            for wanted, gpu, cpu in zip(expected, on_gpus, on_cpus, strict=True):
                assert torch.equal(meant(wanted), meant(gpu))
                assert torch.equal(meant(wanted), meant(cpu))


def test_a_rank_takes_a_byte_a_weight_and_its_scales() -> None:
    shard = Shard.of(MIXTURE, 0, 2)
    plain = shard_bytes(MIXTURE, shard, torch.bfloat16, GPU)
    made = shard_bytes(dataclasses.replace(MIXTURE, quantization=MADE), shard, torch.bfloat16, GPU)
    # Of attention, the dense MLP, and the experts, of each of which a rank has 12 columns, padded to 16.
    rows = 2 * (32 + 32) + 48 + 32 + 5 * (32 + 32)
    values = 2 * (32 * 32 + 32 * 16) + 48 * 32 + 32 * 24 + 5 * (32 * 32 + 32 * 16)
    assert plain - made == values - 4 * rows
    assert shard_bytes(dataclasses.replace(MIXTURE, quantization=MADE), shard, torch.bfloat16) == shard_bytes(
        MIXTURE, shard, torch.bfloat16
    ), "the CPU has what they stand for"


@pytest.mark.parametrize(
    "quantization", [MADE, Quantization(), Quantization(scales="block", block=32, name="weight_scale_inv")]
)
def test_dummy_weights_are_like_those_that_are_not_in_fp8(quantization: Quantization) -> None:
    spec = dataclasses.replace(MIXTURE, quantization=quantization, hidden_size=256)
    seen = list[tuple[int, int]]()
    made = dummy_weights(spec, Shard.of(spec, 0, 1), torch.float32, CPU, progress=lambda *at: seen.append(at))
    for layer in made.layers:
        for part in (layer.qkv, layer.output, *parts_of(layer.mlp)):
            weight = part.weight if isinstance(part, Linear) else part
            assert isinstance(weight, Tensor)
            assert 0.018 < float(weight.std()) < 0.022
            assert abs(float(weight.mean())) < 0.002
    assert seen == sorted(seen)
    assert len({done for done, _ in seen}) > 10
    assert seen[-2] == seen[-1] == (seen[-1][1],) * 2, "nothing is left for the end"


def test_weights_in_fp8_are_made_in_it_while_they_are_read(tmp_path: Path) -> None:
    folder = make("glm", tmp_path / "model")
    for rank in range(2):
        found = products(as_on_gpus(folder, rank, 2, FP8))
        for weight, made in zip(products(as_on_cpus(folder, rank, 2)), found, strict=True):
            assert isinstance(weight, Tensor)
            assert isinstance(made, Fp8Weight)
            for number in range(len(weight) if weight.dim() == 3 else 1):
                one = weight[number] if weight.dim() == 3 else weight
                whole = made.of(number) if weight.dim() == 3 else made
                again = quantise(one)
                assert torch.equal(whole.scales, again.scales)
                assert torch.equal(whole.values.float(), again.values.float())


def test_kept_memory_tells_weights_in_fp8_from_others(tmp_path: Path) -> None:
    fd = os.memfd_create("kept")
    try:
        folder = publish(make("qwen3", tmp_path / "model"), tmp_path, "blocks")
        first, admitted = dict[str | None, Tensor](), list[int]()
        for quantization in (None, FP8, None, None):
            spec = read_spec(folder if quantization is None else tmp_path / "plain", quantization)
            at = folder if quantization is None else tmp_path / "plain"
            loaded = load_weights(
                at, spec, Shard.of(spec, 0, 1), torch.float32, CPU, admit=admitted.append,
                kept=HostMemory(fd, "weights"),
            )  # fmt: skip
            qkv = loaded.layers[0].qkv.weight.clone()
            assert torch.equal(first.setdefault(quantization, qkv), qkv)
        assert len(admitted) == 3, "the last finds what the one before it left"
        assert not torch.equal(first[None], first[FP8])
    finally:
        os.close(fd)


# --------------------------------------------------------------------------------------- config.json


def read(folder: Path, quantization: dict[str, Any] | None) -> ModelSpec:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("quantization", "kept", "covered"),
    [
        (compressed("channel", ["lm_head", "a.b"]), "a.b", "a.bc"),
        (compressed("channel", ["re:.*self_attn"]), "layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"),
        (compressed("channel", ["re:.*gate$"]), "layers.0.mlp.gate", "layers.0.mlp.gate_proj"),
        (FP8_CONFIG | {"modules_to_not_convert": ["layers.1"]}, "model.layers.1.x", "model.layers.10.x"),
        (FP8_CONFIG | {"modules_to_not_convert": ["gate"]}, "layers.0.mlp.gate", "layers.0.mlp.gate_proj"),
        (FP8_CONFIG | {"modules_to_not_convert": None}, None, "lm_head"),
    ],
)  # fmt: skip
def test_modules_that_are_kept(
    model: Path, quantization: dict[str, Any], kept: str | None, covered: str
) -> None:
    found = read(model, quantization).quantization
    assert found is not None
    assert found.covers(covered)
    assert kept is None or not found.covers(kept)


def changed(quantization: dict[str, Any], **change: Any) -> dict[str, Any]:
    """With other values in the group's weights, or in its input_activations."""
    copied: dict[str, Any] = json.loads(json.dumps(quantization))
    for key, value in change.items():
        where, name = key.split("__")
        copied["config_groups"]["group_0"][where][name] = value
    return copied


CHANNELS = compressed("channel", [])


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq"}, "method 'awq'.* is not supported.*--quantization fp8 makes FP8"),
        (changed(CHANNELS, weights__num_bits=4), "weights: num_bits=4, not 8"),
        (changed(CHANNELS, weights__type="int"), "weights: type='int', not 'float'"),
        (changed(CHANNELS, weights__symmetric=False), "weights: symmetric=False, not True"),
        (changed(CHANNELS, weights__strategy="group"), "strategy='group', not channel, block or tensor"),
        (changed(CHANNELS, input_activations__dynamic=False), "input_activations: dynamic=False, not True"),
        (CHANNELS | {"format": "pack-quantized"}, "format='pack-quantized'"),
        (CHANNELS | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
        (
            CHANNELS | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config of format 'sparse",
        ),
        (CHANNELS | {"config_groups": {}}, "config_groups has 0 groups"),
        (FP8_CONFIG | {"activation_scheme": "static"}, "activation_scheme='static', not dynamic"),
        (FP8_CONFIG | {"weight_block_size": [1, 128]}, r"weight_block_size=\[1, 128\], not \[128, 128\]"),
        (FP8_CONFIG | {"fmt": "e5m2"}, "fmt='e5m2', not e4m3"),
        (FP8_CONFIG | {"modules_to_not_convert": "lm_head"}, "must be a list"),
        (compressed("channel", ["re:(a+)+$"]), "may take too long"),
        (compressed("channel", ["re:" + ".*x" * 4]), "may take too long: at most 256 characters, and 3 rep"),
        (compressed("channel", ["re:(a"]), "is no regular expression"),
        (compressed("channel", ["re:a"] * 33), "has 33 patterns"),
    ],
)
def test_other_quantisations_are_refused_in_a_line(
    model: Path, quantization: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read(model, quantization)
    assert "config.json" in refused(read_spec, model)


def test_files_that_config_json_does_not_describe_are_refused(tmp_path: Path) -> None:
    folder = publish(make("qwen3", tmp_path / "model"), tmp_path, "blocks")
    read(tmp_path / "plain", FORMS["blocks"])
    with pytest.raises(
        ModelError, match=r"q_proj.weight is of type F32, expected F8_E4M3: quantization_config"
    ):
        as_on_cpus(tmp_path / "plain", 0, 1)
    read(folder, None)
    with pytest.raises(ModelError, match=r"is of type F8_E4M3, expected one of F64, .* without it none is"):
        as_on_cpus(folder, 0, 1)
    read(folder, FORMS["blocks"] | {"modules_to_not_convert": ["model.layers.1.self_attn", "k_proj"]})
    with pytest.raises(ModelError, match=r"has model.layers.0.self_attn.q_proj in FP8 and .*k_proj not"):
        as_on_cpus(folder, 0, 1)


# ------------------------------------------------------------------------------------- other weights


def test_other_weights_of_the_same_form_take_the_place(tmp_path: Path) -> None:
    folder = publish(make("qwen3", tmp_path / "model"), tmp_path, "blocks")
    spec, seen = read_spec(folder), list[tuple[int, int]]()
    load_weights(folder, spec, Shard.of(spec, 0, 1), torch.float32, CPU, lambda *at: seen.append(at))
    assert seen[-2] == seen[-1] == (seen[-1][1],) * 2, "progress counts bytes that are read"
    assert check_likeness(folder, spec, {}, with_mtp=True)
    with pytest.raises(ModelError, match="quantization is None, and that of the model that is served"):
        check_likeness(tmp_path / "plain", spec, {})
    made = read_spec(tmp_path / "plain", FP8)
    assert check_likeness(tmp_path / "model", made, {}, with_mtp=True)


def test_tensors_of_a_program_may_be_in_fp8(tmp_path: Path) -> None:
    folder = publish(make("qwen3", tmp_path / "model"), tmp_path, "blocks")
    spec, fd = read_spec(folder), os.memfd_create("tensors")
    try:
        write_tensors(fd, load_file(folder / "model.safetensors").items(), spec, with_mtp=True)
        shard = Shard.of(spec, 0, 1)
        found = load_weights(folder, spec, shard, torch.float32, CPU, with_mtp=True, fd=fd)
    finally:
        os.close(fd)
    for ours, theirs in zip(products(found), products(as_on_cpus(folder, 0, 1)), strict=True):
        assert torch.equal(meant(ours), meant(theirs))
