"""Weights in memory that outlives a rank: the next process finds every tensor in its place, and reads none.

As on CUDA nothing is packed; the memory is a memfd.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.test_weights import tensors_of
from tests.model import test_decoder, test_gemma, test_moe_models, test_mtp, test_phi3, test_windows
from tests.model.helpers import CPU, SPEC, tiny_model
from tests.model.mtp_reference import make_checkpoint
from tpworker.checkpoint.checkpoint import Checkpoint
from tpworker.checkpoint.regions import ALIGNMENT, Region, sizes_of
from tpworker.checkpoint.weights import dummy_weights, load_weights
from tpworker.model.families import MoeSpec, read_spec
from tpworker.model.tp import Shard
from tpworker.model.weights import DecoderWeights
from tpworker.rank.kept import HostMemory

pytestmark = pytest.mark.usefixtures("unpacked")

FAMILIES: dict[str, Callable[[], Any]] = {
    f"{module.__name__.rpartition('_')[2]}-{name}": config
    for module in (test_decoder, test_moe_models, test_gemma, test_phi3, test_windows)
    for name, config in module.CONFIGS.items()
}
DTYPE = torch.bfloat16  # with routers of float32 among it


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("model.linear", "checkpoint.weights", "checkpoint.assembly"):
        monkeypatch.setattr(f"tpworker.{module}.can_pack", lambda device, dtype: False)


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("tpworker-kept")
    yield fd
    os.close(fd)


class Counting:
    """What is told of a load."""

    def __init__(self) -> None:
        self.admitted: list[int] = []
        self.progress: list[tuple[int, int]] = []

    def load(self, folder: Path, shard: Shard, fd: int | None, with_mtp: bool = False) -> DecoderWeights:
        kept = None if fd is None else HostMemory(fd, "weights")
        return load_weights(
            folder, read_spec(folder), shard, DTYPE, CPU, lambda *done: self.progress.append(done),
            self.admitted.append, with_mtp=with_mtp, kept=kept,
        )  # fmt: skip


def check_taken_twice(folder: Path, fd: int, patch: pytest.MonkeyPatch, with_mtp: bool = False) -> None:
    """Plain, then into kept memory, then out of it."""
    spec = read_spec(folder)
    shard = Shard.of(spec, 1, 2)  # the rank that has no biases of sums
    plain = tensors_of(Counting().load(folder, shard, None, with_mtp))
    first = tensors_of(Counting().load(folder, shard, fd, with_mtp))
    reads: list[str] = []
    with patch.context() as within:
        within.setattr(Checkpoint, "read_into", lambda *arguments: reads.append(arguments[2]))
        told = Counting()
        second = tensors_of(told.load(folder, shard, fd, with_mtp))
    assert not reads
    assert not told.admitted
    [(done, total)] = told.progress
    assert done == total >= len({tensor.data_ptr() for tensor in second.values()}) * ALIGNMENT
    assert list(plain) == list(first) == list(second)
    for name, tensor in plain.items():
        for other in (first[name], second[name]):
            assert (other.shape, other.dtype, other.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
            assert torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)), name
    assert not {tensor.data_ptr() for tensor in first.values()} & {t.data_ptr() for t in second.values()}
    assert (second["embed"].data_ptr() == second["lm_head"].data_ptr()) == spec.tie_embeddings


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_all_families_are_found_as_they_were_left(
    name: str, tmp_path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tmp_path, FAMILIES[name](), DTYPE)
    check_taken_twice(tmp_path, fd, monkeypatch)


@pytest.mark.parametrize("name", test_mtp.CONFIGS)
def test_heads_for_multi_token_prediction_are(
    name: str, tmp_path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, test_mtp.CONFIGS[name]())
    check_taken_twice(tmp_path, fd, monkeypatch, with_mtp=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(tmp_path, test_decoder.CONFIGS["all-biases"](), DTYPE)
    return tmp_path


def test_a_load_that_did_not_come_to_its_end_has_left_nothing(
    folder: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard.of(read_spec(folder), 0, 1)

    def read(checkpoint: Checkpoint, out: Tensor, name: str, *arguments: Any) -> None:
        if "layers.1" in name:
            raise KeyboardInterrupt

    Counting().load(folder, shard, fd)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read_into", read)
        with pytest.raises(KeyboardInterrupt):
            Counting().load(folder, Shard.of(read_spec(folder), 0, 2), fd)
    for size in (2, 1):
        told = Counting()
        told.load(folder, Shard.of(read_spec(folder), 0, size), fd)
        assert len(told.admitted) == 1


def test_ranks_load_in_inference_mode_and_their_threads_do_not(folder: Path, fd: int) -> None:
    shard = Shard.of(read_spec(folder), 1, 2)
    plain = tensors_of(Counting().load(folder, shard, None))
    for _ in range(2):
        with torch.inference_mode():
            kept = tensors_of(Counting().load(folder, shard, fd))
            assert all(torch.equal(kept[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("change", ["rank", "size", "dtype", "folder", "mtp", "dummy"])
def test_other_weights_are_not_taken_for_these(change: str, tmp_path: Path, fd: int) -> None:
    def load(folder: str = "one", rank: int = 0, size: int = 2, dtype: torch.dtype = DTYPE) -> int:
        """How many bytes were admitted."""
        admitted: list[int] = []
        path = tmp_path / folder
        spec, kept = read_spec(path), HostMemory(fd, "weights")
        shard = Shard.of(spec, rank, size)
        if change == "dummy" and folder == "two":
            dummy_weights(spec, shard, dtype, CPU, admit=admitted.append, kept=kept)
        else:
            load_weights(path, spec, shard, dtype, CPU, admit=admitted.append, with_mtp=mtp, kept=kept)
        return len(admitted)

    mtp = False
    for name in ("one", "two"):
        make_checkpoint(tmp_path / name, test_mtp.CONFIGS["qwen3"]())
    assert [load(), load()] == [1, 0]
    mtp = change == "mtp"
    other: dict[str, Any] = {
        "rank": {"rank": 1}, "size": {"size": 3}, "dtype": {"dtype": torch.float16}, "mtp": {},
        "folder": {"folder": "two"}, "dummy": {"folder": "two"},
    }  # fmt: skip
    assert [load(**other[change]), load(**other[change])] == [1, 0]


def test_dummies_are_found_too(fd: int) -> None:
    moe = MoeSpec(layers=(1,), num_experts=4, experts_per_token=2, intermediate_size=20, has_bias=True)
    spec = dataclasses.replace(SPEC, family="glm4_moe", moe=moe, qk_norm=True)
    shard = Shard.of(spec, 0, 1)
    plain = tensors_of(dummy_weights(spec, shard, DTYPE, CPU, 5))
    for number in range(2):
        admitted: list[int] = []
        memory = HostMemory(fd, "weights")
        kept = tensors_of(dummy_weights(spec, shard, DTYPE, CPU, 5, admit=admitted.append, kept=memory))
        assert len(admitted) == 1 - number
        assert all(torch.equal(kept[name], tensor) for name, tensor in plain.items())
    dummy_weights(spec, shard, DTYPE, CPU, 6, admit=admitted.append, kept=HostMemory(fd, "weights"))
    assert admitted, "another seed, other weights"


def test_tensors_of_a_region_follow_one_another_and_are_aligned() -> None:
    def build(regions: Any) -> list[Tensor]:
        shapes = [
            ((3, 5), torch.float32),
            ((), torch.bfloat16),
            ((0, 7), torch.float32),
            ((513,), torch.uint8),
        ]
        return [regions[0].take(shape, dtype) for shape, dtype in shapes]

    sizes = sizes_of(2, build)
    assert sizes == [ALIGNMENT * 4, 0]
    memory = torch.zeros(sizes[0], dtype=torch.uint8)
    tensors = build([Region(memory)])
    assert [tensor.storage_offset() * tensor.itemsize for tensor in tensors] == [0, 512, 1024, 1024]
    for number, tensor in enumerate(tensors, 1):
        tensor.fill_(number)
    assert [float(tensor.sum()) for tensor in tensors] == [15, 2, 0, 4 * 513]
    with pytest.raises(AssertionError, match="other tensors"):
        Region(memory[:-1]).take((sizes[0],), torch.uint8)
