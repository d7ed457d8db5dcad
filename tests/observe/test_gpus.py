"""Which GPUs the ranks get."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from tests.observe.fake_nvml import FakeNvml
from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.observe import gpus as gpus_module
from tpworker.observe.gpus import gpus_by_uuid, resolve_gpus
from tpworker.observe.nvml import Found, Nvml, find_gpus


def fake_gpus(count: int, problem: str | None = None) -> Found:
    uuids = [f"GPU-{number}" for number in range(count)]
    return Found(find_gpus(Nvml(FakeNvml(uuids)), {}).gpus, problem)


def test_the_cpu_needs_no_look_at_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus_module, "find_gpus", lambda: pytest.fail("looked"))
    assert gpus_module.resolve_gpus(RuntimeConfig(device="cpu")) == ()


@pytest.mark.parametrize(
    ("num_gpus", "torch_cuda", "chosen", "why"),
    [
        (0, (13, 0), [], ""),
        (1, (13, 0), [], "1 GPUs found, but serving on the CPU: tensor_parallel_size=2"),
        (2, None, [], "its CPU build"),
        (2, (13, 0), [0, 1], ""),
        (4, (12, 8), [0, 1], ""),
    ],
)
def test_auto_takes_a_gpu_for_each_rank(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_gpus: int,
    torch_cuda: tuple[int, int] | None,
    chosen: list[int],
    why: str,
) -> None:
    monkeypatch.setattr(gpus_module, "find_gpus", lambda: fake_gpus(num_gpus))
    monkeypatch.setattr(gpus_module, "torch_cuda", lambda: torch_cuda)
    resolved = gpus_module.resolve_gpus(RuntimeConfig(tensor_parallel_size=2))
    assert [gpu.index for gpu in resolved] == chosen
    assert why in caplog.text if why else not caplog.text


def test_cuda_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus_module, "find_gpus", lambda: fake_gpus(2, "the third one is hidden"))
    monkeypatch.setattr(gpus_module, "torch_cuda", lambda: None)
    with pytest.raises(ConfigError, match=r"size=4 .* has 2 \(the third one is hidden\): use -tp 2, or"):
        gpus_module.resolve_gpus(RuntimeConfig(device="cuda", tensor_parallel_size=4))
    with pytest.raises(ConfigError, match="its CPU build: install one for CUDA, or use --device cpu"):
        gpus_module.resolve_gpus(RuntimeConfig(device="cuda", tensor_parallel_size=2))


@pytest.mark.parametrize("visible", ["rubbish", "-1", "MIG-1"])
def test_gpus_that_are_all_hidden_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, visible: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(["GPU-1"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_module.resolve_gpus(RuntimeConfig()) == ()
    assert f"no GPU can be used, so serving on the CPU: CUDA_VISIBLE_DEVICES={visible}" in caplog.text
    with pytest.raises(ConfigError, match=r"correct CUDA_VISIBLE_DEVICES, or use --device cpu$"):
        gpus_module.resolve_gpus(RuntimeConfig(device="cuda"))


def test_a_driver_that_does_not_answer_is_told_of_and_none_at_all_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = FakeNvml(driver=False)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(library.NVMLError, "value", 12, raising=False)  # NVML_ERROR_LIBRARY_NOT_FOUND
    assert gpus_module.resolve_gpus(RuntimeConfig()) == ()
    assert not caplog.text
    monkeypatch.setattr(library.NVMLError, "value", 9)
    gpus_module.resolve_gpus(RuntimeConfig())
    assert "so serving on the CPU: the NVIDIA driver does not answer (Driver Not Loaded)" in caplog.text


def test_gpus_are_counted_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(["GPU-1", "GPU-2"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus_module.count_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpus_module.count_gpus() == 1


def test_for_ranks_that_join_it_counts_which_gpus_there_are_and_not_which_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(["GPU-1", "GPU-2"]))
    monkeypatch.setattr(gpus_module, "torch_cuda", lambda: (13, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    config = RuntimeConfig(tensor_parallel_size=2)
    assert resolve_gpus(config) == ()
    assert len(resolve_gpus(dataclasses.replace(config, join_address="here"))) == 2
    assert [gpu.uuid for gpu in gpus_by_uuid(["GPU-2", "GPU-1"])] == ["GPU-2", "GPU-1"]
    assert gpus_by_uuid(["GPU-2", "GPU-3"]) == ()
