"""Which tensor is in which file, by the headers alone: as transformers takes it; and what is said of lies."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.checkpoint.refusals import NO_FILES, refused
from tests.checkpoint.test_weights import TINY, change, load, replaced, shard_files, without
from tests.model.helpers import Reference, tiny_model
from tpworker.checkpoint import weight_files
from tpworker.checkpoint.weight_files import INDEX, SINGLE, WeightFiles, absent_files, check_files
from tpworker.checkpoint.weights import check_weights
from tpworker.errors import ModelError
from tpworker.model.families import read_spec

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(tmp_path, LlamaConfig(**TINY))
    return tmp_path


def check(folder: Path) -> list[str]:
    return check_files(folder, read_spec(folder))


# ------------------------------------------------------------------------------ tied embeddings


def tie(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """A model whose config.json ties its embeddings, whatever its files hold."""
    tiny_model(folder, LlamaConfig(**TINY, tie_word_embeddings=True))
    change(folder, edit)


def only_the_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {HEAD if name == EMBED else name: tensor for name, tensor in tensors.items()}


def last_row_differs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    head = tensors[EMBED].clone()
    head[-1, -1] += 1
    return {**tensors, HEAD: head}


def differs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, HEAD: torch.randn(tensors[EMBED].shape, generator=torch.Generator().manual_seed(5))}


def is_alike(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, HEAD: tensors[EMBED].clone()}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("edit", [only_the_head, last_row_differs, differs, is_alike])
def test_logits_of_a_tied_model_are_transformers_whatever_its_files_hold(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], size: int
) -> None:
    tie(tmp_path, edit)
    Reference.of_folder(tmp_path).check(size)


@pytest.mark.parametrize(
    ("edit", "is_told"),
    [(only_the_head, False), (is_alike, False), (differs, True), (last_row_differs, True)],
)
def test_an_output_head_besides_a_tied_embedding_is_told_of_as_by_transformers(
    tmp_path: Path, edit: Any, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tie(tmp_path, edit)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert ("we will NOT tie them" in caplog.text) == is_told
    notes = check(tmp_path)
    assert bool(notes) == is_told
    if is_told:
        assert re.search(rf"has {EMBED} and a different {HEAD}: both are used", notes[0])
    check_weights(tmp_path, read_spec(tmp_path))


def test_a_tied_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    tie(tmp_path, replaced(HEAD, torch.ones(3, 32)))
    with pytest.raises(ModelError, match=r"tensor lm_head.weight has shape \[3, 32\].* asks for \[64, 32\]"):
        load(tmp_path)


def test_neither_embedding_nor_head(tmp_path: Path) -> None:
    tie(tmp_path, without(EMBED))
    with pytest.raises(ModelError, match=rf"has no tensor {EMBED}"):
        load(tmp_path)


# ----------------------------------------------------------------------------- which file is read


def test_a_single_file_is_read_before_an_index_as_by_transformers(folder: Path) -> None:
    shard_files(folder)
    sharded = {name: tensor for path in folder.glob("model-*") for name, tensor in load_file(path).items()}
    save_file({name: tensor + 1 for name, tensor in sharded.items()}, folder / SINGLE)
    theirs = AutoModelForCausalLM.from_pretrained(folder).get_parameter(NORM)
    assert torch.equal(theirs, sharded[NORM] + 1)
    assert torch.equal(load(folder).final_norm, theirs)
    (note,) = check(folder)
    assert f"{folder} has {SINGLE} and {INDEX}, which names other files: {SINGLE} is read" in note
    assert absent_files(folder) == []


@pytest.mark.parametrize("text", ["{", '{"weight_map": {"x": 3}}'])
def test_a_broken_index_beside_a_single_file_is_told_of(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    load(folder)
    assert len(check(folder)) == 1


def test_an_index_of_the_single_file_is_nothing_to_tell(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / SINGLE), SINGLE)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert check(folder) == []


# --------------------------------------------------------------------------------- files that lie


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(name: str = "x", **change: Any) -> bytes:
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | change
    return with_header(json.dumps({name: tensor}).encode(), bytes(4))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (with_header(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nests lists and objects deeper"),
        (with_header(b"[" * 200_000), "nests lists and objects deeper"),
        (with_header(b'{"a":' + b"1" * 5000 + b"}"), "integer of more than 4300 digits"),
        (with_header(b"[]"), "its header holds list"),
        (with_header(b"\xff\xff"), "cannot be read as UTF-8"),
        (with_header(b"\xef\xbb\xbf{}"), "BOM"),
        (with_header(b'{"x": 3}'), "tensor x has no dtype"),
        (with_header(b'{"x\\n\\u001b": null}'), r"tensor 'x\n\x1b' has no dtype"),
        (entry(dtype=None), "tensor x has no dtype"),
        (entry(shape=None), "tensor x has no shape of a few integers"),
        (entry(shape=[-1]), "tensor x has no shape of a few integers"),
        (entry(shape=[1.0]), "tensor x has no shape of a few integers"),
        (entry(shape=[True]), "tensor x has no shape of a few integers"),
        (entry(data_offsets="0"), "tensor x has no data_offsets of a few integers"),
        (entry(data_offsets=[0, 10**30]), "tensor x has no data_offsets of a few integers"),
        (entry(data_offsets=[4, 0]), "tensor x has data_offsets=(4, 0), not its two ends"),
        (entry(data_offsets=[0]), "tensor x has data_offsets=(0,), not its two ends"),
        (entry(shape=[1] * 10**5), "tensor x has no shape of a few integers"),
        (
            entry(shape=[2**40], data_offsets=[0, 2**42]),
            "is truncated: expected 4398046511197 bytes, found 97",
        ),
        (entry(data_offsets=[0, 3]), "shape [1] of F32, which does not fill its 3 bytes"),
        (entry(shape=[2**40, 2**40]), "F32, which does not fill its 4 bytes"),
        (
            (10**9).to_bytes(8, "little") + b"{}",
            "of 1000000000 bytes as the first 8 say (the limit is 100000000)",
        ),
        (bytes(8), "of 0 bytes as the first 8 say"),
        (b"", "is not a safetensors file"),
    ],
)
def test_a_header_that_lies_is_a_line(folder: Path, data: bytes, words: str) -> None:
    (folder / SINGLE).write_bytes(data)
    for read in (check, load):
        line = refused(read, folder)
        assert words in line
        assert line.startswith(f"{folder / SINGLE} ")


@pytest.mark.parametrize("change", [{"dtype": "X9"}, {"data_offsets": [4, 8]}])
def test_what_the_library_alone_finds_is_a_line(folder: Path, change: dict[str, Any]) -> None:
    (folder / SINGLE).write_bytes(entry(name=EMBED, **change) + bytes(4))
    with pytest.raises(
        ModelError, match=r"model\.safetensors \(\d+ bytes\) is not a safetensors file: .*again"
    ):
        load(folder)


@pytest.mark.parametrize("name", [SINGLE, "model-00002-of-00002.safetensors", INDEX])
@pytest.mark.parametrize(("make", "words"), NO_FILES)
def test_what_is_no_file_is_a_line(folder: Path, name: str, make: Any, words: str) -> None:
    if name != SINGLE:
        shard_files(folder)
    (folder / name).unlink()
    make(folder / name)
    assert words in refused(check, folder)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({NORM: "../x.safetensors"}, r"\.\./x.safetensors names no file of the folder"),
        ({NORM: "/etc/passwd"}, "/etc/passwd names no file of the folder"),
        ({NORM: 3}, "3 names no file of the folder"),
        ({NORM: ""}, " names no file of the folder"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({NORM: "x" * 5000}, r"^.{0,300}names no file|too long"),
    ],
)
def test_an_index_that_lies_is_a_line(folder: Path, weight_map: Any, words: str) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=words):
        check(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"weight_map":' + '{"a":' * 100_000, "\ufeff{}", "1" * 5000]
)
def test_an_index_that_is_no_json_object_is_a_line(folder: Path, text: str) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(text)
    with pytest.raises(ModelError, match=f"{INDEX} is not a safetensors index: "):
        check(folder)


@pytest.mark.parametrize("zero", [(EMBED,), (NORM,), (HEAD,), "all"])
def test_weights_that_were_never_written_are_refused(folder: Path, zero: Any) -> None:
    names = load_file(folder / SINGLE).keys() if zero == "all" else zero
    change(folder, lambda tensors: {n: torch.zeros_like(t) if n in names else t for n, t in tensors.items()})
    with pytest.raises(ModelError, match=r"model\.safetensors: every value of .* is 0, .*Fetch it again"):
        check(folder)


def test_a_few_zeros_are_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value at the very end; and parts of layers may be zero, as in models that were made deeper."""
    monkeypatch.setattr(weight_files, "_PIECE", 7)
    last = torch.zeros(64, 32)
    last[-1, -1] = 1
    change(folder, replaced(EMBED, last))
    change(folder, replaced("model.layers.1.self_attn.o_proj.weight", torch.zeros(32, 64)))
    assert check(folder) == []


def test_a_download_that_was_preallocated_and_cut_off_is_told_of(folder: Path) -> None:
    path = folder / SINGLE
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(ModelError, match=r"every value of model\.norm\.weight is 0"):
        check(folder)


def test_files_are_checked_without_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tpworker.runtime.loading import find_model; "
        "from tpworker.config import RuntimeConfig; "
        "find_model(RuntimeConfig(model=sys.argv[1]), lambda text, part: None); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_tensors_are_compared_and_found_across_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "_PIECE", 100)
    shard_files(folder)
    files = WeightFiles(folder)
    one = next(iter(files.names))
    found = files.entry(one)
    assert found is not None
    assert files.are_equal(one, one)
    assert not files.are_equal(one, "nonesuch")
    assert not files.are_equal(EMBED, HEAD)
    assert files.entry("nonesuch") is None
    assert not files.is_zero("nonesuch")
