"""What models get wrong: nothing is lost, nothing is an error."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parsing.streams import FUNCTIONS, MARKS, calls, content, cuts, parsed
from tpworker.parsing import REASONING_FORMATS, TOOL_FORMATS, Content, OutputParser, Reasoning
from tpworker.structured_outputs import Thinking

HERMES: list[tuple[str, list[tuple[str, str]], str]] = [
    # No name can be read: the text as it stands.
    ("<tool_call>oops</tool_call> x", [], "<tool_call>oops</tool_call> x"),
    ("a\n<tool_call>\n</tool_call>\nb", [], "a\n<tool_call>\n</tool_call>\nb"),
    ('<tool_call>{"arguments": {}}</tool_call>', [], '<tool_call>{"arguments": {}}</tool_call>'),
    ('<tool_call>{"name": 5}</tool_call>', [], '<tool_call>{"name": 5}</tool_call>'),
    ('<tool_call>{"name": ""}</tool_call>', [], '<tool_call>{"name": ""}</tool_call>'),
    ('<tool_call>{"name" "ping"}</tool_call>', [], '<tool_call>{"name" "ping"}</tool_call>'),
    ('<tool_call>[{"name": "ping"}]</tool_call>', [], '<tool_call>[{"name": "ping"}]</tool_call>'),
    ("</tool_call>", [], "</tool_call>"),
    ("<tool_call>", [], "<tool_call>"),
    ('<tool_call>\n{"arguments": {"a": 1}, "na', [], '<tool_call>\n{"arguments": {"a": 1}, "na'),
    # A call that follows one that is none.
    ('<tool_call>\n<tool_call>\n{"name": "ping"}\n</tool_call>', [("ping", "{}")], "<tool_call>"),
    # Arguments that are none, are left out, come first, or are JSON in a string.
    ('<tool_call>{"name": "ping"}</tool_call>', [("ping", "{}")], ""),
    ('<tool_call>{"name": "ping", "arguments": null}</tool_call>', [("ping", "{}")], ""),
    ('<tool_call>{"name": "ping", "arguments": ""}</tool_call>', [("ping", "{}")], ""),
    ('<tool_call>{"name": "ping", "parameters": {"a": 1}}</tool_call>', [("ping", '{"a": 1}')], ""),
    ('<tool_call>{"arguments": {"a": {}}, "name": "ping"}</tool_call>', [("ping", '{"a": {}}')], ""),
    (
        '<tool_call>{"id": [1, "}"], "name": "p\\u0069ng", '
        '"arguments": "{\\"a\\": \\"\\\\n\\u00e9\\"}"}</tool_call>',
        [("ping", '{"a": "\\né"}')],
        "",
    ),
    (
        '<tool_call>{"name": "x", '
        '"arguments": "\\ud83d\\ude00 \\ud83d \\ude00 \\ud83d\\n \\u12 \\ud83d\\u00z"}</tool_call>',
        [("x", "😀 \ufffd \ufffd \ufffd\n \\u12 \ufffd\\u00z")],
        "",
    ),
    ('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', [("\ufffd", "{}")], ""),
    # Arguments that are not JSON: as they stand.
    ('<tool_call>{"name": "x", "arguments": {"a": oops}}</tool_call>', [("x", '{"a": oops}')], ""),
    ('<tool_call>{"name": "x", "arguments": 5}</tool_call>', [("x", "5")], ""),
    ('<tool_call>{"name": "x", "arguments": [1]}</tool_call>', [("x", "[1]")], ""),
    ('<tool_call>{"name": "x", "arguments": {"a": "b\n}}\n</tool_call> c', [("x", '{"a": "b\n}}\n')], "c"),
    ('<tool_call>{"name": "x", "arguments": {"a": 1\n</tool_call> c', [("x", '{"a": 1\n')], "c"),
    (
        '<tool_call>{"name": "x", "arguments": {"a": "b\nc", "d": 1}}</tool_call>',
        [("x", '{"a": "b\nc", "d": 1}')],
        "",
    ),
    # A call that is not closed, or too often.
    ('<tool_call>{"name": "x", "arguments": {"a": 1}</tool_call>', [("x", '{"a": 1}')], ""),
    ('<tool_call>{"name": "x", "arguments": {"a": 1}}}}</tool_call>', [("x", '{"a": 1}')], ""),
    ('<tool_call>{"name": "x", "arguments": {}} Done.</tool_call> b', [("x", "{}")], "Done. b"),
    ('<tool_call>{"name": "x", "arguments": {}}\nDone.', [("x", "{}")], "Done."),
    ('<tool_call>{"name": "x", "arguments": {}} oops "a": 1}</tool_call>', [("x", "{}")], 'oops "a": 1}'),
    ('<tool_call>{"name": "x", oops}</tool_call> b', [("x", "")], "oops} b"),
    ('<tool_call>{"name": "x", "arguments": {}, "why" 5}</tool_call> b', [("x", "{}")], '"why" 5} b'),
    # Several between two marks.
    ('<tool_call>\n{"name": "x"}\n{"name": "y"}\n</tool_call>', [("x", "{}"), ("y", "{}")], ""),
    ('<tool_call>\n{"name": "x"}\n{"nome": "y"}\n</tool_call>', [("x", "{}")], '{"nome": "y"}'),
]
GLM: list[tuple[str, list[tuple[str, str]], str]] = [
    ("<tool_call>I think so</tool_call>", [], "<tool_call>I think so</tool_call>"),
    ("<tool_call>\n</tool_call>", [], "<tool_call>\n</tool_call>"),
    ("<tool_call>pi", [], "<tool_call>pi"),
    ("<tool_call>ping", [], "<tool_call>ping"),
    ("<tool_call>ping<b>", [], "<tool_call>ping<b>"),
    # What is written about the mark is no name.
    ("Write `<tool_call>`\nfirst", [], "Write `<tool_call>`\nfirst"),
    ("“<tool_call>”\n", [], "“<tool_call>”\n"),
    ("(<tool_call>)\n", [], "(<tool_call>)\n"),
    ("<tool_call>get.a-b_c2\n</tool_call>", [("get.a-b_c2", "{}")], ""),
    ("<tool_call>ping</tool_call>", [("ping", "{}")], ""),
    ("<tool_call> ping </tool_call>", [("ping", "{}")], ""),
    ("<tool_call>ping\n", [("ping", "")], ""),
    ("<tool_call>ping\noops</tool_call> b", [("ping", "{}")], "oops b"),
    ("<tool_call>ping\n<arg_key>a</arg_value>\n</tool_call>", [("ping", "{}")], "<arg_key>a</arg_value>"),
    ('<tool_call>ping\n{"a": "}"}\n</tool_call>', [("ping", '{"a": "}"}')], ""),
    ('<tool_call>\n{"name": "ping", "arguments": {"a": 1}}\n</tool_call>', [("ping", '{"a": 1}')], ""),
    (
        "<tool_call>ls <arg_key>a b</arg_key> <arg_value> c </arg_value> </tool_call>",
        [("ls", '{"a b": " c "}')],
        "",
    ),
    (
        "<tool_call>get_weather\n<arg_key>days</arg_key>\n<arg_value> three</arg_value>\n"
        "<arg_key>exact</arg_key>\n<arg_value>True</arg_value>\n<arg_key>tags</arg_key>\n<arg_value>x</arg_value>\n"
        "<arg_key>note</arg_key>\n<arg_value>None</arg_value>\n</tool_call>",
        [("get_weather", '{"days": " three", "exact": true, "tags": "x", "note": null}')],
        "",
    ),
    (
        "<tool_call>get_weather\n<arg_key>days</arg_key>\n<arg_value>NaN</arg_value>\n"
        "<arg_key>note</arg_key>\n<arg_value>5</arg_value>\n<arg_key>kind</arg_key>\n<arg_value>5</arg_value>\n"
        "<arg_key>city</arg_key>\n<arg_value></arg_value>\n</tool_call>",
        [("get_weather", '{"days": "NaN", "note": "5", "kind": "5", "city": ""}')],
        "",
    ),
]
CODER: list[tuple[str, list[tuple[str, str]], str]] = [
    ("<function=ping>\n</function>\n</tool_call>ok", [("ping", "{}")], "ok"),
    ("<function=ping>\n</function> ok", [("ping", "{}")], "ok"),
    ("<tool_call>\n<function=>\n</function>\n", [], "<tool_call>\n<function=>\n</function>\n"),
    ("<tool_call>\n<function=pi", [], "<tool_call>\n<function=pi"),
    ("<tool_call>\n<function=ping>\n</tool_call>", [("ping", "{}")], ""),
    (
        "<tool_call>\n<function=ping>\n<parameter=a>b</parameter></function></tool_call>",
        [("ping", '{"a": "b"}')],
        "",
    ),
    (
        "<function=get_weather>\n<parameter=city>\n\na\n\n</parameter>\n</function>",
        [("get_weather", '{"city": "\\na\\n"}')],
        "",
    ),
    (
        "<tool_call>\n<function=x>\n</function>\n<function=y>\n</function>\n</tool_call>",
        [("x", "{}"), ("y", "{}")],
        "",
    ),
]
LLAMA: list[tuple[str, list[tuple[str, str]], str]] = [
    ('{"answer": 42}', [], '{"answer": 42}'),
    ('{"name": "Alice", "age": 5}', [], '{"name": "Alice", "age": 5}'),
    ('{"name": "Alice"}', [], '{"name": "Alice"}'),
    ('{"name": "ping"}', [("ping", "{}")], ""),
    ('{"type": "function", "name": "x", "parameters": {}}', [("x", "{}")], ""),
    ('{"parameters": {"a": 1}, "name": "x"}', [("x", '{"a": 1}')], ""),
    ('{"name": "x", "parameters": {}}{"name": "ping"}\nDone', [("x", "{}"), ("ping", "{}")], "Done"),
    ('{"name": "x", "parameters": {}}; Done', [("x", "{}")], "; Done"),
    ('{"name": "x", "parameters": {}}; ', [("x", "{}")], ""),
    ('Look: {"name": "ping"}', [], 'Look: {"name": "ping"}'),
    ('<|python_tag|>{"name": "y"}', [("y", "{}")], ""),
    ('<|python_tag|>search.call(query="a")', [], '<|python_tag|>search.call(query="a")'),
    ("{", [], "{"),
    ("{}", [], "{}"),
]
MISTRAL: list[tuple[str, list[tuple[str, str]], str]] = [
    ("[TOOL_CALLS][]", [], "[TOOL_CALLS][]"),
    ("[TOOL_CALLS]", [], "[TOOL_CALLS]"),
    ("[TOOL_CALLS] oops, sorry", [], "[TOOL_CALLS] oops, sorry"),
    ("[TOOL_CALLS]ping", [], "[TOOL_CALLS]ping"),
    ('[TOOL_CALLS]{"name": "ping"}', [("ping", "{}")], ""),
    ('[TOOL_CALLS]ping{"a": 1}', [("ping", '{"a": 1}')], ""),
    ("[TOOL_CALLS]ping[ARGS]", [("ping", "")], ""),
    ("[TOOL_CALLS]ping[ARGS] oops", [("ping", "{}")], "oops"),
    ('[TOOL_CALLS]x[ARGS]{"a": [TOOL_CALLS]y[ARGS]{}', [("x", '{"a": '), ("y", "{}")], ""),
    ('[TOOL_CALLS][{"name": "x"}, oops] b', [("x", "{}")], ", oops] b"),
    ('[TOOL_CALLS][{"name": "x"}, ', [("x", "{}")], ""),
    ('[TOOL_CALLS][{"name": "x"}] b', [("x", "{}")], "b"),
]
BROKEN = [
    (name, *case)
    for name, cases in {
        "hermes": HERMES, "glm45": GLM, "qwen3_coder": CODER, "llama3_json": LLAMA, "mistral": MISTRAL
    }.items()
    for case in cases
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "wanted", "said"), BROKEN)
def test_what_is_broken(name: str, text: str, wanted: list[tuple[str, str]], said: str) -> None:
    whole = parsed([text], TOOL_FORMATS[name])
    assert calls(whole) == wanted
    assert content(whole) == said
    for pieces in cuts(text):
        assert parsed(pieces, TOOL_FORMATS[name]) == whole


# ------------------------------------------------------------------------------------ properties

PARTS = [
    *MARKS, "<function=", "<function=get_weather>", "<parameter=city>", "</parameter>", "</function>",
    "<think>", "</think>", "<response>", "</response>", '{"name": "ping", "arguments": {', '{"name": "ping"}',
    '"arguments": {', "ping", "get_weather", "\n", " ", "{", "}", "[", "]", ",", ";", ":", '"', "\\", "\\u00",
    "<", "</", "\x00", "é😀",
]  # fmt: skip
outputs = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=20).map("".join)
formats = st.sampled_from([None, *TOOL_FORMATS.values()])
thinkings = st.sampled_from(
    [None]
    + [
        reasoning.thinking(prompt)
        for reasoning in REASONING_FORMATS.values()
        for prompt in ("<|assistant|>", "<|assistant|><think>")
    ]
)


@given(outputs, formats, thinkings, st.lists(st.integers(1, 12), min_size=1, max_size=8))
@settings(max_examples=600, deadline=None)
def test_any_text_is_parsed_the_same_however_it_is_cut(
    text: str, tools: Any, thinking: Thinking | None, sizes: list[int]
) -> None:
    whole = parsed([text], tools, thinking=thinking)
    assert parsed(list(text), tools, thinking=thinking) == whole
    pieces, at = [], 0
    while at < len(text):
        pieces.append(text[at : at + sizes[len(pieces) % len(sizes)]])
        at += len(pieces[-1])
    assert parsed(pieces, tools, thinking=thinking) == whole


@given(st.lists(st.sampled_from(PARTS) | st.none(), max_size=20), formats, thinkings)
@settings(max_examples=600, deadline=None)
def test_no_word_is_lost_but_for_what_a_cut_leaves_of_a_call(
    parts: list[str | None], tools: Any, thinking: Thinking | None
) -> None:
    """Words are told in their order, but for those at the end of an output that ends in a call."""
    words = [f"w{number}w" for number in range(parts.count(None))]
    left = iter(words)
    text = "".join(next(left) if part is None else part for part in parts)
    told = "".join(
        "".join([event.text for event in [event] if isinstance(event, Content | Reasoning)])
        or getattr(event, "name", "")
        or getattr(event, "text", "")
        for event in parsed([text], tools, thinking=thinking)
    )
    found = [word for word in words if word in told]
    assert found == words[: len(found)]
    assert sorted(found, key=told.index) == found


@given(st.text(alphabet=st.characters(exclude_characters="<[{")), formats)
def test_text_without_marks_comes_as_it_is_and_at_once(text: str, tools: Any) -> None:
    parser = OutputParser(None, tools, FUNCTIONS)
    told = ""
    for end, character in enumerate(text, start=1):
        told += content(parser.feed(character))
        waits = text[len(told) : end]
        assert told + waits == text[:end]
        assert not waits or (tools is not None and waits.isspace())
    assert told + content(parser.finish()) == text
