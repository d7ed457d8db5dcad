"""What is held begins behind the model's thinking, however its marks are made of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.grammar.sampling import allowed_ids, refused
from tests.grammar.tokenizers_of_tests import EOS_IDS, Extended, extended
from tpworker import StructuredOutputs, Thinking
from tpworker.grammar import grammar_of

THINK, BRACKETS = ("<think>", "</think>"), ("[THINK]", "[/THINK]")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = """start: part* REST
REST: /(?s:.*)/
part: upto %json {"type": "object"} "</call>"
upto[lazy]: REST "<call>"
"""
HELD = {
    "json": ({"json": SCHEMA}, '{"a": 1}'),
    "regex": ({"regex": "[0-9]{3}"}, "123"),
    "choice": ({"choice": ["yes", "no"]}, "yes"),
    "lark": ({"grammar": TOOLS}, 'so <call>{"b": 2}</call> and <b>'),
    "gbnf": ({"grammar": 'root ::= "a"+ "b"'}, "aab"),
    "tags": (
        {
            "structural_tag": {
                "type": "structural_tag",
                "triggers": ["<f"],
                "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
            }
        },
        'so <f>{"a":1}</f>!',
    ),
}


@pytest.fixture(params=[THINK, BRACKETS], ids=["<think>", "[THINK]"])
def marks(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture(params=["special", "added", "text"])
def made(request: pytest.FixtureRequest, real_model: Path, marks: tuple[str, str]) -> Extended:
    """A tokenizer in which the marks are special tokens, added ones, or text of several tokens."""
    made = extended(real_model, () if request.param == "text" else marks, request.param == "special")
    assert (len(made.ids(marks[1])) > 1) == (request.param == "text")
    return made


def grammar(made: Extended, marks: tuple[str, str], held: dict[str, object], is_open: bool) -> str:
    thinking = Thinking(start=marks[0], end=marks[1], is_open=is_open)
    outputs = StructuredOutputs(**held, behind=thinking)  # type: ignore[arg-type]
    return grammar_of(outputs, special_ids=made.special_ids)


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("between", ["", "\n", "\n\n \t"], ids=repr)
def test_what_comes_behind_it_is_held(
    made: Extended, marks: tuple[str, str], kind: str, between: str
) -> None:
    held, text = HELD[kind]
    start, end = marks
    thought = f"so <b> [x] {start[:3]} {end[:4]}, {{hm}}\n"
    for is_open, texts in {
        True: [f"{thought}{end}{between}{text}", f"{end}{between}{text}"],
        False: [f"{start}{thought}{end}{between}{text}", f"{between}{text}"],
    }.items():
        compiled = grammar(made, marks, held, is_open)
        for whole in texts:
            matcher = made.compiler.matcher(compiled)
            ids = made.ids(whole)
            assert refused(matcher, made.vocab_size, ids) is None, whole
            assert matcher.is_accepting(), whole


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "not open"])
def test_it_cannot_end_in_thinking_nor_with_something_else(
    made: Extended, marks: tuple[str, str], is_open: bool
) -> None:
    compiled = grammar(made, marks, {"json": SCHEMA}, is_open)
    begin = "" if is_open else marks[0]
    matcher = made.compiler.matcher(compiled)
    assert refused(matcher, made.vocab_size, made.ids(f"{begin}so ")) is None
    assert not set(EOS_IDS) & set(allowed_ids(matcher, made.vocab_size))
    matcher = made.compiler.matcher(compiled)
    ids, more = made.ids(f"{begin}so {marks[1]}"), made.ids("yes")
    assert refused(matcher, made.vocab_size, [*ids, *more]) == len(ids), "what is held was not held"
    matcher = made.compiler.matcher(compiled)
    ids, more = made.ids(f'{begin}so {marks[1]}{{"a": 1}}'), made.ids("}")
    assert refused(matcher, made.vocab_size, [*ids, *more]) == len(ids)
    assert matcher.is_accepting()
    assert set(allowed_ids(matcher, made.vocab_size)) == set(EOS_IDS)


def test_a_mark_that_is_a_token_may_be_spelled_in_several(made: Extended, marks: tuple[str, str]) -> None:
    """Who reads the text takes it for the mark; so it is one."""
    compiled = grammar(made, marks, {"json": SCHEMA}, is_open=True)
    end = marks[1]
    ids = [*made.ids("so "), *made.ids(end[:3]), *made.ids(end[3:]), *made.ids('{"a"')]
    matcher = made.compiler.matcher(compiled)
    assert refused(matcher, made.vocab_size, ids) is None
    assert refused(matcher, made.vocab_size, made.ids("}")) == 0


def test_without_the_tokens_ids_a_mark_that_is_a_token_ends_nothing(real_model: Path) -> None:
    """Why `special_ids` is there."""
    made = extended(real_model, THINK, False)
    outputs = StructuredOutputs(json=SCHEMA, behind=Thinking(start=THINK[0], end=THINK[1], is_open=True))
    matcher = made.compiler.matcher(grammar_of(outputs))
    ids = made.ids("so </think>")
    assert refused(matcher, made.vocab_size, ids) == len(ids) - 1


def test_a_token_that_ends_the_mark_and_begins_what_is_held(real_model: Path) -> None:
    made = extended(real_model, (), False)
    spanning = made.tokenizer.token_to_id('>"')
    assert spanning is not None
    outputs = StructuredOutputs(
        json={"type": "string"}, behind=Thinking(start="<t>", end="</t>", is_open=True)
    )
    ids = [*made.ids("so </t"), spanning, *made.ids('x"')]
    matcher = made.compiler.matcher(grammar_of(outputs))
    assert refused(matcher, made.vocab_size, ids) is None
    assert matcher.is_accepting()
