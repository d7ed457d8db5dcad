from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.ipc.codec import pack_dataclass, unpack_dataclass
from tpworker.ipc.deadlines import SHORTEST_SECONDS
from tpworker.ipc.messages import MAX_SEQUENCE
from tpworker.runtime import settings
from tpworker.scheduler.filling import filling_of

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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_step_timeout_is_one_that_is_chosen(device: str) -> None:
    scheduler = settings.scheduler_settings(RuntimeConfig(), SPEC, device, 2048)
    assert (scheduler.step_timeout, scheduler.shortest_deadline) == (0.0, SHORTEST_SECONDS[device])
    assert settings.rank_settings(RuntimeConfig(), SPEC, device, 2048).step_timeout == 0.0
    given = RuntimeConfig(step_timeout=2)
    assert settings.scheduler_settings(given, SPEC, device, 2048).step_timeout == 2.0
    assert settings.rank_settings(given, SPEC, device, 2048).step_timeout == 2.0


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({}, (0.035, 0.4)),
        ({"target_itl": 0.02}, (0.02, 0.4)),
        ({"target_ttft": 2}, (0.035, 2.0)),
        ({"max_num_batched_tokens": 1024}, (0.0, 0.0)),
        ({"max_num_batched_tokens": 1024, "target_ttft": 2}, (0.035, 2.0)),
        ({"max_num_seqs": 8}, (0.035, 0.4)),
    ],
)
def test_sizes_of_steps_are_chosen_unless_their_bound_alone_is_given(
    options: dict[str, Any], targets: tuple[float, float]
) -> None:
    for device in ("cpu", "cuda"):
        told = settings.scheduler_settings(RuntimeConfig(**options), SPEC, device, 2048)
        assert (told.target_itl, told.target_ttft) == targets
        assert told.has_graphs == (device == "cuda")
        assert (filling_of(told) is None) == (targets == (0.0, 0.0))


def test_what_ranks_are_told() -> None:
    told = settings.rank_settings(RuntimeConfig(), SPEC, "cpu", 2048)
    assert (told.dtype, told.num_kv_blocks, told.max_model_len) == ("bfloat16", 0, 2048)
    assert settings.rank_settings(RuntimeConfig(dtype="float32"), SPEC, "cpu", 9).dtype == "float32"


NGRAM, MTP = {"speculative_method": "ngram"}, {"speculative_method": "mtp"}


@pytest.mark.parametrize(
    ("options", "told", "said"),
    [
        ({}, ("", 0, 1, 1), ""),
        (NGRAM, ("ngram", 4, 4, 1), "up to 4 drafts a step by look-up of the last 1 to 4 tokens"),
        (NGRAM | {"num_speculative_tokens": 8, "prompt_lookup_min": 6}, ("ngram", 8, 6, 6), "up to 8 drafts"),
        (
            NGRAM | {"prompt_lookup_max": 1},
            ("ngram", 4, 1, 1),
            "up to 4 drafts a step by look-up of the last 1",
        ),
        (
            NGRAM | {"prompt_lookup_max": 9, "prompt_lookup_min": 1},
            ("ngram", 4, 9, 1),
            "the last 1 to 9 tokens",
        ),
        (MTP, ("mtp", 1, 1, 1), "1 draft a step by the model's own head"),
        (
            MTP | {"num_speculative_tokens": 3},
            ("mtp", 3, 1, 1),
            "up to 3 drafts a step by the model's own head",
        ),
    ],
)
def test_what_is_told_of_drafts(options: dict[str, Any], told: tuple[str, int, int, int], said: str) -> None:
    config = RuntimeConfig(**options)
    rank = settings.rank_settings(config, SPEC, "cpu", 2048)
    assert (rank.speculative_method, rank.num_drafts) == told[:2]
    assert (rank.prompt_lookup_max, rank.prompt_lookup_min) == told[2:]
    assert settings.scheduler_settings(config, SPEC, "cpu", 2048).num_drafts == told[1]
    assert said in str(settings.Speculation.of(config))
    assert bool(said) == bool(str(settings.Speculation.of(config)))
    assert unpack_dataclass(type(rank), pack_dataclass(rank)) == rank


@pytest.mark.parametrize(
    ("device", "slots", "tokens", "sizes"),
    [
        ("cpu", None, None, (64, 512)),
        ("cuda", None, None, (256, 8192)),
        ("cpu", 600, None, (600, 600)),
        ("cuda", 600, None, (600, 8192)),
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
