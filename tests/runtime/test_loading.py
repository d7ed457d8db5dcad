"""What the runtime process makes of a model's files: where outputs end, what is odd, what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.conftest import TINY_CONFIG
from tests.model.helpers import tiny_model
from tests.model.mtp_reference import make_checkpoint
from tests.server.fake_runtime import byte_tokenizer
from tpworker import Runtime
from tpworker.config import RuntimeConfig
from tpworker.doctor.model_check import check_model
from tpworker.errors import ConfigError, ModelError
from tpworker.runtime.loading import find_model, load_tokenizer

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


def tie_to_another_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG | {"tie_word_embeddings": True}))


def name_other_files(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def ask_for_what_is_not_there(folder: Path) -> None:
    asked = {"eos_token_id": [7, -1], "eta_cutoff": 0.2}
    (folder / "generation_config.json").write_text(json.dumps(asked))


ODD = [
    (tie_to_another_head, ["a different lm_head.weight: both are used"]),
    (name_other_files, ["model.safetensors is read, as transformers does"]),
    (ask_for_what_is_not_there, ["others are never generated", "ignored: eta_cutoff=0.2"]),
]


@pytest.mark.parametrize(("make", "lines"), ODD)
def test_what_is_odd_is_told_by_a_start_and_by_doctor(
    folder: Path, make: Callable[[Path], None], lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    make(folder)
    config = RuntimeConfig(model=str(folder))
    with caplog.at_level(logging.WARNING):
        find_model(config, lambda text, part: None)
    warned = [record.getMessage() for record in caplog.records]
    told = [check.found for check in check_model(config, "cpu", ()) if check.state == "warning"]
    assert len(warned) == len(lines)
    assert all(line in text for line, text in zip(lines, warned, strict=True))
    assert told == warned


def nest_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def nest_header(folder: Path) -> None:
    header = b"[" * 200_000
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def zero_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, folder / "model.safetensors")


def billion_heads(folder: Path) -> None:
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "hidden_size"), 10**9)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG | heads))


def link_to_nothing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/nonexistent/blob")


LIES = [
    (nest_config, "config.json is not valid: it nests lists and objects deeper"),
    (nest_header, "its header is not valid: it nests lists and objects deeper"),
    (zero_weights, "is 0, so that no token would be likelier than another"),
    (billion_heads, "num_attention_heads=1000000000: must be at most 4096"),
    (link_to_nothing, "tokenizer.json is a link to /nonexistent/blob, which is missing"),
]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("lie", "words"), LIES)
def test_a_runtime_refuses_files_that_lie_before_it_starts_a_process(
    folder: Path,
    fake_runtime: Callable[..., Runtime],
    lie: Callable[[Path], None],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lie(folder)
    monkeypatch.setattr("tpworker.runtime.start.Group", lambda **_: pytest.fail("it went on"))
    with pytest.raises(ModelError, match=words):
        asyncio.run(ends(fake_runtime(folder, rank_module="tpworker.rank")))


@pytest.mark.parametrize(("lie", "words"), LIES)
@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_the_command_line_says_it_in_one_line(
    folder: Path, command: str, lie: Callable[[Path], None], words: str
) -> None:
    """Without torch: a module of that name that cannot be imported stands before it."""
    lie(folder)
    poison = folder / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise SystemExit('torch was imported')")
    arguments = ["--model", str(folder), "--device", "cpu"]
    arguments += ["--port", "0"] if command == "serve" else []
    path = os.pathsep.join([str(poison)] * (command == "serve") + sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "tpworker", command, *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if command == "serve":
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("tpworker: error: ")
        assert words in line
    else:
        assert done.returncode == 1, done.stderr
        assert done.stderr == ""
        lines = [line for line in done.stdout.splitlines() if line.startswith("missing")]
        assert len(lines) == 1
        assert words in lines[0]


def test_a_tokenizer_is_loaded_from_files_that_are_all_there(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.eos_id == END


# ------------------------------------------------------------------------- the chat template


@pytest.mark.usefixtures("nothing_left")
def test_a_chat_template_of_ones_own(
    folder: Path, fake_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    (folder / "chat_template.jinja").write_text("the model's own")
    template = tmp_path / "own.jinja"
    template.write_text("\ufeff{{ messages[0].content }}!")

    async def said() -> str:
        async with fake_runtime(folder, chat_template=str(template)) as runtime:
            return runtime.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])

    assert asyncio.run(said()) == "Hi!"


@pytest.mark.usefixtures("nothing_left")
def test_a_broken_one_ends_the_start(
    folder: Path, fake_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"--chat-template: .*broken: line 1: Unexpected end of template"):
        asyncio.run(ends(fake_runtime(folder, chat_template=str(template))))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file"),
        (b"\xff", "cannot be read: 'utf-8' codec"),
        (b" \n", "must have some text"),
    ],
)
def test_files_that_are_no_templates(folder: Path, tmp_path: Path, content: bytes | None, words: str) -> None:
    template = tmp_path / "own.jinja"
    if content is not None:
        template.write_bytes(content)
    for name, said in ((str(template), words), (str(tmp_path), "is a folder"), ("a\0b", "cannot be read")):
        with pytest.raises(ConfigError, match=said):
            find_model(RuntimeConfig(model=str(folder), chat_template=name), lambda text, part: None)


def test_a_template_has_no_effect_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("x")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    config = RuntimeConfig(model=str(folder), chat_template=str(tmp_path / "own.jinja"))
    with pytest.raises(ConfigError, match="has no effect: there is no tokenizer"):
        find_model(config, lambda text, part: None)


def with_head(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    make_checkpoint(folder, config)
    return folder


def test_a_head_that_is_not_there_is_told_of_by_a_start_and_by_doctor(folder: Path) -> None:
    config = RuntimeConfig(model=str(folder), speculative_method="mtp", load_format="dummy")
    with pytest.raises(
        ConfigError, match=r"^speculative_method=mtp: .*use --speculative-method ngram"
    ) as caught:
        find_model(config, lambda text, part: None)
    assert "\n" not in str(caught.value)
    assert [(check.state, check.found) for check in check_model(config, "cpu", ())] == [
        ("missing", str(caught.value))
    ]
    ngram = dataclasses.replace(config, speculative_method="ngram")
    assert find_model(ngram, lambda text, part: None).spec.mtp is None


def test_a_head_is_part_of_what_doctor_counts(tmp_path: Path) -> None:
    config = RuntimeConfig(model=str(with_head(tmp_path)))
    mtp = dataclasses.replace(config, speculative_method="mtp")
    assert find_model(mtp, lambda text, part: None).spec.mtp is not None
    plain, headed = ({check.subject: check for check in check_model(one, "cpu", ())} for one in (config, mtp))
    assert "speculation" not in plain
    assert headed["speculation"].found == "1 draft a step by the model's own head"
    assert headed["weights"].state == "ok"
    per_token = [
        float(re.search(r"\((\S+) KiB a token", found["memory"].found)[1])  # type: ignore[index]
        for found in (plain, headed)
    ]
    assert per_token[1] == pytest.approx(per_token[0] * 3 / 2), "a third layer"


def test_tensors_of_a_head_that_are_missing_are_told_of_before_a_process_is_started(tmp_path: Path) -> None:
    folder = with_head(tmp_path)
    file = folder / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if not name.startswith("mtp.")}, file)
    mtp = RuntimeConfig(model=str(folder), speculative_method="mtp")
    with pytest.raises(
        ModelError, match="names a layer for multi-token prediction, and the checkpoint lacks"
    ):
        find_model(mtp, lambda text, part: None)
    assert {check.subject: check.state for check in check_model(mtp, "cpu", ())}["weights"] == "missing"
    find_model(dataclasses.replace(mtp, speculative_method=None), lambda text, part: None)


def test_a_process_does_not_grow_with_the_runtimes_that_it_starts(real_model: Path) -> None:
    """What reading a tokenizer took is the system's again, whichever threads read it."""
    program = """
import asyncio, sys
import psutil
from tpworker import Runtime

async def start_and_stop() -> None:
    rank, scheduler = "tests.children.idle_rank", "tpworker.testing.fake_scheduler"
    async with Runtime(sys.argv[1], rank_module=rank, scheduler_module=scheduler):
        pass

for _ in range(6):
    asyncio.run(start_and_stop())
    print(psutil.Process().memory_info().rss >> 20)
"""
    command = [sys.executable, "-c", program, str(real_model)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    sizes = [int(size) for size in done.stdout.split()]
    assert max(sizes) < sizes[0] + 60, f"MiB after each: {sizes}"
