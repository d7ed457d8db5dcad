"""What is answered where: the model, paths behind proxies, ids of requests, probes, and what is absent."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable

import httpx
import openai
import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_refusals import CHAT, COMPLETIONS, USER, error_of
from tpworker.server.seldom import seldom
from tpworker.version import version

Start = Callable[..., LiveServer]
ID = "X-Request-Id"


def test_a_model_may_have_several_names(start: Start) -> None:
    server = start(served_model_names=("first", "org/second"))
    models = server.openai.models.list().data
    assert [model.id for model in models] == ["first", "org/second"]
    assert {model.model_extra["root"] for model in models if model.model_extra} == {"fake-model"}
    assert server.openai.models.retrieve("org/second").id == "org/second"
    for name in ("first", "org/second"):
        assert server.openai.completions.create(model=name, prompt="a").model == "first"
    with pytest.raises(
        openai.NotFoundError, match="'fake-model' is not served here; 'first', 'org/second' are"
    ):
        server.openai.completions.create(model=MODEL, prompt="a")
    assert 'model="first"' in server.get("/metrics").text


# ---------------------------------------------------------------------- behind a proxy


@pytest.mark.parametrize("prefix", ["", "/llm"], ids=["stripped", "left on"])
def test_a_proxy_may_show_it_under_a_path(start: Start, prefix: str) -> None:
    server = start(root_path="/llm", api_key="secret")
    key = {"Authorization": "Bearer secret"}
    assert server.get(f"{prefix}/health").status_code == 200
    assert server.post(f"{prefix}{COMPLETIONS}", json={"prompt": "a"}).status_code == 401
    assert server.post(f"{prefix}{COMPLETIONS}", json={"prompt": "a"}, headers=key).status_code == 200
    assert server.post(f"{prefix}/tokenize", json={"prompt": "a"}).status_code == 401
    assert server.get(f"{prefix}/v1/models/{MODEL}", headers=key).status_code == 200
    assert server.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/llm"}]
    assert "url: '/llm/openapi.json'" in server.get(f"{prefix}/docs").text


@pytest.mark.parametrize("path", ["/llmv1/models", "/llm/llm/v1/models", "//v1/models", "/llm//v1/models"])
def test_no_path_goes_around_the_key(start: Start, path: str) -> None:
    server = start(root_path="/llm", api_key="secret")
    assert server.get(path).status_code in (401, 404)


# -------------------------------------------------------------------------- ids of requests


@pytest.mark.parametrize("request_id", ["a", "req_1/2+3=é".encode("ascii", "ignore").decode(), "x" * 128])
def test_the_clients_id_comes_back(server: LiveServer, request_id: str) -> None:
    for response in (
        server.post(COMPLETIONS, json={"prompt": "a"}, headers={ID: request_id}),
        server.post(COMPLETIONS, json={"prompt": "a", "stream": True}, headers={ID: request_id}),
        server.post(COMPLETIONS, json={"n": 2}, headers={ID: request_id}),
        server.get("/health", headers={ID: request_id}),
        server.get("/nothing", headers={ID: request_id}),
    ):
        assert response.headers.get_list(ID) == [request_id]


@pytest.mark.parametrize("request_id", [b"", b"a b", b"\xc3\xa9", b"x" * 129, b"a\tb"])
def test_an_id_that_is_none_is_replaced(server: LiveServer, request_id: bytes) -> None:
    first, second = (server.get("/health", headers={ID: request_id}).headers[ID] for _ in range(2))
    assert first.encode() != request_id
    assert (len(first), first.isalnum()) == (32, True)
    assert first != second


def test_each_answer_has_an_id_failures_and_refusals_included(start: Start) -> None:
    def broken(prompt: str) -> str:
        raise ZeroDivisionError

    server = start(FakeRuntime(reply=broken), api_key="secret")
    key = {"Authorization": "Bearer secret"}
    answers = [
        server.post(COMPLETIONS, json={"prompt": "a"}, headers=key),
        server.post(COMPLETIONS, json={"prompt": "a"}),
        server.post(COMPLETIONS, content=b"x" * (2 << 20), headers=key),
        server.get(COMPLETIONS, headers=key),
    ]
    assert [answer.status_code for answer in answers] == [500, 401, 413, 405]
    assert len({answer.headers[ID] for answer in answers}) == 4


def test_what_is_no_request_has_one_too(server: LiveServer) -> None:
    with socket.create_connection(server.address) as client:
        client.settimeout(10)
        client.sendall(b"NONSENSE\r\n\r\n")
        head = client.recv(1000)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert re.search(rb"(?i)\r\nx-request-id: [0-9a-f]{32}\r\n", head)


def test_the_log_says_which_request_it_is_about(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    def broken(prompt: str) -> str:
        raise ZeroDivisionError

    server = start(FakeRuntime(reply=broken))
    with seldom(), caplog.at_level(logging.ERROR):
        server.post(COMPLETIONS, json={"prompt": "a"}, headers={ID: "mine"})
        server.post(CHAT, json={"messages": [USER]}, headers={ID: "repeated"})
        server.call(lambda: None)  # it is logged behind the answer
    messages = [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"]
    assert messages == ["Exception in ASGI application (request mine)"], "and each is still said once"


def test_a_browser_may_read_the_id(start: Start) -> None:
    server = start(allowed_origins=("https://page.example",))
    response = server.get("/health", headers={"Origin": "https://page.example"})
    assert ID in response.headers["Access-Control-Expose-Headers"]
    assert ID in response.headers


# --------------------------------------------------------------------------------- probes


def test_probes_of_other_servers(start: Start) -> None:
    server = start(api_key="secret")
    assert server.get("/version").json() == {"version": version()}
    assert server.get("/load").json() == {"server_load": 0}
    for ask in (server.get, server.post):
        assert ask("/ping").status_code == 200
    server.call(server.runtime.fail)
    for ask in (server.get, server.post):
        response = ask("/ping")
        assert (response.status_code, response.json()["status"]) == (503, "failed")
        assert "secret details" not in response.text


def test_the_load_is_what_is_open(start: Start) -> None:
    server = start()
    server.runtime.num_open = 3
    assert server.get("/load").json() == {"server_load": 3}
    server.runtime.num_open = 0


# --------------------------------------------------------------------------- what is absent


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/embeddings", "no embeddings"),
        ("/v1/rerank", "no ranking"),
        ("/rerank", "no ranking"),
        ("/v1/audio/transcriptions", "no audio"),
        ("/v1/files", "no files"),
        ("/v1/fine_tuning/jobs", "does not train"),
        ("/v1/messages", "use /v1/chat/completions"),
    ],
)
def test_what_other_servers_answer_is_refused_by_name(server: LiveServer, path: str, words: str) -> None:
    for response in (server.post(path, json={"model": "m", "input": "a"}), server.get(path)):
        error = error_of(response)
        assert (response.status_code, error["code"]) == (404, "unsupported_endpoint")
        assert path in error["message"]
        assert words in error["message"]


def test_the_openai_client_shows_why(server: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError, match="generates text, and has no embeddings"):
        server.openai.embeddings.create(model="m", input="a")


@pytest.mark.parametrize("path", ["/v1/embedding", "/v1/embeddingsx", "/v1", "/v1/", "/x/v1/embeddings"])
def test_other_paths_are_just_not_there(server: LiveServer, path: str) -> None:
    response = httpx.get(f"{server.url}{path}")
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
