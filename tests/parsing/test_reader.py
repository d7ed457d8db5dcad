"""Text that comes in pieces: marks, and that nothing is read twice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parsing.streams import FUNCTIONS, calls
from tpworker.parsing import TOOL_FORMATS
from tpworker.parsing.reader import Marks, Reader, Reading, Sink
from tpworker.parsing.tools import ToolParser

LONG = 3000
OUTPUTS = {
    "text": ("hermes", "a < b " * LONG),
    "spaces": ("hermes", " \n" * LONG),
    "a string": ("hermes", '<tool_call>{"name": "x", "arguments": {"a": "' + 'b \\" < \n' * LONG),
    "a string in a string": ("hermes", '<tool_call>{"name": "x", "arguments": "' + "\\n\\u00e9 <" * LONG),
    "brackets": ("hermes", '<tool_call>{"name": "x", "arguments": {"a": ' + "[" * LONG),
    "arguments before a name": ("hermes", '<tool_call>{"arguments": {"a": "' + "b" * LONG),
    "a name": ("glm45", "<tool_call>" + "b" * LONG),
    "marks": ("hermes", "<tool_call>" * LONG),
    "calls without names": ("hermes", '<tool_call>{"x":[' * LONG),
    "calls": ("hermes", '<tool_call>{"name": "x"}\n' * LONG),
    "a value": ("glm45", "<tool_call>get_weather\n<arg_key>city</arg_key><arg_value>" + "</arg_" * LONG),
    "a key": ("glm45", "<tool_call>get_weather\n<arg_key>" + "b" * LONG),
    "lines of a value": ("qwen3_coder", "<function=get_weather><parameter=city>" + "\n\n</param" * LONG),
    "an object": ("llama3_json", '{"name": "ping", "parameters": {"a": "' + "b" * LONG),
    "objects": ("llama3_json", '{"name": "ping"}; ' * LONG),
    "an array": ("mistral", '[TOOL_CALLS][{"name": "x", "arguments": {}' + ', "a": 1' * LONG),
}


@pytest.mark.parametrize(("name", "text"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_what_is_kept_to_be_read_again_is_at_most_a_mark(name: str, text: str) -> None:
    """So the cost is linear in the text, however it is cut."""
    parser = ToolParser(TOOL_FORMATS[name], FUNCTIONS)
    reader = parser._reader
    events = []
    for character in text:
        kept = len(reader._text) - reader._at
        assert kept <= len("\n</parameter>")
        events += parser.feed(character)
    events += parser.finish()
    whole = ToolParser(TOOL_FORMATS[name], FUNCTIONS)
    assert calls(events) == calls(whole.feed(text) + whole.finish())


def read(parser: Reading[str], reader: Reader, pieces: list[str]) -> str:
    """What a part of a parser returns, fed piece by piece."""
    for piece in pieces:
        reader.add(piece)
        try:
            next(parser)
        except StopIteration as stop:
            return str(stop.value)
    reader.end()
    with pytest.raises(StopIteration) as stopped:
        next(parser)
    return str(stopped.value.value)


MARKS = [("<tool>", "</tool>"), ("\n</v>", "</v>"), ("[X]",), ("<tool>", "<f=", "</tool>")]
PIECES = ["<", "</", "tool>", "tool", "\n", "\n\n", "v>", "[", "X]", "[[X", "f=", "a"]


@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join), st.sampled_from(MARKS))
def test_the_first_mark_is_found_wherever_text_is_cut(text: str, marks: tuple[str, ...]) -> None:
    first = min((text.find(mark) for mark in marks if mark in text), default=len(text))
    found = next((mark for mark in marks if text.startswith(mark, first)), "")
    for size in range(1, len(text) + 1):
        told: list[str] = []
        reader = Reader()
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert read(_through(reader, marks, told.append), reader, pieces) == found
        assert "".join(told) == text[:first]


def _through(reader: Reader, marks: Sequence[str], sink: Sink) -> Reading[str]:
    return (yield from reader.through(Marks(*marks), sink))


def test_what_is_recorded_is_what_was_taken() -> None:
    reader = Reader()
    reader.add("abc<x>d")
    reader.record("before ")
    assert read(_through(reader, ["<x>"], lambda text: None), reader, [""]) == "<x>"
    assert reader.recorded() == "before abc<x>"
    assert reader.recorded() == ""
    assert reader.rest() == "d"
