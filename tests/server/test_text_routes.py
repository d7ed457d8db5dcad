"""/tokenize, /detokenize and /tokenizer_info, as vLLM answers them and lm-eval asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import CHAT_TEMPLATE, FakeRuntime, byte_tokenizer
from tests.server.test_generation import USER
from tests.server.test_refusals import error_of

Start = Callable[..., LiveServer]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "a<end>b"}, "a<end>b"),
        ({"prompt": "", "model": MODEL}, ""),
        ({"prompt": "ab", "add_special_tokens": False, "return_token_strs": False}, "ab"),
        ({"messages": [USER]}, "[user]Hi[assistant]"),
        ({"messages": [USER], "add_generation_prompt": False}, "[user]Hi"),
        (
            {"messages": [USER, {"role": "assistant", "content": "W"}], "continue_final_message": True},
            "[user]Hi[assistant]W",
        ),
        ({"messages": [USER], "chat_template_kwargs": {"mood": "calm"}}, "[user]Hi[assistant](calm)"),
    ],
)
def test_texts_and_conversations_as_token_ids(server: LiveServer, body: dict[str, Any], text: str) -> None:
    ids = server.runtime.tokenizer.encode(text)
    response = server.post("/tokenize", json=body)
    assert response.json() == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    assert server.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}


def test_tokens_as_strings(server: LiveServer) -> None:
    answer = server.post("/tokenize", json={"prompt": "a <end>", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["a", "Ġ", "<end>"]


def test_special_tokens_that_are_added(start: Start) -> None:
    server = start()
    asked: list[bool] = []
    tokenizer = server.runtime.tokenizer
    tokenizer.encode = lambda text, add_special_tokens=True: asked.append(add_special_tokens) or [1]  # type: ignore[method-assign,func-returns-value]
    for body in ({"prompt": "a"}, {"prompt": "a", "add_special_tokens": False}, {"messages": [USER]}):
        server.post("/tokenize", json=body)
    server.post("/tokenize", json={"messages": [USER], "add_special_tokens": True})
    assert asked == [True, False, False, True]


def test_more_than_fits_can_be_counted(server: LiveServer) -> None:
    assert server.post("/tokenize", json={"prompt": "x" * 5000}).json()["count"] == 5000


def test_ids_that_the_tokenizer_does_not_have_are_no_text(server: LiveServer) -> None:
    ids = [*server.runtime.tokenizer.encode("a"), 4000]
    assert server.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "a"}
    assert server.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": None, "messages": None}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [USER], "tools": [{}]}, "tools[0].type"),
        ("/tokenize", {"messages": [USER], "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [2**31]}, "tokens[0]"),
    ],
)
def test_what_is_refused(server: LiveServer, path: str, body: dict[str, Any], param: str) -> None:
    response = server.post(path, json=body)
    assert response.status_code == (404 if param == "model" else 400)
    assert error_of(response)["param"] == param


def test_what_lm_eval_asks_of_a_tokenizer(server: LiveServer) -> None:
    info = server.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("<end>", None, None)
    assert (info["chat_template"], info["vocab_size"]) == (CHAT_TEMPLATE, 257)
    assert info["model_max_length"] == 512
    assert server.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()[
        "tokens"
    ] == [256]


def test_a_model_that_cannot_chat_has_no_template_to_tell(start: Start) -> None:
    server = start(FakeRuntime(the_tokenizer=byte_tokenizer(chat_template=None)))
    assert server.get("/tokenizer_info").json()["chat_template"] is None
    assert server.post("/tokenize", json={"messages": [USER]}).status_code == 400
    assert server.post("/tokenize", json={"prompt": "a"}).status_code == 200


def test_a_model_without_a_tokenizer(start: Start) -> None:
    server = start(FakeRuntime(the_tokenizer=None))
    for response in (
        server.post("/tokenize", json={"prompt": "a"}),
        server.post("/detokenize", json={"tokens": [1]}),
        server.get("/tokenizer_info"),
    ):
        assert response.status_code == 400
        assert "this model has no tokenizer" in error_of(response)["message"]


def test_they_need_the_key_and_their_bodies_are_bounded(start: Start) -> None:
    server = start(api_key="secret")
    key = {"Authorization": "Bearer secret"}
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert server.post(path, json=body).status_code == 401
        assert server.post(path, json=body, headers=key).status_code == 200
        assert server.post(path, content=b"x" * (2 << 20), headers=key).status_code == 413
    assert server.get("/tokenizer_info").status_code == 401
    assert server.get("/tokenizer_info", headers=key).status_code == 200


def test_they_wait_until_it_is_ready_and_are_tokenised_apart(start: Start) -> None:
    server = start(FakeRuntime(state="starting"))
    assert server.post("/tokenize", json={"prompt": "a"}).status_code == 503
    server.runtime.become_ready()
    server.post("/tokenize", json={"prompt": "abc"})
    server.post("/detokenize", json={"tokens": [1, 2]})
    assert server.runtime.prepared_chars == [3, 2]


def test_the_prefix_cache_is_reset_by_who_has_the_key(server: LiveServer, start: Start) -> None:
    response = server.post("/reset_prefix_cache")
    assert (response.json(), server.runtime.num_resets) == ({"success": True}, 1)
    for asked in ({"reset_running_requests": "true"}, {"reset_external": "1"}, {"reset_external": "maybe"}):
        refused = server.post("/reset_prefix_cache", params=asked)
        assert error_of(refused)["param"] == next(iter(asked))
    guarded = start(api_key="secret")
    assert guarded.post("/reset_prefix_cache").status_code == 401
    guarded.runtime.state = "starting"
    headers = {"Authorization": "Bearer secret"}
    assert guarded.post("/reset_prefix_cache", headers=headers).status_code == 503
    assert (server.runtime.num_resets, guarded.runtime.num_resets) == (1, 0)
