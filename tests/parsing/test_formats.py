"""All formats through the same cases: what a template writes is what a parser reads, however it is cut."""

from __future__ import annotations

import json

import pytest

from tests.parsing.streams import CASES, FAMILIES, FUNCTIONS, Family, calls, content, cuts, parsed
from tpworker.parsing import TOOL_FORMATS, CallArguments, CallBegan, Content, OutputParser

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each_family
@each_case
def test_what_is_written_is_read(
    family: Family, case: tuple[str, list[tuple[str, dict[str, object]]]]
) -> None:
    before, wanted = case
    text = family.write(before, wanted)
    events = parsed([text], family.tools)
    assert [(name, json.loads(arguments)) for name, arguments in calls(events)] == wanted
    assert content(events) == before


@each_family
@each_case
def test_it_is_read_the_same_wherever_it_is_cut(
    family: Family, case: tuple[str, list[tuple[str, dict[str, object]]]]
) -> None:
    text = family.write(*case)
    whole = parsed([text], family.tools)
    assert all(parsed(pieces, family.tools) == whole for pieces in cuts(text))


@each_family
@each_case
def test_of_what_is_cut_off_that_is_told_which_came(
    family: Family, case: tuple[str, list[tuple[str, dict[str, object]]]]
) -> None:
    """Names are whole, arguments and text as far as they came. A call whose name did not come is text."""
    text = family.write(*case)
    whole = calls(parsed([text], family.tools))
    for end in range(len(text)):
        events = parsed([text[:end]], family.tools)
        found = calls(events)
        assert [name for name, _ in found] == [name for name, _ in whole[: len(found)]]
        assert found[:-1] == whole[: len(found)][:-1]
        if found:
            assert whole[len(found) - 1][1].startswith(found[-1][1])
        said = content(events)
        assert said.startswith(case[0]) or case[0].startswith(said)
        left = said[len(case[0]) :]
        assert text[:end].rstrip().endswith(left.strip())
        assert not left.strip() or len(found) < len(whole)


@each_family
def test_text_between_calls_and_behind_them_is_text(family: Family) -> None:
    one = family.write("", [("ping", {})])
    if family.name == "llama3_json":
        text, wanted = one + "\nDone.", "Done."
    else:
        text, wanted = one + " And\n" + one + "\nDone. \n", "And\nDone."
    for pieces in ([text], *cuts(text)):
        events = parsed(pieces, family.tools)
        assert {name for name, _ in calls(events)} == {"ping"}
        assert content(events) == wanted


@each_family
def test_text_is_told_at_once_but_for_spaces_and_beginnings_of_marks(family: Family) -> None:
    parser = OutputParser(None, family.tools, FUNCTIONS)
    told = ""
    for piece in ["Hello", " ", "a", " < b", " [", "x", "\n\n", "end"]:
        events = parser.feed(piece)
        told += content(events)
        if not piece.endswith((" ", "\n", "[")):
            assert events == [Content(events[0].text)]
            assert told.endswith(piece)
    assert told == "Hello a < b [x\n\nend"
    assert parser.finish() == []


@each_family
def test_a_call_is_told_with_its_name(family: Family) -> None:
    text = family.write("", [("get_weather", {"city": "Paris"})])
    parser = OutputParser(None, family.tools, FUNCTIONS)
    began_at = [
        at
        for at, character in enumerate(text)
        for event in parser.feed(character)
        if isinstance(event, CallBegan)
    ]
    behind_name = text.index("get_weather") + len("get_weather")
    marks = {"mistral11": "[ARGS]", "mistral_ids": "[CALL_ID]a1b2c3d4e[ARGS]", "glm47": "<arg_key>"}
    assert began_at == [behind_name + len(marks.get(family.name, '"')) - 1]


@pytest.mark.parametrize("name", ["city", "options"])
@each_family
def test_long_arguments_are_told_as_they_come(family: Family, name: str) -> None:
    value = "x" * 200 if name == "city" else {"a": ["x" * 200]}
    text = family.write("", [("get_weather", {name: value})])
    parser = OutputParser(None, family.tools, FUNCTIONS)
    num_told = 0
    for at, character in enumerate(text, start=1):
        num_told += sum(
            event.text.count("x") for event in parser.feed(character) if isinstance(event, CallArguments)
        )
        assert num_told >= text[:at].count("x") - 1


@each_family
def test_output_without_calls_is_text_as_it_stands(family: Family) -> None:
    for text in (" \n ", "\n  Hi \n", "", 'a {"b": 1} ; <tool> [x] </ ', "  <"):
        for pieces in ([text], *cuts(text)):
            assert parsed(pieces, family.tools) == ([Content(text)] if text else [])


def test_an_answer_in_json_is_told_once_it_cannot_be_a_call() -> None:
    parser = OutputParser(None, TOOL_FORMATS["llama3_json"], FUNCTIONS)
    assert parser.feed('{"answer') == []
    assert parser.feed('": ') == [Content('{"answer":')]
    assert parser.feed("4") == [Content(" 4")]


def test_without_tools_nothing_is_a_call() -> None:
    for family in FAMILIES:
        text = family.write("Hi", [("ping", {})])
        assert parsed([text], None) == [Content(text)]
