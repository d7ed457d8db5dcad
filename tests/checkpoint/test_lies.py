"""Files that lie: whatever a model's files hold, it is served, or refused in a line before any start."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.refusals import NO_FILES, refused
from tests.model.helpers import CPU
from tests.model.test_families import (
    ERNIE,
    ERNIE_DENSE,
    GLM,
    LLAMA,
    LLAMA3,
    LONGROPE,
    MIXTRAL,
    PHI3,
    PHI_LONGROPE,
    QWEN,
)
from tests.model.test_gemma import GEMMA2, GEMMA3
from tpworker.checkpoint.resolve import resolve_model
from tpworker.checkpoint.weight_files import WeightFiles
from tpworker.checkpoint.weights import shard_bytes
from tpworker.config import RuntimeConfig
from tpworker.errors import ModelError, shown
from tpworker.json_file import MAX_BYTES, shown_name
from tpworker.model.families import ModelSpec, read_spec
from tpworker.model.rope import rope_tables
from tpworker.model.tp import Shard
from tpworker.runtime.loading import FoundModel, find_model, load_tokenizer
from tpworker.runtime.settings import rank_settings, resolve_max_model_len

T = TypeVar("T")

GEMMA3_WITH_VISION: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {key: value for key, value in GEMMA3.items() if key != "architectures"},
}

WINDOWED = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 64,
    "max_window_layers": 12,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def find(folder: Path) -> FoundModel:
    return find_model(RuntimeConfig(model=str(folder), load_format="dummy"), lambda text, part: None)


FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "nests lists and objects deeper than can be read"),
        ('{"a":' * 100_000, "nests lists and objects deeper than can be read"),
        ('{"a": ' + "1" * 5000 + "}", "an integer of more than 4300 digits"),
        ('\ufeff{"a": 1}', "is not valid JSON: Unexpected UTF-8 BOM"),
        ('{"a": 1', "is not valid JSON: Expecting ',' delimiter"),
        ("", "is not valid JSON: Expecting value"),
        ("[1]", "holds list, not an object"),
        ("null", "holds NoneType, not an object"),
        (" " * (MAX_BYTES + 1), f"has more than {MAX_BYTES} bytes, the limit"),
    ],
)
def test_a_file_that_is_no_json_object(folder: Path, name: str, text: str, words: str) -> None:
    (folder / name).write_text(text)
    line = refused(find, folder)
    assert words in line
    assert line.startswith(str(folder / name))


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
@pytest.mark.parametrize(("make", "words"), NO_FILES)
def test_what_has_a_files_name_and_is_none(folder: Path, name: str, make: Any, words: str) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert words in refused(find, folder)


def digits(count: int) -> int:
    return 10**count // 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 1e30}, "hidden_size=1e+30: must be an integer of at least 1 and at most 1048576"),
        ({"hidden_size": 4 * 10**29}, "hidden_size=4"),
        ({"hidden_size": digits(4000)}, "must be at most 1048576"),
        ({"hidden_size": float("nan")}, "hidden_size=nan: must be an integer"),
        ({"hidden_size": -1}, "hidden_size=-1: must be an integer of at least 1"),
        ({"hidden_size": [9] * 10**5}, "hidden_size=[9, 9, 9, 9, 9, 9, ...]: must be an integer"),
        ({"hidden_size": "9" * 10**5}, "99999': must be an integer"),
        ({"hidden_size": {"\n": "\n"}}, r"hidden_size={'\n': '\n'}: must be an integer"),
        ({"rms_norm_eps": digits(4000)}, "must be a finite number above 0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf: must be a finite number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan: must be a finite number above 0"),
        ({"max_position_embeddings": 1}, "max_position_embeddings=1: must be at least 2"),
        ({"max_position_embeddings": 10**12}, "must be at most 2147483647"),
        ({"num_attention_heads": 10**9, "num_key_value_heads": 10**9}, "must be at most 4096"),
        ({"num_key_value_heads": 10**9}, "num_key_value_heads=1000000000: must"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be at most 1024"),
        ({"vocab_size": 1 << 25}, "vocab_size=33554432: must be at most 16777216"),
        ({"head_dim": 1 << 30}, "must be at most 4096"),
        ({"architectures": ["x" * 10**5]}, "is not supported. Supported: "),
        ({"architectures": [["LlamaForCausalLM"]]}, "must be a list with the model's architecture"),
        ({"quantization_config": {"quant_method": ["\n"] * 10**5}}, "the checkpoint is quantised"),
        ({"dtype": {"a": 1}}, "dtype={'a': 1}: must be one of float32"),
        ({"eos_token_id": list(range(1000))}, "names 1000 tokens; at most 16 can end an output"),
        (GLM | {"num_nextn_predict_layers": 10**9}, "must be at most 1024"),
        (GLM | {"n_shared_experts": 10**9}, "must be at most 4096"),
        (GLM | {"n_routed_experts": 10**9}, "must be at most 4096"),
        (
            QWEN | {"num_hidden_layers": 1024, "num_experts": 4096},
            "have 4194304 experts, shared ones included",
        ),
        (MIXTRAL | {"sliding_window": {"a": "\n"}}, "must be an integer of at least 1"),
        (MIXTRAL | {"sliding_window": 10**12}, "must be at most 2147483647"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0] * 10**5}}, "must be a list of 32 finite numbers"),
        ({"rope_scaling": LONGROPE | {"short_factor": [float("nan")] * 32}}, "must be a list of 32"),
        ({"rope_scaling": LONGROPE | {"short_factor": [digits(4000)] * 32}}, "must be a list of 32"),
        (WINDOWED | {"max_window_layers": 10**9}, "max_window_layers=1000000000: must be at most 1024"),
        (WINDOWED | {"layer_types": ["sliding_attention"] * 10**5}, "must be a list of 30 times"),
        (WINDOWED | {"layer_types": [["\n"] * 10**4] * 30}, "must be a list of 30 times"),
    ],
)
def test_a_config_that_lies(folder: Path, change: dict[str, Any], words: str) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | change))
    line = refused(find, folder)
    assert words in line
    assert line.startswith(f"{folder / 'config.json'}: ")


def test_a_list_of_dense_layers_may_be_long(folder: Path) -> None:
    """It is looked up once for each layer."""
    config = QWEN | {"num_hidden_layers": 1024, "mlp_only_layers": list(range(1020)) * 300}
    (folder / "config.json").write_text(json.dumps(config))
    moe = find(folder).spec.moe
    assert moe is not None
    assert moe.layers == (1020, 1021, 1022, 1023)


@pytest.mark.parametrize(("value", "text"), [("name", "name"), ("a\nb", r"'a\nb'"), (3, "3")])
def test_names_are_shown_as_they_are_if_they_can_be(value: object, text: str) -> None:
    assert shown_name(value) == text
    deep: object = "x" * 10**6
    for _ in range(4):
        assert len(shown(deep)) <= 120
        deep = [deep] * 100


# -------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[" * 100_000, '{"model":' * 100_000, "null", '{"model": {"type": "\\n"}}', "\ufeff{}"],
)
def test_a_tokenizer_that_lies(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1200


def test_a_panic_of_the_tokenizers_library_is_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3's, which is no Exception."""

    def panic(folder: Path) -> None:
        raise PanicException("index out of bounds:\n the len is 0")

    monkeypatch.setattr("tpworker.text.tokenizer.Tokenizer.load", panic)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"cannot be read: index out of bounds: the len is 0; fetch it again"
    ):
        load_tokenizer(folder)


# ------------------------------------------------------------------------------------- permissions


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that other users may read, too."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        os.seteuid(user)


@pytest.mark.parametrize(
    "what", ["above", "folder", "config.json", "generation_config.json", "tokenizer.json"]
)
def test_what_may_not_be_read(readable: Path, what: str) -> None:
    model = readable / "above" / "model"
    model.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (model / name).write_text(json.dumps(LLAMA))
    place = {"above": model.parent, "folder": model}.get(what, model / what)
    place.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            os.seteuid(65534)
        line = refused(find, model)
    finally:
        os.seteuid(user)
        place.chmod(0o755)
    assert "may not be read by this user (uid " in line
    assert "chmod" in line


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("x" * 5000, "is neither a folder on this machine nor a hub name .*File name too long"),
        ("a\0b", "is neither a folder on this machine nor a hub name"),
        ("~nobody-of-this-name/x", "nobody knows of this home folder"),
    ],
)
def test_a_name_that_can_be_none(model: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        resolve_model(model, lambda text, part: None)


# ------------------------------------------------------------------------------------ whatever comes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 8, 1.0, 0.5, 1e30, 1e-30, 1e308, 2**31, 2**63, 10**40, True])
VALUES = NUMBERS | JSON | st.lists(NUMBERS, max_size=20)
BASES = (
    LLAMA,
    LLAMA | {"rope_scaling": LLAMA3},
    LLAMA | {"rope_scaling": LONGROPE},
    WINDOWED,
    GEMMA2,
    GEMMA3,
    GEMMA3_WITH_VISION,
    PHI3,
    PHI3 | {"rope_scaling": PHI_LONGROPE | {"type": "su"}},
    GLM,
    ERNIE,
    ERNIE_DENSE,
    QWEN,
    MIXTRAL,
)
KEYS = sorted(
    {key for base in BASES for key in base}
    | {
        "head_dim",
        "dtype",
        "rope_parameters",
        "rope_theta",
        "partial_rotary_factor",
        "layer_types",
        "use_bias",
    }
    | {"sliding_window", "use_sliding_window", "attention_bias", "mlp_bias", "use_qk_norm", "norm_topk_prob"}
    | {"n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"}
    | {"routed_scaling_factor", "moe_num_shared_experts", "moe_layer_interval", "moe_layer_start_index"}
    | {"moe_layer_end_index", "moe_use_aux_free", "moe_norm_min", "decoder_sparse_step", "mlp_only_layers"}
    | {"quantization_config", "original_max_position_embeddings", "query_pre_attn_scalar", "text_config"}
    | {"attn_logit_softcapping", "final_logit_softcapping", "sliding_window_pattern", "rope_local_base_freq"}
)
ROPE_KEYS = ["factor", "rope_theta", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"]
ROPE_KEYS += [
    "short_factor",
    "long_factor",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "type",
]
ROPES = st.builds(
    lambda kind, values: {"rope_type": kind} | values,
    st.sampled_from(["linear", "yarn", "llama3", "default", "dynamic", "longrope"]),
    st.dictionaries(st.sampled_from(ROPE_KEYS), VALUES, max_size=4),
)
NESTED = st.dictionaries(st.sampled_from(["full_attention", "sliding_attention"]), ROPES | VALUES, max_size=2)
GENERATION_KEYS = ["temperature", "top_p", "top_k", "do_sample", "eos_token_id", "bos_token_id", "min_p"]
MANY = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refused(read: Callable[[], T]) -> T | None:
    """What is read; None if it was refused, in a line."""
    try:
        return read()
    except ModelError as error:
        line = str(error)
    assert line.isprintable()
    assert len(line) < 600
    return None


def is_served(spec: ModelSpec) -> None:
    """What the runtime and a rank make of a model before weights are read: none of it may raise."""
    config = RuntimeConfig()
    length = resolve_max_model_len(config, spec)
    rank_settings(config, spec, "cpu", length)
    shard = Shard.of(spec, 0, 2)
    if (0 if spec.moe is None else len(spec.moe.layers) * spec.moe.num_experts) + spec.num_layers < 200:
        assert shard_bytes(spec, shard, torch.float32, torch.device("meta")) > 0
    for rope in (spec.rope, spec.window and spec.window.rope):
        if rope is not None:
            rope_tables(rope, spec.head_dim, 2, CPU)
    assert all(0 <= eos_id < spec.vocab_size for eos_id in spec.eos_ids)


@MANY
@given(
    base=st.sampled_from(BASES),
    change=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    ropes=st.dictionaries(st.sampled_from(["rope_scaling", "rope_parameters"]), ROPES | NESTED, max_size=2),
    generation=st.dictionaries(st.sampled_from(GENERATION_KEYS), VALUES, max_size=3),
    is_outside=st.booleans(),
)
def test_whatever_config_comes_is_served_or_refused_in_a_line(
    folder: Path, base: Any, change: Any, ropes: Any, generation: Any, is_outside: bool
) -> None:
    config = base | change | ropes
    if "text_config" in base and not is_outside:
        config = base | {"text_config": base["text_config"] | change | ropes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    found = read_or_refused(lambda: find(folder))
    if found is not None:
        is_served(found.spec)


@MANY
@given(data=st.data())
def test_whatever_bytes_come_are_served_or_refused_in_a_line(folder: Path, data: st.DataObject) -> None:
    text = json.dumps(LLAMA).encode()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 12)))
    (folder / "config.json").write_bytes(text[:start] + data.draw(st.binary(max_size=12)) + text[end:])
    spec = read_or_refused(lambda: read_spec(folder))
    if spec is not None:
        is_served(spec)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@MANY
@given(
    change=st.dictionaries(st.sampled_from([*ENTRY, "x"]), VALUES, max_size=2),
    name=st.text(max_size=8),
    length=st.none() | st.integers(0, 2**64 - 1),
    rest=JSON,
)
def test_whatever_header_comes_is_read_or_refused_in_a_line(
    folder: Path, change: Any, name: str, length: int | None, rest: Any
) -> None:
    header = json.dumps({name: ENTRY | change, "__metadata__": rest}).encode()
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + bytes(16))
    files = read_or_refused(lambda: WeightFiles(folder))
    if files is not None:
        assert all(files.is_zero(tensor) in (True, False) for tensor in files.names)
