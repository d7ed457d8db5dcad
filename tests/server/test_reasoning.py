"""What a model thinks before it answers: split off, told, counted, switched; and what comes behind it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import MODEL
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_refusals import CHAT, USER, error_of
from tests.server.test_tools import (
    BODY,
    PARIS,
    Start,
    calls_of,
    chunks,
    fake,
    gathered,
    hermes,
    parsed,
    whole,
)
from tpworker.structured_outputs import Thinking

THINKS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% endfor %}"
    "<|assistant|>\n{% if enable_thinking is defined and not enable_thinking %}<think></think>\n{% endif %}"
    "{% if tools %}{{ tools | length }}{% endif %}{# tool_calls #}"
)
OPENS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}<|assistant|><think>\n"
EFFORT = "{% for m in messages %}{{ m.content }}{% endfor %}({{ reasoning_effort }})<think>"
PLAIN = {"tools": None}


SAID = "<think>\nHm.\n</think>\n\nYes."


def thinker(reply: str = SAID, template: str = THINKS, **options: Any) -> FakeRuntime:
    return fake(reply, template, **options)


def both(server: Any, **body: Any) -> tuple[dict[str, Any], str]:
    """The message and why it ended, whole; a stream must say the same."""
    choice = whole(server, **PLAIN | body)["choices"][0]
    message, reason = gathered(chunks(server, **PLAIN | body))
    assert reason == choice["finish_reason"]
    assert message["content"] == (choice["message"]["content"] or "")
    for name in ("reasoning", "reasoning_content"):
        assert message.get(name) == choice["message"].get(name)
    return choice["message"], reason


def test_thinking_is_split_off(start: Start) -> None:
    message, reason = both(start(thinker()))
    assert message == {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "reasoning": "Hm.",
        "reasoning_content": "Hm.",
    }
    assert reason == "stop"


def test_thinking_that_the_prompt_has_begun(start: Start) -> None:
    message, _ = both(start(thinker("Hm.</think>Yes.", OPENS)))
    assert (message["reasoning"], message["content"]) == ("Hm.", "Yes.")


def test_who_does_not_think_answers_alone(start: Start) -> None:
    message, _ = both(start(thinker("Yes <think>.")))
    assert message == {"role": "assistant", "content": "Yes <think>.", "refusal": None}


def test_thinking_that_is_cut(start: Start) -> None:
    message, reason = both(start(thinker()), max_tokens=10)
    assert (message["content"], message["reasoning"], reason) == (None, "Hm", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client_has_it_beside_the_content(start: Start, stream: bool) -> None:
    client = start(thinker()).openai.chat.completions
    messages: Any = [USER]
    if not stream:
        message = client.create(model=MODEL, messages=messages).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")  # type: ignore[attr-defined]
        return
    deltas = [one.choices[0].delta for one in client.create(model=MODEL, messages=messages, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


@pytest.mark.parametrize(
    ("reply", "template", "added", "count"),
    [
        ("<think>Hm.</think>Yes.", THINKS, ["<think>", "</think>"], 5),
        ("Hm.</think>Yes.", OPENS, ["<think>", "</think>"], 4),
        ("Yes.", THINKS, ["<think>", "</think>"], 0),
        ("<think>Hm.", THINKS, ["<think>", "</think>"], 4),
        ("<think>Hm.</think>Yes.", THINKS, [], None),
    ],
)
def test_how_many_tokens_are_thinking(
    start: Start, reply: str, template: str, added: list[str], count: int | None
) -> None:
    server = start(thinker(reply, template, added=added))
    usage = whole(server, **PLAIN)["usage"]
    assert usage.get("completion_tokens_details") == (None if count is None else {"reasoning_tokens": count})
    assert chunks(server, **PLAIN, stream_options={"include_usage": True})[-1]["usage"] == usage


def test_special_tokens_as_marks(start: Start) -> None:
    marks = ["<think>", "</think>", "<pad>"]
    server = start(thinker("<think>Hm.<pad></think><pad>Yes.", special=marks))
    message, _ = both(server)
    assert (message["reasoning"], message["content"]) == ("Hm.", "Yes.")
    assert server.runtime.requests[-1][1].shown_special_tokens == ("</think>", "<think>")
    message, _ = both(server, separate_reasoning=False)
    assert message["content"] == "<think>Hm.</think>Yes."


def test_thinking_that_is_not_told(start: Start) -> None:
    server = start(thinker())
    message, _ = both(server, include_reasoning=False)
    assert message == {"role": "assistant", "content": "Yes.", "refusal": None}


def test_thinking_that_stays_in_the_content(start: Start) -> None:
    for server, body in (
        (start(thinker()), {"separate_reasoning": False}),
        (start(thinker(), reasoning_parser="none"), {}),
    ):
        message, _ = both(server, **body)
        assert message == {"role": "assistant", "content": SAID, "refusal": None}


def test_an_option_names_the_format(start: Start) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert "reasoning" not in both(start(thinker(template=template)))[0]
    server = start(
        thinker("<think>Hm.</think><response>Yes.</response>", template), reasoning_parser="ernie45"
    )
    message, _ = both(server)
    assert (message["reasoning"], message["content"].strip()) == ("Hm.", "Yes.")


def test_calls_behind_thinking(start: Start) -> None:
    text = f"<think>Shall I {hermes(('time', {}))}?</think>\n" + hermes(("weather", PARIS))
    server = start(thinker(text), tool_call_parser="hermes")
    message, reason = both(server, tools=BODY["tools"])
    assert parsed(calls_of(message)) == [("weather", PARIS)]
    assert (message["content"], reason) == (None, "tool_calls")
    assert "<tool_call>" in message["reasoning"]
    message, _ = both(server, tools=BODY["tools"], tool_choice="none")
    assert message["content"].strip() == hermes(("weather", PARIS))


@pytest.mark.parametrize(
    ("template", "body", "behind"),
    [
        (THINKS, {}, Thinking(start="<think>", end="</think>")),
        (OPENS, {}, Thinking(start="<think>", end="</think>", is_open=True)),
        (THINKS, {"enable_thinking": False}, None),
        (THINKS, {"separate_reasoning": False}, Thinking(start="<think>", end="</think>")),
        (THINKS, {"include_reasoning": False}, Thinking(start="<think>", end="</think>")),
    ],
)
@pytest.mark.parametrize("held", [{"guided_regex": "a"}, {"tools": BODY["tools"], "tool_choice": "required"}])
def test_what_is_held_comes_behind_thinking(
    start: Start, template: str, body: dict[str, Any], behind: Thinking | None, held: dict[str, Any]
) -> None:
    server = start(thinker(template=template), tool_call_parser="hermes")
    whole(server, **PLAIN | body | held)
    outputs = server.runtime.requests[-1][1].structured_outputs
    assert outputs is not None
    assert outputs.behind == behind


# ------------------------------------------------------------------------------ switches

OFF = "[user]Hi<|assistant|>\n<think></think>\n"
ON = "[user]Hi<|assistant|>\n"
OTHER_NAME = THINKS.replace("enable_thinking", "thinking")
HEADER = "X-Ignored-Parameters"


@pytest.mark.parametrize("template", [THINKS, OTHER_NAME])
@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({}, ON),
        ({"enable_thinking": None}, ON),
        ({"enable_thinking": True}, ON),
        ({"enable_thinking": False}, OFF),
        ({"reasoning_effort": "none"}, OFF),
        ({"reasoning_effort": "minimal"}, ON),
        ({"reasoning_effort": "high"}, ON),
        ({"chat_template_kwargs": {"enable_thinking": False}}, OFF),
        ({"chat_template_kwargs": {"thinking": False}}, OFF),
        ({"chat_template_kwargs": {"thinking": False}, "enable_thinking": False}, OFF),
    ],
)
def test_thinking_is_switched_where_the_template_knows_how(
    start: Start, template: str, body: dict[str, Any], prompt: str
) -> None:
    server = start(thinker("Yes.", template))
    response = server.post(CHAT, json={"messages": [USER], **body})
    assert (response.status_code, response.headers.get(HEADER)) == (200, None)
    assert server.runtime.requests[-1][0] == prompt


def test_effort_where_the_template_knows_it(start: Start) -> None:
    server = start(thinker("Yes.", EFFORT))
    for effort in ("low", "none", "xhigh"):
        assert server.post(CHAT, json={"messages": [USER], "reasoning_effort": effort}).status_code == 200
        assert server.runtime.requests[-1][0] == f"Hi({effort})<think>"


@pytest.mark.parametrize(
    ("template", "body", "ignored"),
    [
        ("{{ messages[0].content }}", {"reasoning_effort": "low"}, "reasoning_effort"),
        ("{{ messages[0].content }}", {"reasoning_effort": "none"}, None),
        ("{{ messages[0].content }}", {"enable_thinking": False}, None),
        ("{{ messages[0].content }}", {"enable_thinking": True}, "enable_thinking"),
        (OPENS, {"enable_thinking": False}, "enable_thinking"),
        (OPENS, {"reasoning_effort": "none"}, "reasoning_effort"),
    ],
)
def test_what_no_template_can_be_told_is_told_of_as_ignored(
    start: Start, template: str, body: dict[str, Any], ignored: str | None
) -> None:
    server = start(thinker("Yes.", template))
    response = server.post(CHAT, json={"messages": [USER], **body})
    assert (response.status_code, response.headers.get(HEADER)) == (200, ignored)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'huge'"),
        ({"enable_thinking": "no"}, "enable_thinking", "'no'"),
        ({"include_reasoning": 1}, "include_reasoning", "1"),
        ({"thinking": {"type": "disabled"}}, "thinking", "give enable_thinking"),
        (
            {"enable_thinking": True, "reasoning_effort": "none"},
            "reasoning_effort",
            "contradicts enable_thinking=True",
        ),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"thinking": False}},
            "enable_thinking",
            "contradicts enable_thinking=False",
        ),
    ],
)
def test_what_cannot_be(start: Start, body: dict[str, Any], param: str, words: str) -> None:
    response = start(thinker()).post(CHAT, json={"messages": [USER], **body})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_what_was_thought_goes_back_into_the_prompt(start: Start, name: str) -> None:
    server = start(thinker())
    said = {"role": "assistant", "content": "Yes.", name: "Hm."}
    assert server.post(CHAT, json={"messages": [USER, said, USER]}).status_code == 200
    prompt = "[user]Hi[assistant]<think>Hm.</think>Yes.[user]Hi<|assistant|>\n"
    assert server.runtime.requests[-1][0] == prompt
