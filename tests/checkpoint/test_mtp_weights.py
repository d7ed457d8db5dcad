"""Loading a head for multi-token prediction: which tensors, which slices, and what is said of broken ones."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Ernie4_5_MoeConfig, Ernie4_5Config, Glm4MoeConfig, LlamaConfig, Qwen3Config

from tests.model.helpers import CPU, SPEC, edit_config
from tests.model.mtp_reference import form_of, head_shapes, make_checkpoint
from tpworker.checkpoint.weight_files import check_files
from tpworker.checkpoint.weights import check_weights, dummy_weights, load_weights, shard_bytes
from tpworker.errors import ModelError
from tpworker.kernels.operands import Matrix
from tpworker.model.families import MoeSpec, MtpSpec, read_spec, why_no_mtp
from tpworker.model.linear import Linear
from tpworker.model.mlp import Mlp
from tpworker.model.moe import Moe
from tpworker.model.tp import Shard
from tpworker.model.weights import DecoderWeights, MtpWeights

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
CONFIGS: dict[str, Callable[[], Any]] = {
    "glm": lambda: Glm4MoeConfig(
        **TINY, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, use_qk_norm=True
    ),
    "ernie": lambda: Ernie4_5_MoeConfig(**TINY, moe_intermediate_size=32, moe_num_experts=4, moe_k=2),
    "ernie-dense": lambda: Ernie4_5Config(**TINY, use_bias=True),
    "llama": lambda: LlamaConfig(**TINY),
    "qwen3": lambda: Qwen3Config(**TINY),
}


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep weights as they were read, so that they can be compared."""
    for module in ("model.linear", "checkpoint.weights", "checkpoint.assembly"):
        monkeypatch.setattr(f"tpworker.{module}.can_pack", lambda device, dtype: False)


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with a head, of each form."""
    make_checkpoint(tmp_path, CONFIGS[request.param]())
    return tmp_path


def make(name: str, folder: Path) -> Path:
    make_checkpoint(folder, CONFIGS[name]())
    return folder


def load(folder: Path, rank: int = 0, size: int = 1, with_mtp: bool = True) -> DecoderWeights:
    spec = read_spec(folder)
    return load_weights(folder, spec, Shard.of(spec, rank, size), torch.float32, CPU, with_mtp=with_mtp)


def load_head(folder: Path, rank: int = 0, size: int = 1) -> MtpWeights:
    mtp = load(folder, rank, size).mtp
    assert mtp is not None
    return mtp


def plain(matrix: Matrix) -> Linear:
    assert isinstance(matrix, Linear)
    return matrix


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


# -------------------------------------------------------------------------------- what is read


@pytest.mark.usefixtures("unpacked")
def test_all_ranks_have_the_whole_projection_and_the_norms(folder: Path) -> None:
    published, form = load_file(folder / "model.safetensors"), form_of(config_of(folder))
    for rank in range(2):
        mtp = load_head(folder, rank, 2)
        projection = plain(mtp.projection)
        assert torch.equal(projection.weight, published[f"{form.projection}.weight"])
        assert (projection.bias is None) == (f"{form.projection}.bias" not in published)
        if projection.bias is not None:
            assert torch.equal(projection.bias, published[f"{form.projection}.bias"])
        assert torch.equal(mtp.embedding_norm, published[f"{form.embedding_norm}.weight"])
        hidden_norm = published[f"{form.hidden_norm}.weight"]
        if form.takes_normed:
            assert mtp.norm is not None
            assert torch.equal(mtp.norm, published[f"{form.norm}.weight"])
            assert torch.equal(mtp.hidden_norm, hidden_norm)
        else:
            assert mtp.norm is None
            assert torch.equal(mtp.hidden_norm, hidden_norm / published["model.norm.weight"])
        layer = mtp.layer
        assert torch.equal(layer.attention_norm, published[f"{form.layer}.input_layernorm.weight"])
        assert torch.equal(layer.mlp_norm, published[f"{form.layer}.post_attention_layernorm.weight"])
        assert (layer.query_norm is None) == (f"{form.layer}.self_attn.q_norm.weight" not in published)
        if layer.query_norm is not None and layer.key_norm is not None:
            assert torch.equal(layer.query_norm, published[f"{form.layer}.self_attn.q_norm.weight"])
            assert torch.equal(layer.key_norm, published[f"{form.layer}.self_attn.k_norm.weight"])


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("rank", [0, 1])
def test_its_layer_is_sliced_as_all_layers_are(folder: Path, rank: int) -> None:
    """Half of eight query heads of 8 entries, of four key-value heads, of the MLP or of each expert."""
    published, form = load_file(folder / "model.safetensors"), form_of(config_of(folder))
    layer = load_head(folder, rank, 2).layer
    queries, keys = slice(32 * rank, 32 * rank + 32), slice(16 * rank, 16 * rank + 16)
    order = torch.arange(8)
    if form.neighbours:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def ordered(name: str, rows: slice) -> Tensor:
        weight = published[f"{form.layer}.self_attn.{name}_proj.weight"][rows]
        return weight.view(-1, 8, 32)[:, order].flatten(0, 1)

    expected = [ordered("q", queries), ordered("k", keys)]
    expected.append(published[f"{form.layer}.self_attn.v_proj.weight"][keys])
    assert torch.equal(plain(layer.qkv).weight, torch.cat(expected))
    output = published[f"{form.layer}.self_attn.o_proj.weight"][:, queries]
    assert torch.equal(plain(layer.output).weight, output)
    mlp, prefix = layer.mlp, f"{form.layer}.mlp"
    if isinstance(mlp, Mlp):
        assert f"{prefix}.gate_proj.weight" in published
        part = slice(32 * rank, 32 * rank + 32)
        gate_up = [published[f"{prefix}.{kind}_proj.weight"][part] for kind in ("gate", "up")]
        assert torch.equal(plain(mlp.gate_up).weight, torch.cat(gate_up))
        assert torch.equal(plain(mlp.down).weight, published[f"{prefix}.down_proj.weight"][:, part])
        return
    assert isinstance(mlp, Moe)
    assert isinstance(mlp.gate_up, Tensor)
    assert torch.equal(plain(mlp.gate).weight, published[f"{prefix}.gate.weight"])
    assert mlp.bias is not None
    assert torch.equal(mlp.bias, published[f"{prefix}.gate.e_score_correction_bias"])
    part = slice(16 * rank, 16 * rank + 16)
    for number in range(5):
        expert = f"{prefix}.experts.{number}" if number < 4 else f"{prefix}.shared_experts"
        gate_up = [published[f"{expert}.{kind}_proj.weight"][part] for kind in ("gate", "up")]
        assert torch.equal(mlp.gate_up[number], torch.cat(gate_up))


def test_it_is_read_only_if_asked_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tpworker"):
        assert load(folder, with_mtp=False).mtp is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"not read: {len(head_shapes(config_of(folder)))} tensors for multi-token prediction" in message
    caplog.clear()
    with caplog.at_level(logging.INFO, "tpworker"):
        assert load(folder).mtp is not None
    assert not caplog.records
    check_weights(folder, read_spec(folder), with_mtp=True)
    check_files(folder, read_spec(folder), with_mtp=True)


def test_progress_counts_the_head(folder: Path) -> None:
    spec = read_spec(folder)
    shard = Shard.of(spec, 1, 2)
    totals = [shard_bytes(spec, shard, torch.float32, with_mtp=with_mtp) for with_mtp in (False, True)]
    assert totals[0] < totals[1]
    seen: list[tuple[int, int]] = []
    admitted: list[int] = []
    for with_mtp in (False, True):
        load_weights(
            folder,
            spec,
            shard,
            torch.float32,
            CPU,
            lambda done, total: seen.append((done, total)),
            admitted.append,
            with_mtp=with_mtp,
        )
        assert seen[-1] == (totals[with_mtp], totals[with_mtp])
    assert admitted == totals


@pytest.mark.usefixtures("unpacked")
def test_a_final_norm_of_zero_leaves_nothing_of_a_state(tmp_path: Path) -> None:
    make("ernie", tmp_path)
    zeroed = torch.ones(32)
    zeroed[3] = 0
    change(tmp_path, lambda tensors: tensors | {"model.norm.weight": zeroed})
    hidden_norm = load_head(tmp_path).hidden_norm
    assert hidden_norm.isfinite().all()
    published = load_file(tmp_path / "model.safetensors")["model.mtp_hidden_norm.0.weight"]
    assert torch.equal(hidden_norm[zeroed != 0], published[zeroed != 0])


# --------------------------------------------------------------------- what is missing, and what is too much


def test_each_tensor_that_is_missing_is_named(folder: Path) -> None:
    published = load_file(folder / "model.safetensors")
    spec = read_spec(folder)
    for name in head_shapes(config_of(folder)):
        rest = {other: tensor for other, tensor in published.items() if other != name}
        save_file(rest, folder / "model.safetensors")
        with pytest.raises(ModelError, match=name.replace(".", r"\.")) as caught:
            check_weights(folder, spec, with_mtp=True)
        if name.endswith("proj.weight") and ".experts." not in name and "shared_experts" not in name:
            assert "--speculative-method ngram" in str(caught.value)


def test_a_checkpoint_without_the_head_says_what_to_do(folder: Path) -> None:
    names = head_shapes(config_of(folder))
    change(folder, lambda tensors: {name: t for name, t in tensors.items() if name not in names})
    spec = read_spec(folder)
    assert spec.mtp is not None
    for look in (check_weights, check_files):
        with pytest.raises(
            ModelError, match=r"checkpoint lacks \d+ of its tensors.*ngram.*leave the option out"
        ):
            look(folder, spec, with_mtp=True)
        look(folder, spec)
    with pytest.raises(ModelError, match="checkpoint lacks"):
        load(folder)
    assert load(folder, with_mtp=False).mtp is None


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("glm", ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"]),
        ("glm", [f"model.layers.3.{part}.weight" for part in ("eh_proj", "enorm", "hnorm", "mlp.up_proj")]),
        ("ernie", ["model.mtp_block.1.mlp.up_proj.weight", "model.mtp_linear_proj.1.weight"]),
        ("llama", ["mtp.layers.1.mlp.up_proj.weight", "mtp.layers.1.input_layernorm.weight"]),
    ],
)
def test_copies_and_further_heads_are_not_read(
    tmp_path: Path, name: str, extra: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    make(name, tmp_path)
    edit_config(tmp_path, {"num_nextn_predict_layers": 2})
    change(tmp_path, lambda tensors: tensors | {name: torch.zeros(1) for name in extra})
    with caplog.at_level(logging.INFO, "tpworker"):
        assert load(tmp_path).mtp is not None
    assert f"not read: {len(extra)} tensors" in caplog.text
    load(tmp_path, with_mtp=False)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("glm", "model.layers.2.self_attn.o_proj.bias"),
        ("glm", "model.layers.2.mlp.experts.4.up_proj.weight"),
        ("glm", "model.layers.3.eh_proj.weight"),
        ("ernie", "model.mtp_block.0.self_attn.q_norm.weight"),
        ("llama", "mtp.layers.0.self_attn.q_norm.weight"),
        ("llama", "mtp.head.weight"),
    ],
)
def test_a_head_of_another_form_is_refused_if_it_is_to_draft(tmp_path: Path, name: str, tensor: str) -> None:
    make(name, tmp_path)
    change(tmp_path, lambda tensors: tensors | {tensor: torch.zeros(1)})
    with pytest.raises(ModelError, match=f"has no use for .*{tensor}"):
        load(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    make("llama", tmp_path)
    change(tmp_path, lambda tensors: tensors | {"mtp.fc.weight": torch.zeros(32, 32)})
    with pytest.raises(
        ModelError, match=r"mtp\.fc\.weight has shape \[32, 32\]; config.json asks for \[32, 64\]"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_names_no_head(tmp_path: Path, name: str) -> None:
    make(name, tmp_path)
    edit_config(tmp_path, {"num_nextn_predict_layers": 0})
    spec = read_spec(tmp_path)
    assert spec.mtp is None
    reason = why_no_mtp(spec)
    assert reason is not None
    for word in (spec.architecture, "num_nextn_predict_layers", "--speculative-method ngram"):
        assert word in reason
    for look in (check_weights, check_files):
        with pytest.raises(ModelError, match="names no layer for multi-token prediction"):
            look(tmp_path, spec, with_mtp=True)


def test_no_torch_is_needed_to_refuse(tmp_path: Path) -> None:
    make("llama", tmp_path)
    script = (
        "import sys; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "from tpworker.checkpoint.weight_files import check_files\n"
        "from tpworker.model.families import read_spec, why_no_mtp\n"
        "spec = read_spec(folder); assert why_no_mtp(spec) is None\n"
        "check_files(folder, spec, with_mtp=True); assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


# ------------------------------------------------------------------------------ sizes and dummies

MOE = MoeSpec(layers=(1,), num_experts=4, experts_per_token=2, intermediate_size=20, has_bias=True)
VARIANTS = [
    dataclasses.replace(SPEC, mtp=MtpSpec()),
    dataclasses.replace(SPEC, family="ernie4_5", mtp=MtpSpec(before_final_norm=True, has_bias=True)),
    dataclasses.replace(SPEC, family="glm4_moe", moe=MOE, mtp=MtpSpec(has_experts=True)),
]


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.family)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.usefixtures("unpacked")
def test_dummies_have_a_head_of_the_size_that_is_told(spec: Any, size: int) -> None:
    for rank in range(size):
        shard = Shard.of(spec, rank, size)
        weights = dummy_weights(spec, shard, torch.bfloat16, CPU, with_mtp=True)
        mtp = weights.mtp
        assert mtp is not None
        layer, mlp = mtp.layer, mtp.layer.mlp
        tensors = [mtp.embedding_norm, mtp.hidden_norm, layer.attention_norm, layer.mlp_norm, *mlp.tensors()]
        tensors += [] if mtp.norm is None else [mtp.norm]
        for matrix in (mtp.projection, layer.qkv, layer.output):
            tensors += matrix.tensors()
        told = [shard_bytes(spec, shard, torch.bfloat16, with_mtp=with_mtp) for with_mtp in (False, True)]
        assert told[1] - told[0] == sum(tensor.nbytes for tensor in tensors)
        assert torch.equal(mtp.hidden_norm, torch.ones_like(mtp.hidden_norm))
        assert 0.01 < plain(mtp.projection).weight.std() < 0.03
