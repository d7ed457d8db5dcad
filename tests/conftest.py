"""For tests with processes: a model folder, runtimes on fakes, and proof that nothing is left behind."""

from __future__ import annotations

import functools
import gc
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tls import write_tls_files
from tpworker import Runtime
from tpworker.checkpoint.default_model import ensure_default_model
from tpworker.errors import ModelError
from tpworker.ipc.channels import Channel, new_address

# Each client makes a context, and reading the authorities takes 40 ms: minutes, for thousands of clients.
ssl.create_default_context = functools.cache(ssl.create_default_context)

VOCAB_SIZE = 300

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The default model's folder; fetched if need be. Without a network: skipped, but not in CI."""
    try:
        return ensure_default_model(lambda text, fraction: None)
    except ModelError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no default model: {error}")


@pytest.fixture(scope="session")
def tls_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_tls_files`."""
    folder = tmp_path_factory.mktemp("tls")
    write_tls_files(folder)
    return folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder that says what a model is, without weights and without a tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return folder


@pytest.fixture
def fake_runtime(model_folder: Path) -> Callable[..., Runtime]:
    """Makes runtimes whose scheduler echoes and whose ranks wait: real processes that start in a blink."""

    def make(model: Path = model_folder, **options: Any) -> Runtime:
        options.setdefault("rank_module", "tests.children.idle_rank")
        options.setdefault("scheduler_module", "tpworker.testing.fake_scheduler")
        return Runtime(model, **options)

    return make


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """After the test there is no process, thread, descriptor, socket or shared memory that it has left."""
    Channel.bind(new_address("warm-up")).close()  # ZeroMQ's own threads and descriptors stay, once made
    before = _left()
    yield
    eventually(lambda: _left() <= before, lambda: f"left behind: {sorted(_left() - before)}")


def _left() -> set[str]:
    gc.collect()
    me = psutil.Process()
    left = {f"process {child.pid} {child.name()}" for child in me.children(recursive=True)}
    left |= {f"thread {thread.name}" for thread in threading.enumerate() if "tpworker" in thread.name}
    for fd in os.listdir("/proc/self/fd"):
        try:
            left.add(f"descriptor {fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            continue  # the one that listed them
    sockets = Path("/proc/net/unix").read_text().splitlines()
    left |= {line.split()[-1] for line in sockets if f"@tpworker-{os.getpid()}-" in line}
    left |= {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd" in line}
    return left


def eventually(condition: Callable[[], bool], message: Callable[[], str] = str) -> None:
    """Waits until a condition holds, and fails if it does not come to hold."""
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
