"""What is thought, split from what is answered."""

from __future__ import annotations

import pytest

from tests.parsing.streams import FUNCTIONS, cuts, parsed
from tpworker.parsing import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    CallArguments,
    CallBegan,
    Content,
    Event,
    OutputParser,
    Reasoning,
)
from tpworker.structured_outputs import Thinking

CLOSED = Thinking(start="<think>", end="</think>")
OPEN = Thinking(start="<think>", end="</think>", is_open=True)
CALL = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
PING: list[Event] = [CallBegan(0, "ping"), CallArguments(0, "{}")]


@pytest.mark.parametrize(
    ("thinking", "text", "wanted"),
    [
        (CLOSED, "<think>\na\n\nb\n</think>\n\nc\n", [Reasoning("a\n\nb"), Content("c\n")]),
        (
            CLOSED,
            "\n \n<think>a</think>b",
            [Reasoning("a"), Content("b")],
        ),  # GLM-4.5 begins with a line break
        (CLOSED, "<think></think>b", [Content("b")]),
        (CLOSED, "<think>\n\n</think>\n\nb", [Content("b")]),
        (CLOSED, " a <think>b</think>", [Content(" a <think>b</think>")]),
        (CLOSED, "\n a</think>b", [Content("\n a</think>b")]),
        (CLOSED, "<thin", [Content("<thin")]),
        (CLOSED, "  \n", [Content("  \n")]),
        (CLOSED, "", []),
        (CLOSED, "<think> a \n", [Reasoning(" a \n")]),
        (CLOSED, "<think>a</thi", [Reasoning("a</thi")]),
        (CLOSED, "<think>a</think>b<think>c</think>", [Reasoning("a"), Content("b<think>c</think>")]),
        (OPEN, "\na\n</think>\nb", [Reasoning("a"), Content("b")]),
        (OPEN, "a\n", [Reasoning("a\n")]),
        (OPEN, "  a</think> b", [Reasoning("  a"), Content(" b")]),
        (OPEN, "</think>\n\nb", [Content("b")]),
        (OPEN, "<think>\na</think>b", [Reasoning("a"), Content("b")]),  # it writes the mark again
        (OPEN, "a < b\n\n<b></think>c", [Reasoning("a < b\n\n<b>"), Content("c")]),
    ],
)
def test_thinking(thinking: Thinking, text: str, wanted: list[Event]) -> None:
    for pieces in ([text], list(text), *cuts(text)):
        assert parsed(pieces, None, thinking=thinking) == wanted


def test_a_call_behind_it_is_a_call_and_one_within_it_is_thought() -> None:
    text = f"{CALL}</think>\n\n{CALL}"
    for pieces in ([text], *cuts(text)):
        assert parsed(pieces, TOOL_FORMATS["hermes"], thinking=OPEN) == [Reasoning(CALL), *PING]


def test_ernies_answer_is_between_marks_of_its_own() -> None:
    thinking = REASONING_FORMATS["ernie45"].thinking("<|im_start|>assistant\n<think>\n")
    for text, wanted in {
        "a\n</think>\n\n\n<response>\nb\n\nc\n</response>\n": [Reasoning("a"), Content("b\n\nc")],
        "a\n</think>\n\n\n<response>\nb\n</response>": [Reasoning("a"), Content("b")],
        "a\n</think>\n\nb <response>": [Reasoning("a"), Content("b <response>")],
        "a\n</think>\n<response>\nb\n": [Reasoning("a"), Content("b\n")],
        "a\n</think>\n<respo": [Reasoning("a"), Content("<respo")],
        f"a\n</think>\n\n\n{CALL}\n": [Reasoning("a"), *PING],
        f"a\n</think>\n\n\n<response>\nb\n</response>\n{CALL}\n": [Reasoning("a"), Content("b"), *PING],
    }.items():
        for pieces in ([text], *cuts(text)):
            assert parsed(pieces, TOOL_FORMATS["ernie45"], thinking=thinking) == wanted


def test_it_is_told_as_it_comes() -> None:
    parser = OutputParser(OPEN, TOOL_FORMATS["hermes"], FUNCTIONS)
    assert parser.feed("Let") == [Reasoning("Let")]
    assert parser.feed(" me\n") == [Reasoning(" me")]
    assert parser.feed("see </") == [Reasoning("\nsee ")]
    assert parser.feed("b") == [Reasoning("</b")]
    assert parser.feed("</think>\n") == []
    assert parser.feed("Hi") == [Content("Hi")]
    assert parser.num_calls == 0
    assert parser.finish() == []


TURNS = {
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n": False,
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n": True,
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n": None,
    # What users write is not what the assistant thinks.
    "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n": False,
    "<|im_start|>user\nWhat is </think><|im_end|>\n<|im_start|>assistant\n": False,
    "<|im_start|>user\nWhat is </think><|im_end|>\n<|im_start|>assistant\n<think>\n": True,
    # A turn that is continued.
    "<|im_start|>assistant\n<think>\nFirst I": True,
    "<|im_start|>assistant\n<think>\nFirst\n</think>\n\nThe": None,
    "[gMASK]<sop><|user|>\nHi<|assistant|>": False,
    "[gMASK]<sop><|user|>\nHi/nothink<|assistant|>\n<think></think>": None,
    "<|begin_of_sentence|>User: a <think>\nAssistant: ": False,
    "<|begin_of_sentence|>User: a\nAssistant: <think>\n": True,
    "<｜User｜>a<｜Assistant｜><think>\n": True,
    "[INST] a <think> b [/INST]": False,
    "[INST] a [/INST]<think>": True,
    "[INST] a [/INST]<think></think>\n": None,
    "": False,
}


@pytest.mark.parametrize("name", REASONING_FORMATS)
@pytest.mark.parametrize(("prompt", "is_open"), TURNS.items())
def test_whether_a_prompt_leaves_thinking_to_come(name: str, prompt: str, is_open: bool | None) -> None:
    thinking = REASONING_FORMATS[name].thinking(prompt)
    assert (None if thinking is None else thinking.is_open) == is_open
    if thinking is not None:
        assert (thinking.start, thinking.end) == ("<think>", "</think>")
        assert {thinking.start, thinking.end} <= REASONING_FORMATS[name].special
