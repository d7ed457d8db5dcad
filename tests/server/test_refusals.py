"""Whatever is wrong with a request: the right status, the OpenAI API's form, and words that help."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime, byte_tokenizer
from tpworker.errors import InvalidRequest, PromptTooLong

Start = Callable[..., LiveServer]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


def error_of(response: Any) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body: dict[str, Any] = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


UNSUPPORTED: list[tuple[str, object]] = [
    ("length_penalty", 1.5),
    ("thinking_token_budget", 5),
    ("use_beam_search", True),
    ("logits_processors", ["x"]),
    ("n", True),
]
ONLY_COMPLETIONS: list[tuple[str, object]] = [("suffix", "x")]
ONLY_CHAT: list[tuple[str, object]] = [
    ("best_of", 2),
    ("echo", True),
    ("functions", [{}]),
    ("modalities", ["audio"]),
    ("thinking", True),
    ("chat_template", "{{ 1 }}"),
]


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [(path, *case) for path in (COMPLETIONS, CHAT) for case in UNSUPPORTED]
    + [(COMPLETIONS, *case) for case in ONLY_COMPLETIONS]
    + [(CHAT, *case) for case in ONLY_CHAT],
)
def test_what_is_not_supported_is_refused_by_name(
    server: LiveServer, path: str, name: str, value: object
) -> None:
    body = {"prompt": "a"} if path == COMPLETIONS else {"messages": [USER]}
    response = server.post(path, json=body | {name: value})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, name)
    assert name in error["message"]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": []}, "prompt", "list of token ids"),
        ({"prompt": [1, "a"]}, "prompt", "list of token ids"),
        ({"prompt": [1, True]}, "prompt", "list of token ids"),
        ({"prompt": [[1], "a"]}, "prompt", "list of token ids"),
        ({"prompt": ["a"] * 3000}, "prompt", "2048"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [[1], []]}, "prompt", "empty"),
        ({"max_tokens": "5"}, "max_tokens", "'5'"),
        ({"max_tokens": 5.5}, "max_tokens", "5.5"),
        ({"max_tokens": -1}, "max_tokens", "an integer from 0 to 2**31 - 1"),
        ({"max_tokens": -3}, "max_tokens", "-3"),
        ({"max_tokens": 10**30}, "max_tokens", "max_tokens="),
        ({"temperature": -1}, "temperature", "from 0 to 100"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"temperature": True}, "temperature", "True"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": 1.5}, "top_p", "1.5"),
        ({"top_k": -7}, "top_k", "-7"),
        ({"min_tokens": 99, "max_tokens": 5}, "min_tokens", "at most max_tokens"),
        ({"seed": 2**63}, "seed", "64 bits"),
        ({"stop": 5}, "stop", "list"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": ["x"] * 99}, "stop", "at most 16"),
        ({"stop": ["x", 1]}, "stop[1]", "string"),
        ({"stop": "x" * 1025}, "stop[0]", "at most 1024 characters"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "token ids"),
        ({"ignore_eos": "yes"}, "ignore_eos", "'yes'"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "=1"),
        ({"stream": True, "stream_options": []}, "stream_options", "[]"),
        ({"model": 5}, "model", "string"),
        ({"prompt": "x" * 600}, "prompt", "the prompt has 600 tokens, but"),
    ],
)
def test_values_that_cannot_be(
    server: LiveServer, change: dict[str, Any], param: str | None, words: str
) -> None:
    response = server.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 4} | change)
    error = error_of(response)
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "missing"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [USER, {"role": "king", "content": "x"}]}, "messages[1].role", "'king'"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "'function'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "'image_url'",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]},
            "messages[0].tool_calls[0]",
            "",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "the first turn is the user's"),
        (
            {"messages": [USER], "max_tokens": 4, "max_completion_tokens": 5},
            "max_completion_tokens",
            "give one",
        ),
        ({"messages": [USER], "max_completion_tokens": -1}, "max_completion_tokens", "=-1"),
        ({"messages": [USER], "max_completion_tokens": 600}, "max_completion_tokens", "tokens is 600"),
        ({"messages": [USER], "max_tokens": 600}, "max_tokens", "max_tokens is 600"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "the prompt has 617 tokens"),
        *(
            ({"messages": [USER], "chat_template_kwargs": {name: value}}, "chat_template_kwargs", repr(name))
            for name, value in (
                ("messages", []), ("self", 1), ("tools", []), ("documents", []), ("tokenize", True),
                ("add_generation_prompt", False), ("chat_template", "x"), ("raise_exception", 1),
                ("no identifier", 1), ("", 1),
            )
        ),
        ({"messages": [USER], "chat_template_kwargs": {"x": 2**64}}, "chat_template_kwargs", "64 bits"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be(
    server: LiveServer, body: dict[str, Any], param: str, words: str
) -> None:
    response = server.post(CHAT, json=body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "words"),
    [
        (b'{"prompt": "a"', JSON, "not valid JSON: Expecting ',' delimiter at character 14"),
        (b"", JSON, "JSON object"),
        (b"[1]", JSON, "JSON object"),
        (b'"a"', JSON, "JSON object"),
        (b"null", JSON, "JSON object"),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, "Content-Type: application/json"),
        (b'{"prompt": "\xff"}', JSON, "UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", JSON, "nested"),
        (b'{"prompt": "a", "temperature": NaN}', JSON, "temperature"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", JSON, "temperature"),
        (b'{"prompt": "a\\ud83d"}', JSON, "surrogate"),
        (b'{"prompt": "a", "model": "\\ud83d"}', JSON, "not served here"),
    ],
)
def test_bodies_that_are_no_requests(
    server: LiveServer, content: bytes, headers: dict[str, str], words: str
) -> None:
    response = server.post(COMPLETIONS, content=content, headers=headers)
    assert response.status_code in (400, 404)
    assert words in error_of(response)["message"]
    assert server.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_half_a_character_in_a_conversation(server: LiveServer) -> None:
    content = b'{"messages": [{"role": "user", "content": "\\ud83d"}]}'
    response = server.post(CHAT, content=content, headers=JSON)
    assert (response.status_code, error_of(response)["param"]) == (400, "messages")


@pytest.mark.parametrize("in_chunks", [False, True], ids=["told at once", "a stream of chunks"])
def test_a_body_is_bounded_by_what_the_model_can_take(start: Start, in_chunks: bool) -> None:
    server = start(FakeRuntime(longest=1000))
    limit = (1 << 20) + 16 * 1000
    content: Any = iter([b"x" * 1000] * 2000) if in_chunks else b"x" * (limit + 1)
    response = server.post(COMPLETIONS, content=content, headers=JSON)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (413, "body_too_large")
    assert f"{limit} bytes (1048576, and 16 for each token of max_model_len)" in error["message"]
    body = b'{"prompt": "a", "max_tokens": 3}'
    assert server.post(COMPLETIONS, content=body.ljust(limit), headers=JSON).status_code == 200


def test_a_body_without_end_is_not_read_for_ever(start: Start) -> None:
    server = start()
    with socket.create_connection(server.address) as client:
        client.settimeout(10)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        client.sendall(b"x" * (9 << 20))
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", COMPLETIONS, 405), ("GET", "/", 404)]
)
def test_addresses_that_are_not_there(server: LiveServer, method: str, path: str, status: int) -> None:
    response = server.get(path)
    assert response.status_code == status
    assert path in error_of(response)["message"]


def test_an_unknown_model_is_not_found(server: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; 'fake-model' is"):
        server.openai.completions.create(model="gpt-4", prompt="a")
    assert server.get("/v1/models/gpt-4").status_code == 404
    assert server.openai.models.retrieve(MODEL).id == MODEL


def test_the_served_name_may_hold_a_slash(start: Start) -> None:
    server = start(served_model_names=("org/model",))
    assert [model.id for model in server.openai.models.list()] == ["org/model"]
    assert server.get("/v1/models/org/model").json()["max_model_len"] == 512
    assert server.post(COMPLETIONS, json={"prompt": "a", "model": "org/model"}).status_code == 200


def test_a_prompt_that_is_too_long_has_its_code(server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.completions.create(model=MODEL, prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"


def test_a_conversation_that_is_too_long_has_its_code_too(start: Start) -> None:
    server = start()

    def too_long(text: str, add_special_tokens: bool = True) -> list[int]:
        raise PromptTooLong("the prompt has 9 characters, which are 9 tokens at least", "prompt")

    server.runtime.encode = too_long  # type: ignore[method-assign]
    response = server.post(CHAT, json={"messages": [USER]})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "context_length_exceeded",
        "messages",
    )


def test_long_prompts_are_prepared_apart(server: LiveServer) -> None:
    """That what tokenises is told how much it is about."""
    server.runtime.prepared_chars.clear()
    parts = [{"type": "text", "text": "abc"}, {"type": "text", "text": "de"}]
    server.post(COMPLETIONS, json={"prompt": ["abcd", "efg"], "max_tokens": 1})
    server.post(COMPLETIONS, json={"prompt": [[1, 2], [3]], "max_tokens": 1})
    server.post(CHAT, json={"messages": [USER, {"role": "user", "content": parts}], "max_tokens": 1})
    assert server.runtime.prepared_chars == [7, 0, 2 + 5]


def test_one_bad_prompt_of_several_refuses_the_request(start: Start) -> None:
    server = start()
    tokenizer = server.runtime.tokenizer
    encode = tokenizer.encode

    def slow_if_long(text: str, add_special_tokens: bool = True) -> list[int]:
        time.sleep(0.2 if len(text) > 100 else 0)
        return encode(text, add_special_tokens)

    tokenizer.encode = slow_if_long  # type: ignore[method-assign]
    for stream in (False, True):
        response = server.post(COMPLETIONS, json={"prompt": ["a", "x" * 600], "stream": stream})
        assert response.status_code == 400
    server.wait_until(lambda: server.runtime.num_open == 0)


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, {"messages": [USER]}), (COMPLETIONS, {"prompt": ["a", "b"]})]
)
def test_nothing_is_tokenised_that_there_is_no_room_for(
    start: Start, path: str, body: dict[str, Any]
) -> None:
    server = start(FakeRuntime(max_queue=0))
    done: list[object] = []
    server.runtime.tokenizer.encode = lambda *what, **_: done.append(what) or [1]  # type: ignore[method-assign,func-returns-value]
    response = server.post(path, json=body)
    assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
    assert not done


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'a' * 3000000000 }}", "more than 512 MiB of memory, the limit: shorten the messages"),
        ("{{ 'a' * 40000000 }}", "more than 33554432 characters, the limit: shorten the messages"),
        ("{% for m in messages %}", "is broken: line 1: Unexpected end of template"),
        ("{{ messages[0].content / 2 }}", "fails on these messages: TypeError"),
    ],
)
def test_a_template_that_is_wrong_or_wants_too_much(start: Start, template: str, words: str) -> None:
    server = start(FakeRuntime(the_tokenizer=byte_tokenizer(template)))
    response = server.post(CHAT, json={"messages": [USER]})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "messages")
    assert words in error["message"]
    assert "Traceback" not in error["message"]


def test_a_model_without_a_chat_template(start: Start) -> None:
    server = start(FakeRuntime(the_tokenizer=byte_tokenizer(chat_template=None)))
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        server.openai.chat.completions.create(model=MODEL, messages=[USER])  # type: ignore[list-item]


def test_a_model_without_a_tokenizer(start: Start) -> None:
    server = start(FakeRuntime(the_tokenizer=None))
    for path, body, parameter, words in (
        (
            CHAT,
            {"messages": [USER]},
            "messages",
            "no tokenizer: use /v1/completions, with",
        ),
        (COMPLETIONS, {"prompt": "Hi"}, "prompt", "no tokenizer: give the prompt as a list of token ids"),
        (COMPLETIONS, {"prompt": ["Hi", "Ho"]}, "prompt", "give the prompt as a list of token ids"),
        (COMPLETIONS, {"prompt": [1], "stop": "x"}, "stop", "use stop_token_ids"),
    ):
        response = server.post(path, json=body)
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, parameter)
        assert words in error["message"]


# ------------------------------------------------------------------------------- the key


def test_the_api_key(start: Start) -> None:
    server = start(api_key="secret-ß")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        response = server.post(COMPLETIONS, json={"prompt": "a"}, headers=headers)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    assert server.get("/v1/models").status_code == 401
    assert server.get("/v1/nothing").status_code == 401
    for open_to_all in ("/health", "/ready", "/metrics"):
        assert server.get(open_to_all).status_code == 200
    for encoding in ("utf-8", "latin-1"):  # clients differ
        right = {"Authorization": "Bearer secret-ß".encode(encoding)}
        assert server.post(COMPLETIONS, json={"prompt": "a"}, headers=right).status_code == 200
    assert server.metric('tpworker_requests_total{outcome="invalid"}') == 3


def test_the_key_is_asked_for_before_the_body_is_looked_at(start: Start) -> None:
    server = start(api_key="secret")
    assert server.post(COMPLETIONS, content=b"{", headers=JSON).status_code == 401
    assert server.post(COMPLETIONS, content=b"x" * (2 << 20), headers=JSON).status_code == 401


def test_the_key_is_asked_for_wherever_the_app_is_mounted(start: Start) -> None:
    server = start(api_key="secret", mount="/llm")
    assert server.post("/llm/v1/completions", json={"prompt": "a"}).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert server.post("/llm/v1/completions", json={"prompt": "a"}, headers=headers).status_code == 200
    assert server.get("/llm/health").status_code == 200


# --------------------------------------------------------------------------------- bugs


def test_a_bug_is_500_and_tells_nothing(start: Start) -> None:
    def broken(prompt: str) -> str:
        raise ZeroDivisionError("the secret of the implementation")

    server = start(FakeRuntime(reply=broken))
    response = server.post(COMPLETIONS, json={"prompt": "a"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["code"] == "internal_error"
    assert server.metric('tpworker_requests_total{outcome="failed"}') == 1


def test_what_a_process_refuses_of_a_request_is_the_requests_fault(start: Start) -> None:
    async def refuse(position: int) -> None:
        raise InvalidRequest("logits_bias: no such token", "logits_bias")

    server = start(FakeRuntime(before=refuse))
    response = server.post(COMPLETIONS, json={"prompt": "a"})
    assert (response.status_code, error_of(response)["param"]) == (400, "logits_bias")
