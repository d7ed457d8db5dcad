"""What the runtime process makes of a model's files: where outputs end, what is odd, what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.conftest import TINY_CONFIG
from tests.model.helpers import tiny_model
from tests.server.fake_runtime import byte_tokenizer
from tpworker import Runtime
from tpworker.loading import load_tokenizer

END = 256  # of `byte_tokenizer`


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with weights, and with a tokenizer whose EOS only tokenizer_config.json names."""
    keys = {key: TINY_CONFIG[key] for key in TINY_CONFIG if key not in ("architectures", "model_type")}
    tiny_model(tmp_path, LlamaConfig(**keys, rope_scaling=None))
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    byte_tokenizer()._backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).eos_token_id == END
    return tmp_path


async def ends(runtime: Runtime) -> tuple[int, ...]:
    async with runtime:
        return runtime.spec.eos_ids


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (2, END)),
        ({"eos_token_id": [END, 7]}, (END, 7)),
        ({"eos_token_id": None}, (END,)),
    ],
)
def test_the_tokenizers_end_ends_outputs(
    folder: Path, fake_runtime: Callable[..., Runtime], config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG | config))
    assert asyncio.run(ends(fake_runtime(folder))) == expected


@pytest.mark.usefixtures("nothing_left")
def test_a_model_that_nothing_ends_is_told_of(
    folder: Path, fake_runtime: Callable[..., Runtime], caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG | {"eos_token_id": None}))
    (folder / "tokenizer_config.json").unlink()
    assert asyncio.run(ends(fake_runtime(folder))) == ()
    assert f"{folder} names no end-of-sequence token" in caplog.text


def test_a_tokenizer_is_loaded_from_files_that_are_all_there(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.eos_id == END
