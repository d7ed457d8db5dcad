"""Client libraries, unchanged, in an environment of their own: what they send, and make of the answers.

The fake model says what it is told to, in the format of Hermes; whatever an output was to be held to is
checked to let that through. The real one is too small to choose: it is held to a schema, or to a call.
docs/clients.md has the libraries that do not install in a minute or two, and what was seen of them.
"""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.clients import agents, structured, texts
from tests.clients.cities import HOW_MANY, IN_ROME, City
from tests.integration.conftest import Server, start_server
from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime, byte_tokenizer
from tpworker.grammar import Compiler, grammar_of
from tpworker.sampling_params import SamplingParams

__all__ = ["start_server"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
PACKAGES = (
    "langchain-openai==1.7.4",
    "langgraph==1.2.24",
    "llama-index-llms-openai-like==0.8.1",
    "pydantic-ai-slim[openai]==2.31.1",
    "instructor==1.17.0",
    "litellm==1.110.2",
)
INSTALL_SECONDS = 240
ROOT = Path(__file__).parents[2]
PARIS = "In Paris."
CITY = {"name": "Paris", "is_capital": True, "country": {"code": "FR"}}
LOOKS = "I will look."
ANSWER = "Two million."
CALLED = ["population", {"city": "Paris"}]


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


def reply(prompt: str) -> str:
    """What the fake model says."""
    if IN_ROME in prompt and prompt.count("<tool_response>") < 2:
        called = _call("population", {"city": "Rome"})
        return called if "<tool_response>" in prompt else called.replace("}}", "")
    if "<tool_response>" in prompt:
        return ANSWER
    if HOW_MANY in prompt:
        return f"{LOOKS}\n{_call('population', {'city': 'Paris'})}"
    if told := re.search(r"<tools>\n(.*)\n</tools>", prompt):
        return _call(json.loads(told[1])["function"]["name"], CITY)
    if "city" in prompt:
        return f"```json\n{json.dumps(CITY)}\n```" if "```" in prompt else json.dumps(CITY)
    return PARIS


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with LiveServer(FakeRuntime(reply=reply, longest=1 << 14)) as server:
        yield server


Run = Callable[[Any, str], Any]


@pytest.fixture
def run(python: Path, live: LiveServer) -> Run:
    """Runs a program of a module against the fake model; what the outputs were held to lets them through."""

    def run(module: Any, name: str) -> Any:
        live.runtime.requests.clear()
        found = said_by(python, module, name, live.url, MODEL)
        for prompt, sampling, _ in live.runtime.requests:
            check_held(reply(prompt), sampling)
        assert live.runtime.num_open == 0
        return found

    return run


def said_by(python: Path, module: Any, name: str, url: str, model: str) -> Any:
    """What a program of a module says, as JSON on its last line."""
    command = [python, "-W", "ignore", "-m", module.__name__, name, f"{url}/v1", model]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT)
    assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


TOKENIZER = byte_tokenizer()


@cache
def compiler() -> Compiler:
    return Compiler(TOKENIZER.to_json(), 257, [256])


def check_held(text: str, sampling: SamplingParams) -> None:
    if sampling.structured_outputs is not None:
        matcher = compiler().matcher(grammar_of(sampling.structured_outputs))
        num_taken = matcher.try_consume_tokens(TOKENIZER.encode(text))
        assert (num_taken, matcher.is_accepting()) == (len(text), True), (text, sampling)


def kinds(live: LiveServer) -> Counter[str]:
    """To what the outputs were held, and how many of them."""
    held = [sampling.structured_outputs for _, sampling, _ in live.runtime.requests]
    return Counter("nothing" if outputs is None else outputs.kinds[0] for outputs in held)


# ---------------------------------------------------------------------------------- text


def test_text_by_langchain(run: Run) -> None:
    assert run(texts, "langchain") == {
        "text": PARIS,
        "streamed": PARIS,
        "logprobs": [2] * len(PARIS),
        "tokens": len(PARIS),
        "responses": PARIS,
        "batch": [f"{PARIS}+1"] * 2,
    }


def test_text_by_llama_index(run: Run) -> None:
    assert run(texts, "llama_index") == {
        "text": PARIS,
        "streamed": PARIS,
        "logprobs": [2] * len(PARIS),
        "completion": PARIS,
    }


def test_text_by_pydantic_ai(run: Run) -> None:
    assert run(texts, "pydantic_ai") == {"text": PARIS, "streamed": PARIS}


def test_text_by_litellm(run: Run) -> None:
    assert run(texts, "litellm") == {
        "texts": [PARIS, f"{PARIS}+1"],
        "logprobs": [2] * len(PARIS),
        "streamed": PARIS,
        "tokens": len(PARIS),
        "completion": PARIS,
    }


# --------------------------------------------------------------------- structured output

HELD_BY = {
    "openai_client": {"json": 3, "grammar": 2},
    "langchain": {"grammar": 4, "json": 2, "json_object": 1},
    "llama_index": {"grammar": 2},
    "pydantic_ai": {"grammar": 2, "json": 1},
    "instructor": {"grammar": 2, "json": 1},
    "litellm": {"json": 2, "grammar": 1},
}
"""How many requests of each library are held to what: JSON, or a grammar of calls."""


def test_all_libraries_are_tried() -> None:
    assert HELD_BY.keys() == structured.PROGRAMS.keys() == agents.PROGRAMS.keys()


@pytest.mark.parametrize("name", HELD_BY)
def test_structured_output(run: Run, live: LiveServer, name: str) -> None:
    found = run(structured, name)
    assert json.loads(found.pop("json_mode", json.dumps(CITY))) == CITY
    assert len(found) >= 2
    assert found == dict.fromkeys(found, CITY)
    assert kinds(live) == HELD_BY[name]


def test_structured_output_of_the_real_model(
    python: Path, start_server: Callable[..., Server], real_model: Path
) -> None:
    """By all libraries, a few at a time, of one server."""
    server = start_server("--tensor-parallel-size", "2", "--device", "cpu", "--max-num-seqs", "8")

    def ask(name: str) -> Any:
        return said_by(python, structured, name, server.url, real_model.name)

    with ThreadPoolExecutor(3) as threads:
        for name, found in zip(HELD_BY, threads.map(ask, HELD_BY), strict=True):
            assert isinstance(json.loads(found.pop("json_mode", "{}")), dict)
            for way, city in found.items():
                assert City.model_validate(city).name in ("Paris", "Rome"), (name, way, city)
    assert server.stop() == 0, server.stderr


# -------------------------------------------------------------------------------- agents


def test_the_openai_client_goes_round(run: Run) -> None:
    assert run(agents, "openai_client") == {"chats": ["tool_calls", LOOKS, ANSWER], "responses": ANSWER}


def test_an_agent_by_langchain(run: Run) -> None:
    assert run(agents, "langchain") == {
        "called": [CALLED],
        "streamed": [CALLED],
        "content": [LOOKS, LOOKS],
        "reason": "tool_calls",
        "answer": ANSWER,
        "mended": [["population", {"city": "Rome"}]],
        "agent": ANSWER,
        "agent, streamed": ANSWER,
        "json_mode": CITY,
    }


def test_an_agent_by_llama_index(run: Run) -> None:
    assert run(agents, "llama_index") == {
        "predict_and_call": "Paris: two million",
        "streamed": [CALLED],
        "agent": ANSWER,
    }


def test_an_agent_by_pydantic_ai(run: Run) -> None:
    found = run(agents, "pydantic_ai")
    assert {"function_tool_call", "function_tool_result", "final_result"} <= set(found.pop("events"))
    assert found == {
        "agent": ANSWER,
        "streamed": ANSWER,
        "agent, mended": ANSWER,
        "agent with a type": ANSWER,
        "responses": ANSWER,
        "prompted": CITY,
    }


def test_more_modes_of_instructor(run: Run) -> None:
    assert run(agents, "instructor") == {"JSON": CITY, "MD_JSON": CITY, "partial": CITY}


def test_an_agent_by_litellm(run: Run) -> None:
    found = run(agents, "litellm")
    for way in ("called", "streamed"):
        assert [[name, json.loads(arguments)] for name, arguments in found[way]] == [CALLED]
    assert found["answer"] == ANSWER


def test_it_is_the_interpreter_of_the_environment(python: Path) -> None:
    where = subprocess.run([python, "-c", "import langchain_openai as l; print(l.__file__)"],
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert where.startswith(str(python.parent.parent))
    assert str(python) != sys.executable
