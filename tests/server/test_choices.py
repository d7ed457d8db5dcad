"""Several choices of one request, the best of several, and what is asked of every token's logits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime, byte_tokenizer, fake_logprob
from tests.server.test_features import body_of
from tests.server.test_generation import USER, events_of
from tests.server.test_refusals import CHAT, COMPLETIONS, error_of
from tpworker.config import RuntimeConfig

Start = Callable[..., LiveServer]


def said(prompt: str, index: int) -> str:
    """What the fake says as one of its choices."""
    return f"You said {prompt!r}." + (f"+{index}" if index else "")


def parts_of(chunks: Iterable[Any]) -> dict[int, list[Any]]:
    """The choices of the chunks of a stream, by index."""
    parts: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            parts.setdefault(choice.index, []).append(choice)
    return parts


# ----------------------------------------------------------------------------- n


def test_choices_of_a_completion(server: LiveServer) -> None:
    done = server.openai.completions.create(model=MODEL, prompt="abcd", n=3, max_tokens=17)
    assert [(c.index, c.text, c.finish_reason) for c in done.choices] == [
        (0, "You said 'abcd'.", "stop"),
        (1, "You said 'abcd'.+", "length"),
        (2, "You said 'abcd'.+", "length"),
    ]
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (4, 16 + 17 + 17)
    assert done.usage.prompt_tokens_details is not None
    assert done.usage.prompt_tokens_details.cached_tokens == 2


def test_choices_of_a_chat(server: LiveServer) -> None:
    done = server.openai.chat.completions.create(model=MODEL, messages=[USER], n=2)  # type: ignore[list-item]
    prompt = "[user]Hi[assistant]"
    assert [(c.index, c.message.content) for c in done.choices] == [
        (0, said(prompt, 0)),
        (1, said(prompt, 1)),
    ]
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(prompt)
    assert done.usage.completion_tokens == len(said(prompt, 0)) + len(said(prompt, 1))


def test_several_prompts_of_several_choices(server: LiveServer) -> None:
    """As OpenAI's API orders them: the choices of the first prompt come first."""
    prompts = ["a", "bb", "ccc"]
    done = server.openai.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=40)
    assert [choice.index for choice in done.choices] == list(range(6))
    assert [choice.text for choice in done.choices] == [said(p, i) for p in prompts for i in range(2)]
    assert done.usage is not None
    assert done.usage.prompt_tokens == 1 + 2 + 3
    streamed = server.openai.completions.create(
        model=MODEL, prompt=prompts, n=2, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = streamed
    texts = {index: "".join(part.text for part in parts) for index, parts in parts_of(chunks).items()}
    assert [texts[index] for index in range(6)] == [choice.text for choice in done.choices]
    assert last.usage == done.usage


def test_choices_of_a_chat_in_a_stream(server: LiveServer) -> None:
    *chunks, last = server.openai.chat.completions.create(
        model=MODEL, messages=[USER], n=3, stream=True, stream_options={"include_usage": True}  # type: ignore[list-item]
    )  # fmt: skip
    parts = parts_of(chunks)
    assert sorted(parts) == [0, 1, 2]
    for index, of_choice in parts.items():
        assert [part.delta.role for part in of_choice] == ["assistant"] + [None] * (len(of_choice) - 1)
        text = "".join(part.delta.content or "" for part in of_choice)
        assert text == said("[user]Hi[assistant]", index)
        assert [part.finish_reason for part in of_choice] == [None] * (len(of_choice) - 1) + ["stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == 19


def test_the_whole_and_the_stream_have_the_openai_clients_types(server: LiveServer) -> None:
    for path, kind in ((COMPLETIONS, Completion), (CHAT, ChatCompletion)):
        body = body_of(path, n=2, logprobs=True if path == CHAT else 2, max_tokens=5, return_token_ids=True)
        kind.model_validate(server.post(path, json=body).json(), strict=True)
        chunk = ChatCompletionChunk if path == CHAT else Completion
        for event in events_of(server.post(path, json=body | {"stream": True}).text):
            if path == COMPLETIONS:  # its type of a chunk is that of the whole, whose reason cannot be null
                event["choices"][0]["finish_reason"] = event["choices"][0]["finish_reason"] or "stop"
            chunk.model_validate(event, strict=True)


def test_continuous_usage_counts_the_prompt_once(server: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = body_of(COMPLETIONS, n=3, max_tokens=5, stream=True, stream_options=options)
    events = events_of(server.post(COMPLETIONS, json=body).text)
    assert {event["usage"]["prompt_tokens"] for event in events} == {2}
    assert events[-1]["usage"]["completion_tokens"] == 15


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("n", "words"), [(0, "n=0"), (129, "from 1 to 128"), (1.5, "n=1.5"), ("2", "n='2'")])
def test_numbers_of_choices_that_cannot_be(server: LiveServer, path: str, n: object, words: str) -> None:
    response = server.post(path, json=body_of(path, n=n))
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "n")
    assert words in error["message"]
    assert server.post(path, json=body_of(path, n=None)).status_code == 200


# ------------------------------------------------------------------------ best of several


def test_the_best_of_several(start: Start) -> None:
    """The fake's choice 0 ends with "z"s; choice 1 adds "+1", whose tokens are likelier, choice 2 "+2"."""
    server = start(FakeRuntime(reply=lambda prompt: "zz" if prompt == "p" else "!"))
    body = {"prompt": ["p", "q"], "best_of": 3, "n": 2, "max_tokens": 9}
    answer = server.post(COMPLETIONS, json=body).json()
    done = Completion.model_validate(answer)
    assert [(choice.index, choice.text) for choice in done.choices] == [
        (0, "zz+1"),
        (1, "zz+2"),
        (2, "!"),
        (3, "!+1"),
    ]
    assert [choice.logprobs for choice in done.choices] == [None] * 4
    assert done.usage is not None
    assert done.usage.prompt_tokens == 2
    assert done.usage.completion_tokens == (2 + 4 + 4) + (1 + 3 + 3)  # what is not told, is counted
    assert server.runtime.prepared_counts == [6]


def test_the_best_tells_logprobs_if_they_are_asked_for(start: Start) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "zz"))
    done = server.openai.completions.create(model=MODEL, prompt="p", best_of=2, logprobs=1)
    (choice,) = done.choices
    assert (choice.index, choice.text) == (0, "zz+1")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["z", "z", "+", "1"]
    equal = server.openai.completions.create(model=MODEL, prompt="p", best_of=2, n=2)
    assert [choice.text for choice in equal.choices] == ["zz", "zz+1"], "as they are: none is left out"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"best_of": 2, "n": 3}, "at least n (3)"),
        ({"best_of": 0}, "best_of=0"),
        ({"best_of": 129}, "best_of=129: must be an integer from 1 to 128"),
        ({"best_of": 2, "stream": True}, "leave out stream"),
        ({"best_of": "2"}, "best_of='2'"),
    ],
)
def test_best_of_that_cannot_be(server: LiveServer, change: dict[str, Any], words: str) -> None:
    response = server.post(COMPLETIONS, json={"prompt": "a"} | change)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "best_of")
    assert words in error["message"]


def test_as_many_as_are_told_may_stream(server: LiveServer) -> None:
    body = {"prompt": "a", "best_of": 2, "n": 2, "stream": True}
    assert {e["choices"][0]["index"] for e in events_of(server.post(COMPLETIONS, json=body).text)} == {0, 1}


# ---------------------------------------------------------------- room, and leaving


@pytest.mark.parametrize(
    ("path", "change", "num_requests"),
    [(COMPLETIONS, {"prompt": ["a", "b"], "n": 3}, 6), (CHAT, {"n": 4}, 4), (COMPLETIONS, {"n": 5}, 5)],
)
def test_each_choice_takes_a_place(
    start: Start, path: str, change: dict[str, Any], num_requests: int
) -> None:
    full = start(FakeRuntime(max_queue=num_requests - 1))
    assert full.post(path, json=body_of(path, **change)).status_code == 429
    assert full.runtime.requests == []
    server = start(FakeRuntime(max_queue=num_requests))
    assert server.post(path, json=body_of(path, **change)).status_code == 200
    assert server.runtime.prepared_counts in ([num_requests], [])  # one prompt as text is not prepared
    assert {sampling.n for _, sampling, _ in server.runtime.requests} == {change["n"]}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_takes_all_choices_along(start: Start, path: str, stream: bool) -> None:
    async def wait(position: int) -> None:
        if position:
            await asyncio.Event().wait()

    server = start(FakeRuntime(before=wait))
    many = {"prompt": ["a", "b"]} if path == COMPLETIONS else {}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + path, json=body_of(path, n=4, stream=stream, **many), timeout=0.5)
    server.wait_until(lambda: server.runtime.num_open == 0)
    assert len(server.runtime.aborted) == (1 if path == CHAT else 2)


def test_a_drain_waits_for_every_choice(start: Start) -> None:
    gate = threading.Event()

    async def wait(position: int) -> None:
        while not gate.is_set():
            await asyncio.sleep(0.005)

    server = start(FakeRuntime(before=wait))
    answers: list[Any] = []
    body = {"prompt": "a", "n": 3}
    client = threading.Thread(target=lambda: answers.append(server.post(COMPLETIONS, json=body)))
    client.start()
    server.wait_until(lambda: server.runtime.num_open == 3)
    draining = asyncio.run_coroutine_threadsafe(server.runtime.drain(10), server._loop.result(10))
    server.wait_until(lambda: server.runtime.state == "draining")
    assert server.post(COMPLETIONS, json=body).status_code == 503
    gate.set()
    draining.result(10)
    client.join()
    assert [choice["index"] for choice in answers[0].json()["choices"]] == [0, 1, 2]


def test_a_failure_of_one_choice_ends_the_answer(start: Start) -> None:
    server = start(FakeRuntime(abort_at=2))
    response = server.post(COMPLETIONS, json={"prompt": "a", "n": 3})
    assert response.status_code == 503
    assert "send it again" in error_of(response)["message"]
    assert server.runtime.num_open == 0


# -------------------------------------------------------------- what is asked of logits


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_rules_reach_the_runtime(start: Start, path: str) -> None:
    server = start(FakeRuntime(configured=RuntimeConfig(scheduling_policy="priority")))
    asked = {
        "logit_bias": {"5": 100, "7": -0.5, "9": 3.0},
        "min_p": 0.25,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.5,
        "bad_words": ["bad", "worse"],
        "allowed_token_ids": [5, 6.0],
        "priority": -3,
        "cache_salt": "of one tenant",
    }
    assert server.post(path, json=body_of(path, **asked)).status_code == 200
    nothing = dict.fromkeys(asked)
    assert server.post(path, json=body_of(path, **nothing)).status_code == 200
    (_, sampling, _), (_, plain, _) = server.runtime.requests
    assert dict(sampling.logit_bias) == {5: 100, 7: -0.5, 9: 3.0}
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -2, 0.5)
    assert (sampling.repetition_penalty, sampling.bad_words) == (1.5, ("bad", "worse"))
    assert (sampling.allowed_token_ids, sampling.priority) == ((5, 6), -3)
    assert sampling.cache_salt == "of one tenant"
    assert (dict(plain.logit_bias), plain.allowed_token_ids, plain.bad_words) == ({}, None, ())
    assert (plain.min_p, plain.repetition_penalty, plain.presence_penalty) == (None, None, 0)
    assert (plain.priority, plain.cache_salt) == (0, None)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("logit_bias", {"a": 1}, "'a' is no token id"),
        ("logit_bias", {"1.5": 1}, "'1.5' is no token id"),
        ("logit_bias", {"-1": 1}, "'-1' is no token id"),
        ("logit_bias", {"²": 1}, "is no token id"),
        ("logit_bias", {"": 1}, "'' is no token id"),
        ("logit_bias", {"9" * 5000: 1}, "is no token id"),
        ("logit_bias", {"257": 1}, "holds 257; the model's vocabulary has 0 to 256"),
        ("logit_bias", {"5": 101}, "from -100 to 100"),
        ("logit_bias", {str(token): 1 for token in range(1025)}, "at most 1024"),
        ("logit_bias", [], "it should be"),
        ("min_p", 1.5, "from 0 to 1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("presence_penalty", 2.5, "from -2 to 2"),
        ("frequency_penalty", -2.5, "from -2 to 2"),
        ("repetition_penalty", 0, "from 0.01 to 100"),
        ("priority", 3, "--scheduling-policy priority"),
        ("cache_salt", "", "1 to 256 characters"),
        ("cache_salt", "x" * 257, "1 to 256 characters"),
        ("bad_words", [""], "1 to 128 characters"),
        ("bad_words", "bad", "it should be"),
        ("allowed_token_ids", [], "at least one token id"),
        ("allowed_token_ids", [257], "vocabulary has 0 to 256"),
    ],
)
def test_rules_that_cannot_be(server: LiveServer, path: str, name: str, value: object, words: str) -> None:
    response = server.post(path, json=body_of(path, **{name: value}))
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, name)
    assert words in error["message"]
    assert len(error["message"]) < 500


def test_one_entry_that_is_wrong_is_named(server: LiveServer) -> None:
    for name, value, param in (
        ("logit_bias", {"5": "a lot"}, "logit_bias"),
        ("allowed_token_ids", [1, "2"], "allowed_token_ids[1]"),
        ("bad_words", ["a", 2], "bad_words[1]"),
    ):
        error = error_of(server.post(COMPLETIONS, json={"prompt": "a", name: value}))
        assert error["param"].startswith(param), error


def test_words_need_a_tokenizer(start: Start) -> None:
    server = start(FakeRuntime(the_tokenizer=None))
    response = server.post(COMPLETIONS, json={"prompt": [1, 2], "bad_words": ["a"]})
    assert (response.status_code, error_of(response)["param"]) == (400, "bad_words")


def test_the_fakes_choices_are_as_likely_as_is_said() -> None:
    """What `test_the_best_of_several` stands on."""
    plus, z = (byte_tokenizer().encode(text)[0] for text in "+z")
    assert fake_logprob(plus) > fake_logprob(z)
