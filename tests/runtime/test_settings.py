from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.ipc.codec import pack_dataclass, unpack_dataclass
from tpworker.ipc.messages import MAX_SEQUENCE
from tpworker.runtime import settings

SPEC: Any = SimpleNamespace(
    max_model_len=2048, vocab_size=97, dtype="bfloat16", rope=SimpleNamespace(max_positions=None)
)


def test_max_model_len_is_the_models_unless_less_is_asked_for() -> None:
    assert settings.resolve_max_model_len(RuntimeConfig(), SPEC) == 2048
    assert settings.resolve_max_model_len(RuntimeConfig(max_model_len=100), SPEC) == 100
    endless: Any = SimpleNamespace(max_model_len=10**8)
    assert settings.resolve_max_model_len(RuntimeConfig(), endless) == MAX_SEQUENCE
    with pytest.raises(ConfigError, match="max_model_len=2049: the model was made for at most 2048"):
        settings.resolve_max_model_len(RuntimeConfig(max_model_len=2049), SPEC)


def test_settings_cross_the_pipe_also_when_seconds_are_whole_numbers() -> None:
    config = RuntimeConfig(step_timeout=5, start_timeout=7, gpu_memory_utilization=1)
    for made in (
        settings.scheduler_settings(config, SPEC, "cpu", 2048),
        settings.rank_settings(config, SPEC, "cpu", 2048),
    ):
        assert unpack_dataclass(type(made), pack_dataclass(made)) == made


def test_what_ranks_are_told() -> None:
    told = settings.rank_settings(RuntimeConfig(), SPEC, "cpu", 2048)
    assert (told.dtype, told.num_kv_blocks, told.max_model_len) == ("bfloat16", 0, 2048)
    assert settings.rank_settings(RuntimeConfig(dtype="float32"), SPEC, "cpu", 9).dtype == "float32"


@pytest.mark.parametrize(
    ("device", "slots", "tokens", "sizes"),
    [
        ("cpu", None, None, (64, 512)),
        ("cuda", None, None, (256, 2048)),
        ("cpu", 600, None, (600, 600)),
        ("cuda", 600, None, (600, 2048)),
        ("cpu", 8, None, (8, 512)),
        ("cpu", None, 32, (32, 32)),
        ("cuda", None, 512, (256, 512)),
        ("cuda", 8, 16, (8, 16)),
    ],
)
def test_step_sizes_suit_the_device_and_what_is_asked_for(
    device: str, slots: int | None, tokens: int | None, sizes: tuple[int, int]
) -> None:
    config = RuntimeConfig(max_num_seqs=slots, max_num_batched_tokens=tokens)
    for made in (
        settings.scheduler_settings(config, SPEC, device, 2048),
        settings.rank_settings(config, SPEC, device, 2048),
    ):
        assert (made.max_num_seqs, made.max_num_batched_tokens) == sizes


@pytest.mark.parametrize(
    ("option", "value", "kinds"),
    [
        ("lookahead", 2.0, "int"),
        ("lookahead", True, "int"),
        ("prefix_caching", 1, "bool"),
        ("max_num_seqs", "8", "int or None"),
        ("step_timeout", "1", "float or int"),
        ("model", 5, "str or None"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_before_any_process_starts(
    option: str, value: object, kinds: str
) -> None:
    with pytest.raises(ConfigError, match=f"{option}={value!r}: must be {kinds}"):
        RuntimeConfig(**{option: value})  # type: ignore[arg-type]


def test_an_empty_name_is_no_model() -> None:
    with pytest.raises(ConfigError, match="model='': must be a folder or a name on the hub"):
        RuntimeConfig(model="")
