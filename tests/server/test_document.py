"""The OpenAPI document says what is true: statuses, content types, shapes of answers, bounds of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_generation import USER
from tests.server.test_refusals import CHAT, COMPLETIONS
from tpworker.config import RuntimeConfig
from tpworker.server import shapes
from tpworker.server.gate import GUARDED

Start = Callable[..., LiveServer]
Document = dict[str, Any]


@pytest.fixture(scope="module")
def document(server: LiveServer) -> Document:
    return dict(server.get("/openapi.json").json())


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def operations(document: Document) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_nothing_is_said_that_is_never_sent(document: Document) -> None:
    for path, method, operation in operations(document):
        assert not operation["responses"].keys() & {"422", "401"}, (path, method)
    assert not document["components"]["schemas"].keys() & {"HTTPValidationError", "ValidationError"}
    assert "securitySchemes" not in document["components"]


def test_the_key_is_told_of(start: Start) -> None:
    document = start(api_key="secret").get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, method, operation in operations(document):
        needs_it = path.startswith("/v1/") or path in GUARDED
        assert ("security" in operation) == needs_it, (path, method)
        assert ("401" in operation["responses"]) == needs_it, (path, method)


JSON = {"Content-Type": "application/json"}
SENT: list[tuple[str, str, int, dict[str, Any]]] = [
    ("post", COMPLETIONS, 200, {"json": {"prompt": "a"}}),
    ("post", COMPLETIONS, 200, {"json": {"prompt": "a", "stream": True}}),
    ("post", COMPLETIONS, 400, {"json": {}}),
    ("post", COMPLETIONS, 400, {"content": b"{", "headers": JSON}),
    ("post", COMPLETIONS, 404, {"json": {"prompt": "a", "model": "other"}}),
    ("post", COMPLETIONS, 413, {"content": b"x" * (2 << 20), "headers": JSON}),
    ("post", COMPLETIONS, 415, {"json": {}, "headers": {"Content-Encoding": "gzip"}}),
    ("post", CHAT, 200, {"json": {"messages": [USER]}}),
    ("post", CHAT, 400, {"json": {"messages": []}}),
    ("post", CHAT, 404, {"json": {"messages": [USER], "model": "other"}}),
    ("post", "/v1/responses", 200, {"json": {"input": "a"}}),
    ("post", "/v1/responses", 200, {"json": {"input": "a", "stream": True}}),
    ("post", "/v1/responses", 400, {"json": {}}),
    ("post", "/tokenize", 200, {"json": {"prompt": "a"}}),
    ("post", "/tokenize", 400, {"json": {}}),
    ("post", "/detokenize", 200, {"json": {"tokens": [1]}}),
    ("post", "/detokenize", 400, {"json": {"tokens": [-1]}}),
    ("get", "/tokenizer_info", 200, {}),
    ("post", "/reset_prefix_cache", 200, {}),
    ("post", "/reset_prefix_cache", 400, {"params": {"reset_external": "true"}}),
    ("get", "/top", 200, {}),
    ("get", "/model_info", 200, {}),
    ("get", "/server_info", 200, {}),
    ("get", "/get_load", 200, {}),
    ("get", "/v1/models", 200, {}),
    ("get", "/v1/models/{model}", 404, {}),
    ("get", "/health", 200, {}),
    ("get", "/ready", 200, {}),
    ("get", "/ping", 200, {}),
    ("post", "/ping", 200, {}),
    ("get", "/version", 200, {}),
    ("get", "/load", 200, {}),
    ("get", "/metrics", 200, {}),
]


@pytest.mark.parametrize(("method", "path", "status", "arguments"), SENT)
def test_what_is_sent_is_told(
    server: LiveServer, document: Document, method: str, path: str, status: int, arguments: dict[str, Any]
) -> None:
    response = getattr(server, method)(path, **arguments)
    assert response.status_code == status
    told = document["paths"][path][method]["responses"][str(status)]
    assert response.headers["content-type"].partition(";")[0] in told["content"]
    assert {name for name, header in told["headers"].items() if header["required"]} == {"X-Request-Id"}


@pytest.mark.parametrize(("state", "status"), [("starting", 503), ("failed", 503)])
def test_what_is_sent_before_and_after_is_told_too(
    start: Start, document: Document, state: Any, status: int
) -> None:
    server = start(FakeRuntime(state=state, error="tpworker-rank1 died"))
    for method, path, _, arguments in {(m, p): (m, p, s, a) for m, p, s, a in SENT if s == 200}.values():
        response = getattr(server, method)(path, **arguments)
        told = document["paths"][path][method]["responses"]
        assert str(response.status_code) in told, (path, state)
    assert server.get("/openapi.json").status_code == 200


def test_too_many_requests_and_bugs_are_told(start: Start, document: Document) -> None:
    def broken(prompt: str) -> str:
        raise ZeroDivisionError

    for runtime, status in ((FakeRuntime(max_queue=0), "429"), (FakeRuntime(reply=broken), "500")):
        server = start(runtime)
        for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [USER]})):
            assert str(server.post(path, json=body).status_code) == status
            assert status in document["paths"][path]["post"]["responses"]


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 1}, shapes.Completion),
        (COMPLETIONS, {"prompt": "a", "return_token_ids": True, "stop": "s"}, shapes.Completion),
        (COMPLETIONS, {"prompt": "a", "logprobs": 0, "n": 2, "max_tokens": 0}, shapes.Completion),
        (COMPLETIONS, {"prompt": "ab", "logprobs": 2, "echo": True, "best_of": 2}, shapes.Completion),
        (COMPLETIONS, {"prompt": "ab", "prompt_logprobs": 1, "return_token_ids": True}, shapes.Completion),
        (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 2, "n": 2}, shapes.ChatCompletion),
        (CHAT, {"messages": [USER], "prompt_logprobs": 0}, shapes.ChatCompletion),
        (CHAT, {"messages": [USER]}, shapes.ChatCompletion),
        (CHAT, {"messages": [USER], "tools": [TOOL]}, shapes.ChatCompletion),
        ("/v1/responses", {"input": "a"}, shapes.ResponseShape),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function", "name": "f"}]}, shapes.ResponseShape),
        (CHAT, {"messages": [USER], "return_token_ids": True}, shapes.ChatCompletion),
        ("/tokenize", {"prompt": "a"}, shapes.Tokens),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, shapes.Tokens),
        ("/detokenize", {"tokens": [1]}, shapes.Text),
        (COMPLETIONS, {"prompt": 5}, shapes.Error),
        (CHAT, {"n": 2}, shapes.Error),
        ("/v1/embeddings", {}, shapes.Error),
        ("/ping", {}, shapes.Probe),
        ("/v1/models", None, shapes.Models),
        ("/v1/models/fake-model", None, shapes.Model),
        ("/tokenizer_info", None, shapes.TokenizerInfo),
        ("/health", None, shapes.Probe),
        ("/version", None, shapes.Version),
        ("/load", None, shapes.Load),
        ("/model_info", None, shapes.ModelInfo),
        ("/server_info", None, shapes.ServerInfo),
    ],
)
def test_answers_have_the_shapes_that_are_told(
    server: LiveServer, path: str, body: dict[str, Any] | None, shape: Any
) -> None:
    response = server.get(path) if body is None else server.post(path, json=body)
    shape.model_validate_json(response.text)


def test_paths_that_are_for_other_methods_say_for_which(server: LiveServer) -> None:
    for path, allowed in (
        (COMPLETIONS, "POST"),
        ("/ping", "GET, HEAD, POST"),
        ("/v1/models", "GET, HEAD"),
        ("/metrics", "GET, HEAD"),
    ):
        response = httpx.request("DELETE", server.url + path)
        assert (response.status_code, response.headers["Allow"]) == (405, allowed)


# ---------------------------------------------------------------------------------- values


def properties_of(document: Document, path: str) -> dict[str, Any]:
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rpartition("/")[2]
    return dict(document["components"]["schemas"][name]["properties"])


BASES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a"},
    CHAT: {"messages": [USER]},
    "/v1/responses": {"input": "a"},
}


@pytest.mark.parametrize("path", BASES)
def test_the_bounds_that_are_told_are_those_that_hold(start: Start, document: Document, path: str) -> None:
    server = start(FakeRuntime(longest=2**31 + 100, configured=RuntimeConfig(scheduling_policy="priority")))
    base = BASES[path]
    num_bounds = 0
    for name, schema in properties_of(document, path).items():
        for bound, beyond in (("minimum", -1), ("maximum", 1)):
            if bound not in schema:
                continue
            num_bounds += 1
            room = {"max_tokens": 2**31 - 1} if name == "min_tokens" else {}
            if name == "top_logprobs":
                room = {"logprobs": True}
            at, past = schema[bound], schema[bound] + beyond
            assert server.post(path, json=base | room | {name: at}).status_code == 200, (name, at)
            response = server.post(path, json=base | room | {name: past})
            assert response.status_code == 400, (name, past)
            assert response.json()["error"]["param"] == name
    assert num_bounds >= 13
    excluded = (("top_p", 0), ("truncate_prompt_tokens", 0))
    assert all(server.post(path, json=base | {name: value}).status_code == 400 for name, value in excluded)


@pytest.mark.parametrize("path", BASES)
def test_what_is_not_supported_is_told_with_what_asks_for_nothing(
    server: LiveServer, document: Document, path: str
) -> None:
    base = BASES[path]
    told = {
        name: schema["enum"] for name, schema in properties_of(document, path).items() if "enum" in schema
    }
    own = {COMPLETIONS: "suffix", CHAT: "functions", "/v1/responses": "conversation"}
    assert {"length_penalty", "top_a", own[path]} <= told.keys()
    for choice in range(max(map(len, told.values()))):
        neutral = {name: values[min(choice, len(values) - 1)] for name, values in told.items()}
        response = server.post(path, json=base | neutral)
        assert response.status_code == 200, response.text
        assert "X-Ignored-Parameters" not in response.headers


def test_a_prompt_has_a_type_and_token_ids_end_with_the_vocabulary(server: LiveServer, start: Start) -> None:
    def prompt_of(document: Document) -> Any:
        return properties_of(document, COMPLETIONS)["prompt"]["anyOf"]

    text, ids, texts, lists = prompt_of(server.get("/openapi.json").json())
    assert (text["type"], texts["items"]["type"], lists["items"]["items"]) == (
        "string",
        "string",
        ids["items"],
    )
    assert (ids["items"]["type"], ids["items"]["maximum"]) == ("integer", 256)
    assert server.post(COMPLETIONS, json={"prompt": [256]}).status_code == 200
    assert server.post(COMPLETIONS, json={"prompt": [257]}).status_code == 400
    later = start(FakeRuntime(state="starting"))
    assert prompt_of(later.get("/openapi.json").json())[1]["items"]["maximum"] == 2**31 - 1
    later.runtime.become_ready()
    assert prompt_of(later.get("/openapi.json").json())[1]["items"]["maximum"] == 256
