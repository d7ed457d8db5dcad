"""What a request may ask for besides its text: token counts, token ids, stop strings in it, prompts cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime, byte_tokenizer
from tests.server.test_generation import USER, events_of
from tests.server.test_refusals import CHAT, COMPLETIONS, error_of

Start = Callable[..., LiveServer]
END = "<end>"


def body_of(path: str, **more: object) -> dict[str, Any]:
    return ({"messages": [USER]} if path == CHAT else {"prompt": "ab"}) | more


def text_of(answer: dict[str, Any]) -> str:
    (choice,) = answer["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert isinstance(text, str)
    return text


# -------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_continuous_usage(server: LiveServer, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = body_of(path, max_tokens=5, stream=True, stream_options=options)
    *events, last = events_of(server.post(path, json=body).text)
    num_prompt = 2 if path == COMPLETIONS else 19
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    assert {event["usage"]["prompt_tokens"] for event in events} == {num_prompt}
    assert (last["choices"], last["usage"]) == ([], events[-1]["usage"])


def test_continuous_usage_is_not_told_without_usage(server: LiveServer) -> None:
    body = body_of(COMPLETIONS, stream=True, stream_options={"continuous_usage_stats": True})
    assert not any("usage" in event for event in events_of(server.post(COMPLETIONS, json=body).text))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_usage_can_be_forced(start: Start, path: str, options: object) -> None:
    server = start(force_include_usage=True)
    body = body_of(path, max_tokens=5, stream=True, stream_options=options)
    *events, last = events_of(server.post(path, json=body).text)
    assert {event["usage"] for event in events} == {None}
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 5)


# ----------------------------------------------------------------------------- token ids


def test_token_ids_of_completions(server: LiveServer) -> None:
    ids = server.runtime.tokenizer.encode
    body = {"prompt": ["ab", "c"], "max_tokens": 3, "return_token_ids": True}
    first, second = server.post(COMPLETIONS, json=body).json()["choices"]
    assert (first["prompt_token_ids"], first["token_ids"]) == (ids("ab"), ids("You"))
    assert (second["prompt_token_ids"], second["token_ids"]) == (ids("c"), ids("You"))
    body = {"prompt": [1, 2], "return_token_ids": True, "truncate_prompt_tokens": 1}
    assert server.post(COMPLETIONS, json=body).json()["choices"][0]["prompt_token_ids"] == [2]
    assert "token_ids" not in server.post(COMPLETIONS, json={"prompt": "a"}).json()["choices"][0]


def test_token_ids_of_a_chat(server: LiveServer) -> None:
    answer = server.post(CHAT, json=body_of(CHAT, max_tokens=3, return_token_ids=True)).json()
    assert answer["prompt_token_ids"] == server.runtime.tokenizer.encode("[user]Hi[assistant]")
    assert answer["choices"][0]["token_ids"] == server.runtime.tokenizer.encode("You")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_streamed_token_ids_are_all_there_and_in_order(start: Start, path: str) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "né" + "x" * 5 + "STOP, and more"))
    ids = server.runtime.tokenizer.encode
    body = body_of(path, max_tokens=100, stream=True, return_token_ids=True, stop="STOP")
    first, *events = events_of(server.post(path, json=body).text)
    at = first if path == CHAT else first["choices"][0]
    assert at["prompt_token_ids"] == ids("ab" if path == COMPLETIONS else "[user]Hi[assistant]")
    told = [i for event in [first, *events] for i in event["choices"][0].get("token_ids", [])]
    assert told == ids("néxxxxxSTOP")
    assert not any(
        "prompt_token_ids" in event["choices"][0] or "prompt_token_ids" in event for event in events
    )


# ------------------------------------------------------------------------ what is in the text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_stop_string_in_the_text(start: Start, path: str) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "one two three"))
    for include, text in ((True, "one two"), (False, "one "), (None, "one ")):
        body = body_of(path, max_tokens=99, stop=["two"], include_stop_str_in_output=include)
        assert text_of(server.post(path, json=body).json()) == text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_special_tokens_in_the_text(start: Start, path: str) -> None:
    server = start(FakeRuntime(reply=lambda prompt: f"one{END}two"))
    for skip, text in ((True, "onetwo"), (False, f"one{END}two"), (None, "onetwo")):
        body = body_of(path, max_tokens=99, skip_special_tokens=skip)
        assert text_of(server.post(path, json=body).json()) == text


@pytest.mark.parametrize(
    ("name", "value"), [("skip_special_tokens", False), ("include_stop_str_in_output", True)]
)
def test_without_a_tokenizer_there_is_no_text_to_change(start: Start, name: str, value: bool) -> None:
    server = start(FakeRuntime(the_tokenizer=None))
    response = server.post(COMPLETIONS, json={"prompt": [1], name: value})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, name)
    assert "no tokenizer" in error["message"]
    assert server.post(COMPLETIONS, json={"prompt": [1], name: not value}).status_code == 200


# ---------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("prompt", "length", "seen"),
    [
        ("x" * 600 + "abc", 3, "abc"),
        ("abc", 7, "abc"),
        ([65, 66, 67], 2, "bc"),
        ("y" * 600, -1, "y" * (512 - 16)),
        (["x" * 600 + "abc", "d"], 3, "abc"),
    ],
)
def test_the_end_of_a_long_prompt(start: Start, prompt: Any, length: int, seen: str) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "x" * 50))
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        prompt = server.runtime.tokenizer.encode("abc")
    response = server.post(COMPLETIONS, json={"prompt": prompt, "truncate_prompt_tokens": length})
    assert response.status_code == 200, response.text
    assert server.runtime.requests[0][0] == seen


def test_the_end_of_a_long_conversation(start: Start) -> None:
    server = start()
    messages = [{"role": "user", "content": "x" * 600}]
    for length, limit, seen in (
        (11, None, "[assistant]"),
        (-1, 100, "x" * 401 + "[assistant]"),
        (-1, 0, "x" * 501 + "[assistant]"),
    ):
        body = {"messages": messages, "truncate_prompt_tokens": length, "max_completion_tokens": limit}
        assert server.post(CHAT, json=body).status_code == 200
        assert server.runtime.requests[-1][0] == seen


@pytest.mark.parametrize("length", [0, -2, "3", 1.5])
def test_lengths_that_cannot_be(server: LiveServer, length: object) -> None:
    response = server.post(COMPLETIONS, json={"prompt": "a", "truncate_prompt_tokens": length})
    assert (response.status_code, error_of(response)["param"]) == (400, "truncate_prompt_tokens")


def test_special_tokens_around_a_prompt(start: Start) -> None:
    server = start()
    asked: list[bool] = []  # of each prompt, and of each reply
    tokenizer = server.runtime.tokenizer
    encode = tokenizer.encode

    def spy(text: str, add_special_tokens: bool = True) -> list[int]:
        asked.append(add_special_tokens)
        return encode(text, add_special_tokens)

    tokenizer.encode = spy  # type: ignore[method-assign]
    for path, value in ((COMPLETIONS, None), (COMPLETIONS, False), (CHAT, None), (CHAT, True)):
        assert server.post(path, json=body_of(path, add_special_tokens=value)).status_code == 200
    assert asked[::2] == [True, False, False, True]


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({}, "[user]Hi[assistant]Well[assistant]"),
        ({"add_generation_prompt": False}, "[user]Hi[assistant]Well"),
        ({"continue_final_message": True}, "[user]Hi[assistant]Well"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "[user]Hi[assistant]Well"),
        (
            {"continue_final_message": False, "add_generation_prompt": True},
            "[user]Hi[assistant]Well[assistant]",
        ),
    ],
)
def test_where_the_prompt_of_a_chat_ends(server: LiveServer, options: dict[str, Any], prompt: str) -> None:
    messages = [USER, {"role": "assistant", "content": "Well"}]
    answer = server.post(CHAT, json={"messages": messages} | options).json()
    assert text_of(answer) == f"You said {prompt!r}."


def test_a_template_that_closes_the_turn_is_cut_where_the_message_ends(start: Start) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    server = start(FakeRuntime(the_tokenizer=byte_tokenizer(template)))
    messages = [USER, {"role": "assistant", "content": [{"type": "text", "text": "Well, "}]}]
    answer = server.post(CHAT, json={"messages": messages, "continue_final_message": True}).json()
    assert text_of(answer) == "You said '<user>Hi</><assistant>Well, '."


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"continue_final_message": True, "messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"continue_final_message": True, "messages": [{"role": "assistant"}]}, "messages"),
        ({"continue_final_message": 1}, "continue_final_message"),
    ],
)
def test_what_cannot_be_continued(server: LiveServer, options: dict[str, Any], param: str) -> None:
    response = server.post(CHAT, json={"messages": [USER]} | options)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_the_openai_client_takes_what_it_does_not_know(server: LiveServer) -> None:
    done = server.openai.completions.create(
        model=MODEL, prompt="ab", max_tokens=3, extra_body={"return_token_ids": True}
    )
    assert done.choices[0].model_extra is not None
    assert done.choices[0].model_extra["token_ids"] == server.runtime.tokenizer.encode("You")
