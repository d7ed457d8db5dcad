"""resolve_model: what may stand after --model, and what is said about the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tpworker.checkpoint import default_model
from tpworker.checkpoint.resolve import cached_folder, resolve_model
from tpworker.errors import ModelError

CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"]})


def ignore(text: str, fraction: float | None) -> None:
    """Progress that nobody looks at."""


def test_a_folder_with_a_config_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    assert resolve_model(str(tmp_path), ignore) == tmp_path


def test_a_home_folder_may_be_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(CONFIG)
    assert resolve_model("~/mine", ignore) == tmp_path / "mine"


def test_a_folder_without_a_config_is_refused_and_what_it_lacks_is_listed(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00001.safetensors").touch()
    with pytest.raises(ModelError, match=r": config\.json, tokenizer\.json missing") as refused:
        resolve_model(str(tmp_path), ignore)
    assert str(tmp_path) in str(refused.value)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelError, match=r": config\.json missing"):
        resolve_model(str(tmp_path), ignore)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"model\.gguf is a file, and a model is a folder"):
        resolve_model(str(tmp_path / "model.gguf"), ignore)


@pytest.mark.parametrize("model", ["nonesuch", "/no/such/folder", "./org/name", "../org/name", "a/b/c"])
def test_what_cannot_be_a_hub_name_is_refused_without_asking_the_hub(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ModelError, match="neither a folder on this machine nor a hub name"):
        resolve_model(model, lambda text, _: pytest.fail(f"it went on: {text}"))


def test_what_the_hub_takes_for_no_name_is_none() -> None:
    for find in (lambda: resolve_model("a..b/c", ignore), lambda: cached_folder("a..b/c")):
        with pytest.raises(ModelError, match="neither a folder on this machine nor a hub name"):
            find()


def test_without_a_name_it_is_the_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = default_model.default_model_folder()
    folder.mkdir(parents=True)
    for name in default_model._FILES:
        (folder / name).write_text("{}")
    assert resolve_model(None, ignore) == folder


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as fetching one small repository takes."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    files: ClassVar = {
        "config.json": CONFIG.encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": b"weights",
        "consolidated.safetensors": b"the same weights again",
        "pytorch_model.bin": b"a pickle",
        "onnx/config.json": b"for another runtime",
    }

    def do_GET(self) -> None:
        if not self.path.startswith(("/api/models/org/tiny/", "/org/tiny/")):
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        name = self.path.split("?")[0].partition(f"{self.commit}/")[2]
        if "/resolve/" in self.path and name in self.files:
            etag = {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": self.commit}
            return self.answer(200, self.files[name], etag)
        if "/tree/" in self.path:
            listing: Any = [
                {"type": "file", "path": name, "size": len(data), "oid": name}
                for name, data in self.files.items()
            ]
        else:
            listing = {
                "id": "org/tiny",
                "sha": self.commit,
                "siblings": [{"rfilename": n} for n in self.files],
            }
        return self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def resolve_in_a_process(model: str, home: Path, endpoint: str, *options: str) -> str:
    """What resolve_model returns or raises; the hub's library reads its settings when it is imported."""
    code = f"""
from tpworker.checkpoint.resolve import resolve_model
try:
    print(resolve_model({model!r}, lambda text, fraction: None, {", ".join(options)}))
except Exception as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_name_is_fetched_without_what_is_not_needed_and_found_again_offline(
    tmp_path: Path, hub: str
) -> None:
    folder = Path(resolve_in_a_process("org/tiny", tmp_path, hub))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (folder / "config.json").read_text() == CONFIG
    assert Path(resolve_in_a_process("org/tiny", tmp_path, "http://127.0.0.1:9")) == folder


def test_dummy_weights_need_no_weights_from_the_hub(tmp_path: Path, hub: str) -> None:
    folder = Path(resolve_in_a_process("org/tiny", tmp_path, hub, "weights=False"))
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json"}


def test_a_name_that_the_hub_does_not_know(tmp_path: Path, hub: str) -> None:
    said = resolve_in_a_process("org/other", tmp_path, hub)
    assert said.startswith(
        "ModelError --model org/other: not a folder, and the hub has no model of that name"
    )


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    said = resolve_in_a_process("org/tiny", tmp_path, "http://127.0.0.1:9")
    assert said.startswith("ModelError --model org/tiny: not a folder, and the hub could not be reached: ")
    assert "leave --model out" in said
