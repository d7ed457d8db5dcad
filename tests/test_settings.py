from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.observe.fake_nvml import FakeNvml
from tpworker import settings
from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.ipc.messages import MAX_SEQUENCE, pack_dataclass, unpack_dataclass
from tpworker.observe.nvml import Found, Nvml, find_gpus

SPEC: Any = SimpleNamespace(max_model_len=2048, dtype="bfloat16")


def test_max_model_len_is_the_models_unless_less_is_asked_for() -> None:
    assert settings.resolve_max_model_len(RuntimeConfig(), SPEC) == 2048
    assert settings.resolve_max_model_len(RuntimeConfig(max_model_len=100), SPEC) == 100
    endless: Any = SimpleNamespace(max_model_len=10**8)
    assert settings.resolve_max_model_len(RuntimeConfig(), endless) == MAX_SEQUENCE
    with pytest.raises(ConfigError, match="max_model_len=2049: the model was made for at most 2048"):
        settings.resolve_max_model_len(RuntimeConfig(max_model_len=2049), SPEC)


def gpus(count: int, problem: str | None = None) -> Found:
    uuids = [f"GPU-{number}" for number in range(count)]
    return Found(find_gpus(Nvml(FakeNvml(uuids)), {}).gpus, problem)


def test_the_cpu_needs_no_look_at_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_gpus", lambda: pytest.fail("looked"))
    assert settings.resolve_gpus(RuntimeConfig(device="cpu")) == ()


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
    monkeypatch.setattr(settings, "find_gpus", lambda: gpus(num_gpus))
    monkeypatch.setattr(settings, "torch_cuda", lambda: torch_cuda)
    resolved = settings.resolve_gpus(RuntimeConfig(tensor_parallel_size=2))
    assert [gpu.index for gpu in resolved] == chosen
    assert why in caplog.text if why else not caplog.text


def test_cuda_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_gpus", lambda: gpus(2, "the third one is hidden"))
    monkeypatch.setattr(settings, "torch_cuda", lambda: None)
    with pytest.raises(ConfigError, match=r"size=4 .* has 2 \(the third one is hidden\): use a smaller"):
        settings.resolve_gpus(RuntimeConfig(device="cuda", tensor_parallel_size=4))
    with pytest.raises(ConfigError, match="its CPU build: install one for CUDA, or use --device cpu"):
        settings.resolve_gpus(RuntimeConfig(device="cuda", tensor_parallel_size=2))


def test_gpus_are_counted_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml(["GPU-1", "GPU-2"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert settings.count_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert settings.count_gpus() == 1


def test_settings_cross_the_pipe_also_when_seconds_are_whole_numbers() -> None:
    config = RuntimeConfig(step_timeout=5, start_timeout=7, gpu_memory_utilization=1)
    for made in (
        settings.scheduler_settings(config, 2048),
        settings.rank_settings(config, SPEC, "cpu", 2048),
    ):
        assert unpack_dataclass(type(made), pack_dataclass(made)) == made


def test_what_ranks_are_told() -> None:
    told = settings.rank_settings(RuntimeConfig(), SPEC, "cpu", 2048)
    assert (told.dtype, told.num_kv_blocks, told.max_model_len) == ("bfloat16", 0, 2048)
    assert settings.rank_settings(RuntimeConfig(dtype="float32"), SPEC, "cpu", 9).dtype == "float32"


@pytest.mark.parametrize(
    ("option", "value", "kinds"),
    [
        ("lookahead", 2.0, "int"),
        ("lookahead", True, "int"),
        ("prefix_caching", 1, "bool"),
        ("max_num_seqs", "8", "int"),
        ("step_timeout", "1", "float or int"),
        ("model", 5, "NoneType or str"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_before_any_process_starts(
    option: str, value: object, kinds: str
) -> None:
    with pytest.raises(ConfigError, match=f"{option}={value!r}: must be {kinds}"):
        RuntimeConfig(**{option: value})  # type: ignore[arg-type]
