"""Loading: each rank's slices and no more, every layout of files, and what is said of broken ones."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Ernie4_5_MoeConfig, Glm4MoeConfig, LlamaConfig

from tests.model.helpers import CPU, SPEC, tiny_model
from tpworker.checkpoint import checkpoint
from tpworker.checkpoint.checkpoint import Checkpoint
from tpworker.checkpoint.weights import (
    DecoderWeights,
    check_weights,
    dummy_weights,
    load_weights,
    shard_bytes,
)
from tpworker.errors import ModelError
from tpworker.model.families import ModelSpec, MoeSpec, read_spec
from tpworker.model.linear import Linear, can_pack
from tpworker.model.mlp import Mlp
from tpworker.model.moe import Moe
from tpworker.model.tp import Shard, Split

META = torch.device("meta")  # where nothing is packed, as on CUDA

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


GLM = Glm4MoeConfig(**TINY, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2)
ERNIE = Ernie4_5_MoeConfig(**TINY, moe_intermediate_size=32, moe_num_experts=4, moe_k=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(tmp_path, LlamaConfig(**TINY))
    return tmp_path


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep weights as they were read, so that they can be compared."""
    monkeypatch.setattr("tpworker.model.linear.can_pack", lambda device, dtype: False)
    monkeypatch.setattr("tpworker.checkpoint.weights.can_pack", lambda device, dtype: False)
    monkeypatch.setattr("tpworker.checkpoint.assembly.can_pack", lambda device, dtype: False)


def load(folder: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    spec = read_spec(folder)
    return load_weights(folder, spec, Shard.of(spec, rank, size), dtype, CPU)


def tensors_of(weights: DecoderWeights) -> dict[str, Tensor]:
    """Every tensor of a rank by a name of its own."""
    found: dict[str, Tensor] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Linear):
            add(f"{name}.weight", value.weight)
            add(f"{name}.bias", value.bias)
        elif isinstance(value, Tensor):
            found[name.removesuffix(".weight")] = value
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                add(f"{name}.{number}", item)
        elif isinstance(value, Moe):
            for part in ("gate", "bias", "gate_up", "down"):
                add(f"{name}.{part}", getattr(value, part))
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                add(f"{name}.{field.name}" if name else field.name, getattr(value, field.name))

    add("", weights)
    return found


# -------------------------------------------------------------------------------- what is read


class CountingFile:
    """`safe_open` that records how many bytes of each tensor were asked for."""

    def __init__(self, path: Path, bytes_read: Counter[str], real: Callable[..., Any]) -> None:
        self.file = real(path, framework="pt", device="cpu")
        self.bytes_read = bytes_read

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def get_slice(self, name: str) -> Any:
        outer, tensor = self, self.file.get_slice(name)

        class CountingSlice:
            get_shape = staticmethod(tensor.get_shape)
            get_dtype = staticmethod(tensor.get_dtype)

            def __getitem__(self, index: Any) -> Tensor:
                part: Tensor = tensor[index]
                outer.bytes_read[name] += part.nbytes
                return part

        return CountingSlice()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("config", [LlamaConfig(**TINY), GLM, ERNIE], ids=["llama", "glm", "ernie"])
@pytest.mark.parametrize("packs", [False, True])
def test_a_rank_reads_its_slices_and_no_more(
    tmp_path: Path, config: Any, packs: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path
    tiny_model(folder, config)
    if not packs:
        monkeypatch.setattr("tpworker.checkpoint.weights.can_pack", lambda device, dtype: False)
        monkeypatch.setattr("tpworker.checkpoint.assembly.can_pack", lambda device, dtype: False)
    real = checkpoint.safe_open
    counts: list[Counter[str]] = []
    for rank in range(size):
        counts.append(Counter())
        monkeypatch.setattr(
            checkpoint, "safe_open", lambda path, count=counts[-1], **_: CountingFile(path, count, real)
        )
        load(folder, rank, size)
    full = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}
    for count in counts:
        for name, nbytes in full.items():
            is_whole = "norm" in name or "mlp.gate." in name or "correction" in name
            assert count[name] == (nbytes if is_whole else nbytes // size), name


@pytest.mark.usefixtures("unpacked")
def test_the_slices_are_the_right_ones(folder: Path) -> None:
    full = load_file(folder / "model.safetensors")
    for rank in range(2):
        weights = load(folder, rank, 2)
        layer = weights.layers[1]
        prefix = "model.layers.1."
        query, key, value = layer.qkv.weight.split([32, 16, 16])
        assert torch.equal(query, full[prefix + "self_attn.q_proj.weight"].chunk(2)[rank])
        assert torch.equal(key, full[prefix + "self_attn.k_proj.weight"].chunk(2)[rank])
        assert torch.equal(value, full[prefix + "self_attn.v_proj.weight"].chunk(2)[rank])
        assert torch.equal(layer.output.weight, full[prefix + "self_attn.o_proj.weight"].chunk(2, 1)[rank])
        assert isinstance(layer.mlp, Mlp)
        gate, up = layer.mlp.gate_up.weight.chunk(2)
        assert torch.equal(gate, full[prefix + "mlp.gate_proj.weight"].chunk(2)[rank])
        assert torch.equal(up, full[prefix + "mlp.up_proj.weight"].chunk(2)[rank])
        assert torch.equal(layer.mlp.down.weight, full[prefix + "mlp.down_proj.weight"].chunk(2, 1)[rank])
        assert torch.equal(weights.embed, full["model.embed_tokens.weight"].chunk(2)[rank])
        assert torch.equal(weights.lm_head.weight, full["lm_head.weight"].chunk(2)[rank])
        assert torch.equal(layer.mlp_norm, full[prefix + "post_attention_layernorm.weight"])


@pytest.mark.usefixtures("unpacked")
def test_a_bias_of_a_sum_is_added_by_rank_0_alone(tmp_path: Path) -> None:
    tiny_model(tmp_path, LlamaConfig(**TINY, attention_bias=True, mlp_bias=True))
    full = load_file(tmp_path / "model.safetensors")
    first, second = (load(tmp_path, rank, 2).layers[0] for rank in range(2))
    assert isinstance(first.mlp, Mlp)
    assert isinstance(second.mlp, Mlp)
    for published, here, there in (
        ("self_attn.o_proj", first.output, second.output),
        ("mlp.down_proj", first.mlp.down, second.mlp.down),
    ):
        assert here.bias is not None
        assert there.bias is not None
        assert torch.equal(here.bias, full[f"model.layers.0.{published}.bias"])
        assert not there.bias.any()


@pytest.mark.usefixtures("unpacked")
def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    tiny_model(tmp_path, LlamaConfig(**TINY, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    weights = load(tmp_path)
    assert weights.lm_head.weight is weights.embed


def test_a_tied_checkpoint_may_hold_the_output_head_as_well(tmp_path: Path) -> None:
    tiny_model(tmp_path, LlamaConfig(**TINY, tie_word_embeddings=True))
    change(tmp_path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    load(tmp_path)


@pytest.mark.usefixtures("unpacked")
def test_a_sharded_checkpoint_is_the_same_model(folder: Path) -> None:
    single = tensors_of(load(folder, 1, 2))
    shard_files(folder)
    assert not (folder / "model.safetensors").exists()
    sharded = tensors_of(load(folder, 1, 2))
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], tensor) for name, tensor in single.items())


@pytest.mark.usefixtures("unpacked")
def test_values_are_cast_to_the_dtype_asked_for(tmp_path: Path) -> None:
    tiny_model(tmp_path, LlamaConfig(**TINY), dtype=torch.bfloat16)
    bfloat16 = tensors_of(load(tmp_path, dtype=torch.bfloat16))
    float32 = tensors_of(load(tmp_path))
    for name, tensor in float32.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, bfloat16[name].float())


def test_progress_counts_bytes_up_to_the_end(folder: Path) -> None:
    spec = read_spec(folder)
    shard = Shard.of(spec, 0, 2)
    seen: list[tuple[int, int]] = []
    load_weights(folder, spec, shard, torch.float32, CPU, lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {shard_bytes(spec, shard, torch.float32)}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert 0 < seen[0][0] < seen[0][1]


@pytest.mark.usefixtures("unpacked")
def test_several_threads_read_a_layer_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same time, the same weights; progress never goes back."""
    tiny_model(tmp_path, LlamaConfig(**TINY | {"num_hidden_layers": 6}))
    alone = tensors_of(load(tmp_path, 1, 2))
    meeting = threading.Barrier(4, timeout=30)
    real = Checkpoint.read_into

    def read_into(self: Checkpoint, out: Tensor, name: str, dim: int, split: Split) -> None:
        if re.fullmatch(r"model\.layers\.[0-3]\.input_layernorm\.weight", name):
            meeting.wait()
        real(self, out, name, dim, split)

    monkeypatch.setattr(Checkpoint, "read_into", read_into)
    torch.set_num_threads(4)
    spec = read_spec(tmp_path)
    seen: list[int] = []
    shard = Shard.of(spec, 1, 2)
    weights = load_weights(tmp_path, spec, shard, torch.float32, CPU, lambda done, total: seen.append(done))
    together = tensors_of(weights)
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())
    assert seen == sorted(seen)
    assert seen[-1] == shard_bytes(spec, shard, torch.float32)


def test_of_several_broken_layers_the_first_is_named(tmp_path: Path) -> None:
    tiny_model(tmp_path, LlamaConfig(**TINY | {"num_hidden_layers": 6}))
    change(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if "q_proj" not in name})
    torch.set_num_threads(4)
    for _ in range(5):
        with pytest.raises(ModelError, match=r"has no tensor model\.layers\.0\.self_attn\.q_proj\.weight"):
            load(tmp_path)


# --------------------------------------------------------------------------- what is wrong with it


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite the folder's weights."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path)


def shard_files(folder: Path) -> None:
    """Cut model.safetensors into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def replaced(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: value}


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without(Q_PROJ), rf"has no tensor {Q_PROJ}"),
        (replaced(Q_PROJ, torch.zeros(32, 32)), rf"{Q_PROJ} has shape \[32, 32\].* asks for \[64, 32\]"),
        (replaced(Q_PROJ, torch.zeros(64)), rf"{Q_PROJ} has shape \[64\].* asks for \[64, 32\]"),
        (replaced("model.norm.weight", torch.zeros(32, 1)), r"model.norm.weight has shape \[32, 1\]"),
        (
            replaced(Q_PROJ, torch.zeros(64, 32, dtype=torch.int8)),
            rf"{Q_PROJ} is of type I8, expected one of F64, F32, F16, BF16",
        ),
        (
            replaced("model.layers.0.self_attn.q_norm.weight", torch.zeros(8)),
            r"LlamaForCausalLM .* has no use for .* model.layers.0.self_attn.q_norm.weight\. If",
        ),
        (replaced("with\na line", torch.zeros(8)), r"has no use for .* 'with\\na line'\. If"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    change(folder, edit)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder, 1, 2)
    assert str(folder) in str(caught.value)


def test_nothing_is_read_before_all_was_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(tmp_path, GLM)
    router = "model.layers.1.mlp.gate.weight"
    change(tmp_path, replaced(router, torch.zeros(5, 32)))
    monkeypatch.setattr(Checkpoint, "read_into", lambda *_: pytest.fail("read"))
    for look in (load, lambda folder: check_weights(folder, read_spec(folder))):
        with pytest.raises(ModelError, match=rf"{router} has shape \[5, 32\].* asks for \[4, 32\]"):
            look(tmp_path)


def test_what_has_no_room_is_not_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "read_into", lambda *_: pytest.fail("read"))
    spec = read_spec(folder)
    shard = Shard.of(spec, 1, 2)
    asked: list[int] = []

    def admit(total: int) -> None:
        asked.append(total)
        raise MemoryError

    with pytest.raises(MemoryError):
        load_weights(folder, spec, shard, torch.float32, CPU, admit=admit)
    with pytest.raises(MemoryError):
        dummy_weights(spec, shard, torch.float32, CPU, admit=admit)
    assert asked == [shard_bytes(spec, shard, torch.float32)] * 2


def test_progress_of_dummies(folder: Path) -> None:
    spec, seen = read_spec(folder), list[int]()
    dummy_weights(spec, Shard.of(spec, 0, 1), torch.float32, CPU, progress=lambda done, _: seen.append(done))
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1] == shard_bytes(spec, Shard.of(spec, 0, 1), torch.float32)


@pytest.mark.parametrize("config", [LlamaConfig(**TINY), GLM, ERNIE], ids=["llama", "glm", "ernie"])
def test_buffers_of_rotary_positions_are_ignored(tmp_path: Path, config: Any) -> None:
    tiny_model(tmp_path, config)
    for buffer in ("inv_freq", "cos_cached", "sin_cached"):
        for place in ("model.layers.0.self_attn.rotary_emb", "model.rotary_emb"):
            change(tmp_path, replaced(f"{place}.{buffer}", torch.zeros(4)))
    load(tmp_path)


def test_a_truncated_file_is_named_with_its_sizes_and_first_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="is truncated") as caught:
        load(folder)
    message = str(caught.value)
    assert f"{path} is truncated: expected {len(data)} bytes, found {len(data) // 2}" in message
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    missing = {
        name
        for name, entry in header.items()
        if name != "__metadata__" and 8 + header_size + entry["data_offsets"][1] > len(data) // 2
    }
    first = min(missing, key=lambda name: header[name]["data_offsets"][1])
    assert f"{len(missing)} tensors" in message
    assert f"the first is {first}" in message


@pytest.mark.parametrize(
    "data", [b"", b"\x10\0\0\0", b"\x10\0\0\0\0\0\0\0{", b"\xff" * 100, b"<html></html>"]
)
def test_a_file_that_is_no_safetensors_is_named(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=rf"model\.safetensors \({len(data)} bytes\) is not a safetensors"):
        load(folder)


def test_a_folder_without_weights_says_what_it_has_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"found pytorch_model\.bin, which is not read.*--load-format dummy"):
        load(folder)


def test_a_missing_file_of_the_index_is_named(folder: Path) -> None:
    shard_files(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(folder)


def test_an_index_that_names_the_wrong_file(folder: Path) -> None:
    shard_files(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map[Q_PROJ] = next(file for file in weight_map.values() if file != weight_map[Q_PROJ])
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=rf"has no tensor {Q_PROJ}, although"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json is not a safetensors index"):
        load(folder)


# ------------------------------------------------------------------------------ sizes and dummies

MOE = MoeSpec(
    layers=(1,), num_experts=4, experts_per_token=2, intermediate_size=20, num_shared=2, has_bias=True
)
VARIANTS = [
    SPEC,
    dataclasses.replace(SPEC, tie_embeddings=True),
    dataclasses.replace(SPEC, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True),
    dataclasses.replace(SPEC, vocab_size=61, intermediate_size=45, num_heads=9, num_kv_heads=3),
    dataclasses.replace(SPEC, family="glm4_moe", moe=MOE),
    dataclasses.replace(SPEC, family="ernie4_5_moe", moe=dataclasses.replace(MOE, float32_gate=True)),
]


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.usefixtures("unpacked")
def test_shard_bytes_is_what_is_allocated(spec: ModelSpec, size: int) -> None:
    for rank in range(size):
        shard = Shard.of(spec, rank, size)
        weights = dummy_weights(spec, shard, torch.bfloat16, CPU)
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(weights).values()}
        assert shard_bytes(spec, shard, torch.bfloat16) == sum(unique.values())


def test_packed_tied_embeddings_are_held_twice() -> None:
    tied = dataclasses.replace(SPEC, tie_embeddings=True)
    shard = Shard.of(SPEC, 0, 1)
    embedding = SPEC.vocab_size * SPEC.hidden_size * 4
    saved = shard_bytes(SPEC, shard, torch.float32) - shard_bytes(tied, shard, torch.float32)
    assert saved == embedding * (not can_pack(CPU, torch.float32))
    saved = shard_bytes(SPEC, shard, torch.float32, META) - shard_bytes(tied, shard, torch.float32, META)
    assert saved == embedding


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        LlamaConfig(**TINY, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        GLM,
        ERNIE,
    ],
    ids=["untied", "tied", "glm", "ernie"],
)
def test_shard_bytes_are_transformers_parameters(tmp_path: Path, config: Any) -> None:
    model = tiny_model(tmp_path, config)
    spec = read_spec(tmp_path)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if spec.family == "glm4_moe":  # its correction biases are buffers
        assert spec.moe is not None
        num_parameters += len(spec.moe.layers) * spec.moe.num_experts
    assert shard_bytes(spec, Shard.of(spec, 0, 1), torch.float32, META) == 4 * num_parameters


def test_routers_are_in_float32_where_they_are_published_so_and_on_the_cpu() -> None:
    for wide in (False, True):
        spec = dataclasses.replace(SPEC, family="glm4_moe", moe=dataclasses.replace(MOE, float32_gate=wide))
        shard = Shard.of(spec, 0, 1)
        layer = dummy_weights(spec, shard, torch.bfloat16, CPU).layers[1]
        assert isinstance(layer.mlp, Moe)
        assert layer.mlp.gate.weight.dtype == torch.float32
        gate_entries = 4 * SPEC.hidden_size
        extra = shard_bytes(spec, shard, torch.bfloat16) - shard_bytes(spec, shard, torch.bfloat16, META)
        assert extra == (0 if wide else 2 * gate_entries)


@pytest.mark.usefixtures("unpacked")
def test_dummy_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpworker.checkpoint.weights._DUMMY_PERIOD", 1009)
    spec = dataclasses.replace(
        SPEC, family="glm4_moe", moe=MOE, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True
    )
    shard = Shard.of(spec, 0, 2)
    tensors = tensors_of(dummy_weights(spec, shard, torch.float32, CPU, seed=3))
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            assert not tensor.any()
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert 0.018 < tensor.std() < 0.022
            assert abs(tensor.mean()) < 0.002
            assert len(tensor.unique(dim=0)) == len(tensor)  # no two rows are alike
    again = tensors_of(dummy_weights(spec, shard, torch.float32, CPU, seed=3))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    other = tensors_of(dummy_weights(spec, shard, torch.float32, CPU, seed=4))
    assert not torch.equal(other["embed"], tensors["embed"])
    peer = tensors_of(dummy_weights(spec, Shard.of(spec, 1, 2), torch.float32, CPU, seed=3))
    assert not torch.equal(peer["embed"], tensors["embed"])
