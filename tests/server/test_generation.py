"""What is generated, as the real openai client and a plain HTTP client see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime, byte_tokenizer

Start = Callable[..., LiveServer]
HARD = 'naïve 👩‍👩‍👧 e\u0301 你好 \u2028 \x85 "quoted" \\ \n end'
USER = {"role": "user", "content": "Hi"}


def events_of(text: str) -> list[Any]:
    """The events of a stream, parsed; the last must be [DONE]."""
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


# --------------------------------------------------------------------------- completions


def test_a_completion(server: LiveServer) -> None:
    done = server.openai.completions.create(model=MODEL, prompt="abcd", max_tokens=100)
    (choice,) = done.choices
    assert (choice.text, choice.index, choice.finish_reason) == ("You said 'abcd'.", 0, "stop")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (4, 16, 20)
    assert done.usage.prompt_tokens_details is not None
    assert done.usage.prompt_tokens_details.cached_tokens == 2
    assert (done.object, done.model) == ("text_completion", MODEL)
    assert done.id.startswith("cmpl-")


def test_a_streamed_completion(server: LiveServer) -> None:
    chunks = list(server.openai.completions.create(model=MODEL, prompt="abcd", max_tokens=100, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "You said 'abcd'."
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.usage for chunk in chunks} == {None}
    assert len({chunk.id for chunk in chunks}) == 1


def test_max_tokens_is_16_unless_given_as_the_openai_api_has_it(start: Start) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "x" * 50))
    done = server.openai.completions.create(model=MODEL, prompt="a")
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("x" * 16, "length")


def test_min_tokens_raises_the_16(start: Start) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "x" * 50))
    response = server.post("/v1/completions", json={"prompt": "a", "min_tokens": 20})
    assert (response.status_code, response.json()["usage"]["completion_tokens"]) == (200, 20)


def test_several_prompts_give_a_choice_each(server: LiveServer) -> None:
    done = server.openai.completions.create(model=MODEL, prompt=["a", "bb", "ccc"], max_tokens=100)
    assert [(c.index, c.text) for c in done.choices] == [
        (0, "You said 'a'."),
        (1, "You said 'bb'."),
        (2, "You said 'ccc'."),
    ]
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (6, 13 + 14 + 15)


def test_several_prompts_stream_at_once(server: LiveServer) -> None:
    texts = ["", "", ""]
    stream = server.openai.completions.create(
        model=MODEL, prompt=["a", "bb", "ccc"], max_tokens=100, stream=True
    )
    ended: list[int] = []
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ended.append(choice.index)
    assert texts == ["You said 'a'.", "You said 'bb'.", "You said 'ccc'."]
    assert sorted(ended) == [0, 1, 2]


def test_prompts_may_be_token_ids(server: LiveServer) -> None:
    ids = server.runtime.tokenizer.encode("abc")
    done = server.openai.completions.create(model=MODEL, prompt=ids, max_tokens=100)
    assert done.choices[0].text == "You said 'abc'."
    done = server.openai.completions.create(model=MODEL, prompt=[ids, ids[:1]], max_tokens=100)
    assert [choice.text for choice in done.choices] == ["You said 'abc'.", "You said 'a'."]


# ---------------------------------------------------------------------------------- chat


def test_a_chat(server: LiveServer) -> None:
    done = server.openai.chat.completions.create(model=MODEL, messages=[USER])  # type: ignore[list-item]
    (choice,) = done.choices
    assert choice.message.content == "You said '[user]Hi[assistant]'."
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert done.object == "chat.completion"
    assert done.id.startswith("chatcmpl-")


def test_a_streamed_chat_opens_with_the_role(server: LiveServer) -> None:
    stream = server.openai.chat.completions.create(model=MODEL, messages=[USER], stream=True)  # type: ignore[list-item]
    first, *rest = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert first.object == "chat.completion.chunk"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in rest) == "You said '[user]Hi[assistant]'."
    )
    assert rest[-1].choices[0].finish_reason == "stop"


def test_roles_and_parts_reach_the_template(server: LiveServer) -> None:
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "ok", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "go"},
    ]
    done = server.openai.chat.completions.create(model=MODEL, messages=messages)
    expected = "[system]be brief[user]one\ntwo[assistant]ok[user]go[assistant]"
    assert done.choices[0].message.content == f"You said {expected!r}."


@pytest.mark.parametrize("content", ["Hi", [{"type": "text", "text": "Hi"}]])
@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}", "Hi!"),
        (
            "{% for m in messages %}{% for c in m['content'] | selectattr('type','equalto','text') %}"
            "{{ c['text'] }}?{% endfor %}{% endfor %}",
            "Hi?",
        ),
    ],
    ids=["a string", "parts"],
)
def test_content_comes_as_the_template_wants_it(
    start: Start, template: str, prompt: str, content: object
) -> None:
    server = start(FakeRuntime(the_tokenizer=byte_tokenizer(template)))
    body = {"messages": [{"role": "user", "content": content}]}
    done = server.post("/v1/chat/completions", json=body).json()
    assert done["choices"][0]["message"]["content"] == f"You said {prompt!r}."


def test_variables_reach_the_template(server: LiveServer) -> None:
    done = server.openai.chat.completions.create(
        model=MODEL,
        messages=[USER],  # type: ignore[list-item]
        extra_body={"chat_template_kwargs": {"mood": "calm"}},
    )
    assert done.choices[0].message.content == "You said '[user]Hi[assistant](calm)'."


def test_a_chat_is_as_long_as_fits_unless_limited(start: Start) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "x" * 100))
    create = server.openai.chat.completions.create
    messages: Any = [USER]
    assert create(model=MODEL, messages=messages).choices[0].message.content == "x" * 100
    for limit in (
        {"max_tokens": 7},
        {"max_completion_tokens": 7},
        {"max_tokens": 7, "max_completion_tokens": 7},
    ):
        done = create(model=MODEL, messages=messages, **limit)
        assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("x" * 7, "length")


# ---------------------------------------------------------------------------------- both


@pytest.mark.parametrize("stream", [False, True])
def test_any_text_arrives_whole(start: Start, stream: bool) -> None:
    server = start(FakeRuntime(reply=lambda prompt: HARD))
    body = {"prompt": "a", "max_tokens": 200, "stream": stream}
    response = server.post("/v1/completions", json=body)
    if stream:
        # A client that splits lines as str.splitlines does, must not find one in the text.
        lines = [line for line in response.text.splitlines() if line]
        assert lines == [event for event in response.text.split("\n\n") if event]
        text = "".join(event["choices"][0]["text"] for event in events_of(response.text))
    else:
        text = response.json()["choices"][0]["text"]
    assert text == HARD


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(start: Start, stream: bool) -> None:
    server = start(FakeRuntime(reply=lambda prompt: "one two three"))
    body = {"prompt": "a", "stop": [" th", "never"], "stream": stream}
    response = server.post("/v1/completions", json=body)
    if stream:
        choices = [event["choices"][0] for event in events_of(response.text)]
        text, last = "".join(choice["text"] for choice in choices), choices[-1]
    else:
        last = response.json()["choices"][0]
        text = last["text"]
    assert (text, last["finish_reason"], last["stop_reason"]) == ("one two", "stop", " th")


def test_sampling_parameters_reach_the_runtime(start: Start) -> None:
    server = start()
    server.openai.completions.create(
        model=MODEL,
        prompt="a",
        max_tokens=9,
        temperature=0.5,
        top_p=0.25,
        seed=11,
        stop="END",
        extra_body={"top_k": 5, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [3, 4]},
    )
    (_, sampling, request_id) = server.runtime.requests[0]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (9, 0.5, 0.25, 11)
    assert (sampling.stop, sampling.top_k, sampling.min_tokens) == (("END",), 5, 2)
    assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, (3, 4))
    assert request_id is not None
    assert request_id.startswith("cmpl-")


def test_what_is_not_given_is_left_to_the_model(start: Start) -> None:
    server = start()
    body = {"prompt": "a", "temperature": None, "stop": None, "seed": None, "stream": None, "top_k": None}
    assert server.post("/v1/completions", json=body).status_code == 200
    (_, sampling, _) = server.runtime.requests[0]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (None, None, None, None)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_comes_last_when_asked_for(server: LiveServer, path: str) -> None:
    body = {"prompt": ["ab", "abcd"]} if "chat" not in path else {"messages": [USER]}
    options = {"max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
    *events, last = events_of(server.post(path, json=body | options).text)
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    expected = (6, 14 + 16) if "prompt" in body else (19, 20)
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == expected
    assert last["usage"]["total_tokens"] == sum(expected)


def test_neutral_and_harmless_parameters_are_accepted(server: LiveServer) -> None:
    body = {
        "prompt": "a",
        "n": 1,
        "best_of": 1,
        "echo": False,
        "logprobs": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "user": "me",
        "repetition_penalty": 1.0,
    }
    assert server.post("/v1/completions", json=body).status_code == 200
    chat = {
        "messages": [USER],
        "n": 1,
        "logprobs": False,
        "top_logprobs": 0,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": False,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "stream": True,
        "stream_options": {"include_obfuscation": False},
    }
    assert server.post("/v1/chat/completions", json=chat).status_code == 200


def test_tokenising_and_templates_do_not_run_on_the_event_loop(start: Start) -> None:
    server = start()
    tokenizer = server.runtime.tokenizer
    rendered_in = set()
    original = tokenizer.apply_chat_template

    def spy(*arguments: Any, **options: Any) -> str:
        try:
            asyncio.get_running_loop()
            rendered_in.add("loop")
        except RuntimeError:
            rendered_in.add("thread")
        return original(*arguments, **options)

    tokenizer.apply_chat_template = spy  # type: ignore[method-assign]
    assert server.post("/v1/chat/completions", json={"messages": [USER]}).status_code == 200
    assert rendered_in == {"thread"}


# -------------------------------------------------------------------------- concurrency


def test_tokens_are_sent_as_they_come(start: Start) -> None:
    gates = [asyncio.Event() for _ in range(3)]

    async def before(position: int) -> None:
        await gates[position].wait()

    server = start(FakeRuntime(reply=lambda prompt: "abc", before=before))
    body = {"prompt": "a", "stream": True}
    server.call(gates[0].set)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=10) as response:
        chunks = response.iter_raw()
        for position, letter in enumerate("abc"):
            # Nothing of what follows exists yet: this must have been sent.
            text = next(chunks).decode()
            assert json.loads(text.split("\n\n")[0].removeprefix("data: "))["choices"][0]["text"] == letter
            if position < 2:
                server.call(gates[position + 1].set)


def test_what_is_there_at_once_is_sent_at_once(server: LiveServer) -> None:
    body = {"prompt": ["a", "b", "c"], "max_tokens": 10, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=10) as response:
        assert sum(1 for _ in response.iter_raw()) <= 12  # of 30 tokens


async def ask(server: LiveServer, number: int, stream: bool) -> str:
    async with server.async_openai as client:
        if not stream:
            done = await client.completions.create(model=MODEL, prompt=f"number {number}", max_tokens=100)
            return done.choices[0].text
        text = ""
        async for chunk in await client.completions.create(
            model=MODEL, prompt=f"number {number}", max_tokens=100, stream=True
        ):
            text += chunk.choices[0].text
        return text


def test_many_at_once_get_their_own(server: LiveServer) -> None:
    async def run() -> list[str]:
        return await asyncio.gather(*(ask(server, number, number % 2 == 0) for number in range(24)))

    assert asyncio.run(run()) == [f"You said 'number {number}'." for number in range(24)]


def test_two_servers_in_one_process_do_not_meet(start: Start) -> None:
    first, second = start(served_model_names=("first",)), start(served_model_names=("second",))
    first.post("/v1/completions", json={"prompt": "a"})
    assert first.metric('tpworker_requests_total{outcome="ok"}') == 1
    assert second.metric('tpworker_requests_total{outcome="ok"}') == 0
    assert second.get("/v1/models").json()["data"][0]["id"] == "second"


def test_without_a_tokenizer_token_ids_go_in_and_are_counted(start: Start) -> None:
    server = start(FakeRuntime(lambda prompt: "abc", the_tokenizer=None))
    for prompt, num_choices in (([65, 66], 1), ([[65, 66], [67]], 2)):
        body = server.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2}).json()
        assert [choice["text"] for choice in body["choices"]] == [""] * num_choices
        assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
        assert body["usage"]["completion_tokens"] == 2 * num_choices
    streamed = server.post("/v1/completions", json={"prompt": [65], "max_tokens": 2, "stream": True}).text
    assert '"finish_reason":"length"' in streamed.replace(" ", "")
