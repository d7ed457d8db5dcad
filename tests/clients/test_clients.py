"""Client libraries, unchanged, in an environment of their own: what they send, and make of the answers.

docs/clients.md has the others, which do not install in a minute, and what was seen of them.
"""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import programs
from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
PACKAGES = (
    "langchain-openai==1.7.4",
    "llama-index-llms-openai-like==0.8.1",
    "pydantic-ai-slim[openai]==2.31.1",
    "instructor==1.17.0",
)
INSTALL_SECONDS = 240
PARIS = "In Paris."


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the libraries, and with what is installed for these tests."""
    folder = tmp_path_factory.mktemp("clients")
    venv.create(folder, with_pip=False, symlinks=True)
    (here,) = folder.glob("lib/python*/site-packages")
    (here / "ours.pth").write_text("\n".join(site.getsitepackages()))
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    try:
        subprocess.run([*command, *PACKAGES], check=True, capture_output=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the client libraries did not install within {INSTALL_SECONDS} s")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the client libraries do not install here: {error.stderr.decode().strip()[-300:]}")
    return python


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    def reply(prompt: str) -> str:
        return '```json\n{"name": "Paris"}\n```' if "name" in prompt else PARIS

    with LiveServer(FakeRuntime(reply=reply, longest=4096)) as server:
        yield server


@pytest.fixture
def run(python: Path, live: LiveServer) -> Callable[[str], Any]:
    def run(name: str) -> Any:
        command = [python, programs.__file__, name, f"{live.url}/v1"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


def test_langchain(run: Callable[[str], Any], live: LiveServer) -> None:
    assert run("langchain") == {
        "text": PARIS,
        "streamed": PARIS,
        "logprobs": [2] * len(PARIS),
        "tokens": len(PARIS),
        "responses": PARIS,
        "batch": [f"{PARIS}+1"] * 2,
    }
    assert live.runtime.num_open == 0


def test_llama_index(run: Callable[[str], Any]) -> None:
    found = run("llama_index")
    assert found == {
        "text": PARIS,
        "streamed": PARIS,
        "logprobs": [2] * len(PARIS),
        "completion": PARIS,
    }


def test_pydantic_ai(run: Callable[[str], Any]) -> None:
    found = run("pydantic_ai")
    assert (found["text"], found["streamed"]) == (PARIS, PARIS)
    assert re.search(r"tools .*not supported", found["refused"]), found["refused"]


def test_instructor(run: Callable[[str], Any]) -> None:
    found = run("instructor")
    assert found["name"] == "Paris"
    assert re.search(r"tools .*not supported", found["refused"]), found["refused"]


def test_it_is_the_interpreter_of_the_environment(python: Path) -> None:
    where = subprocess.run([python, "-c", "import langchain_openai as l; print(l.__file__)"],
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert where.startswith(str(python.parent.parent))
    assert str(python) != sys.executable
