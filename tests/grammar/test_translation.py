from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.grammar.sampling import refused, sampler_of
from tests.grammar.tokenizers_of_tests import Extended, extended
from tpworker import InvalidRequest, StructuredOutputs
from tpworker.grammar import grammar_of
from tpworker.grammar.gbnf import MAX_RULES

INTEGER = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": INTEGER}
GBNF = {"type": "grammar", "grammar": 'root ::= "q"'}
TAG = {"begin": "<t>", "content": JSON, "end": "</t>"}


def tagged(**of: Any) -> dict[str, Any]:
    return {"structural_tag": {"type": "structural_tag", "format": of}}


def older(*structures: dict[str, Any], triggers: list[str]) -> dict[str, Any]:
    return {
        "structural_tag": {"type": "structural_tag", "structures": list(structures), "triggers": triggers}
    }


def reaches(made: Extended, outputs: dict[str, Any], text: str) -> bool:
    """Whether it is an output, and a complete one."""
    grammar = grammar_of(StructuredOutputs(**outputs), special_ids=made.special_ids)
    matcher = made.compiler.matcher(grammar)
    return refused(matcher, made.vocab_size, made.ids(text)) is None and matcher.is_accepting()


@pytest.fixture
def plain(real_model: Path) -> Extended:
    return extended(real_model, (), False)


# --------------------------------------------------------------------------- expressions, choices


@pytest.mark.parametrize(
    ("regex", "good", "bad"),
    [
        ("a+", ["a", "aaa"], ["", "ab", "b"]),
        ("^a$", ["a"], ["aa"]),
        ("^a|b$", ["a", "b"], ["ab"]),
        ("a/b", ["a/b"], ["ab"]),
        (r"a\/b", ["a/b"], ["a\\/b"]),
        ("[/\"'#]{2}", ["//", "#'"], ["ab"]),
        ("a\nb", ["a\nb"], ["ab"]),
        (r"é\u00e9\x{1F600}", ["éé😀"], ["e"]),
        ("(?s:.*)", ["", "a\nb 😀"], []),
    ],
)
def test_all_of_an_output_matches_an_expression(
    regex: str, good: list[str], bad: list[str], plain: Extended
) -> None:
    for text in good:
        assert reaches(plain, {"regex": regex}, text), text
    for text in bad:
        assert not reaches(plain, {"regex": regex}, text), text


ODD = [
    'a"b',
    "a\\b",
    "a\nb",
    "\x00",
    "\x01\x7f",
    "é",
    "\u2028",
    "😀",
    "/x/",
    "a{2}",
    r"\d",
    "'",
    "// x",
    "a | b",
]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_a_choice_is_any_text_as_it_is(text: str, plain: Extended) -> None:
    for one in (text, "zzz"):
        assert reaches(plain, {"choice": [text, "zzz"]}, one)
    assert not reaches(plain, {"choice": [text, "zzz"]}, f"{text}z")


def test_many_choices_one_of_which_begins_another(plain: Extended) -> None:
    choices = [f"choice {i}" for i in range(10_000)]
    for text in ("choice 1", "choice 10", "choice 9999"):
        assert reaches(plain, {"choice": choices}, text)
    assert not reaches(plain, {"choice": choices}, "choice 10000")


def test_a_grammar_that_is_too_large_is_refused() -> None:
    """Few characters may take many to write."""
    words = r"structural_tag makes a grammar of 12\d{5} characters; the limit is 1048576"
    with pytest.raises(InvalidRequest, match=words) as caught:
        grammar_of(StructuredOutputs(**tagged(type="const_string", value="é" * 200_000)))
    assert caught.value.parameter == "structured_outputs"


# ------------------------------------------------------------------------------------------ GBNF


@pytest.mark.parametrize(
    ("gbnf", "good", "bad"),
    [
        ('root ::= "a" | "b"+', ["a", "bb"], ["ab"]),
        ('root ::= item ("," item)*\nitem ::= [a-z]+ | "(" root ")"', ["ab,(c,d)"], ["a,"]),
        ('# a comment\nroot ::= some-thing{2,3}\nsome-thing ::= "x"', ["xx", "xxx"], ["x", "xxxx"]),
        (r'root ::= "\x41\u00e9\U0001F600\t" [\x41-\x5a]+', ["Aé😀\tABZ"], ["Aé😀\tab"]),
        (r'root ::= "\x22" [^"\\\x5d]* "\x5c"', ['"abc\\'], ['"ab]\\', '"a"\\']),
        ('root ::= "a/b" [/]', ["a/b/"], ["ab/"]),
        ('root ::= Upper lower\nUpper ::= "U" lower\nlower ::= "l"', ["Ull"], ["Ul"]),
    ],
)
def test_gbnf(gbnf: str, good: list[str], bad: list[str], plain: Extended) -> None:
    for text in good:
        assert reaches(plain, {"grammar": gbnf}, text), text
    for text in bad:
        assert not reaches(plain, {"grammar": gbnf}, text), text


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("root ::= foo", "Rule 'foo' not found"),
        ('other ::= "a"', "No 'root' rule found"),
        ('root ::= "a', "Unexpected end of input at line 1"),
        ('root ::= "a"\nb ::= [x', "Unexpected end of input at line 2"),
        (r'root ::= "\uD800"', r"\\uD800 is no character"),
        ("root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "nested too deeply"),
        ("\n".join(f'r{i} ::= "a"' for i in range(MAX_RULES + 1)), f"{MAX_RULES + 1} rules of GBNF"),
        ('root ::= "' + "a" * 40_000 + '"', "40011 characters and 1 rules of GBNF"),
        ('{"type": "object"}', "is JSON: give Lark"),
        (" \n", "is empty: give Lark"),
    ],
    ids=lambda value: value[:30],
)
def test_a_grammar_that_is_none_is_refused(grammar: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        grammar_of(StructuredOutputs(grammar=grammar))
    assert caught.value.parameter == "structured_outputs"


# -------------------------------------------------------------------------------- structural tags

TAGS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "the older form": (
        older(
            {"begin": "<f=a>", "schema": INTEGER, "end": "</f>"},
            {"begin": "<f=b>", "schema": {"type": "string"}, "end": "</f>"},
            triggers=["<f="],
        ),
        ["", "some text < b", 'x <f=a>{"a": 1}</f> y <f=b>"s"</f>', '<f=b>"s"</f><f=b>"s"</f>'],
        ["x <f=c>", "x <f=a>5", '<f=a>{"a": 1}'],
    ),
    "a trigger that is all of the beginning": (
        older({"begin": "<t>", "schema": INTEGER, "end": "</t>"}, triggers=["<t>"]),
        ['ok <t>{"a":1}</t>'],
        ["<t>x"],
    ),
    "two triggers": (
        older(
            {"begin": "<t>\n", "schema": INTEGER, "end": "\n</t>"},
            {"begin": "[C]", "schema": INTEGER, "end": ""},
            triggers=["<t>", "[C"],
        ),
        ['a <t>\n{"a":1}\n</t> b [C]{"a":2} c', "[c"],
        ["[Cx", "<t>{"],
    ),
    "at least one": (
        tagged(type="triggered_tags", triggers=["<t>"], tags=[TAG], at_least_one=True),
        ['<t>{"a":1}</t> and <t>{"a":1}</t>.'],
        ["", "no"],
    ),
    "at most one": (
        tagged(type="triggered_tags", triggers=["<t>"], tags=[TAG], stop_after_first=True),
        ["no", 'see <t>{"a":1}</t>'],
        ['<t>{"a":1}</t> more'],
    ),
    "exactly one": (
        tagged(type="triggered_tags", triggers=["<t>"], tags=[TAG], stop_after_first=True, at_least_one=True),
        ['<t>{"a":1}</t>'],
        ["", 'x<t>{"a":1}</t>', '<t>{"a":1}</t>x'],
    ),
    "tags with a separator": (
        tagged(type="tags_with_separator", separator=", ", tags=[TAG]),
        ["", '<t>{"a":1}</t>', '<t>{"a":1}</t>, <t>{"a":2}</t>'],
        ['<t>{"a":1}</t>, ', '<t>{"a":1}</t><t>{"a":2}</t>'],
    ),
    "a sequence": (
        tagged(
            type="sequence",
            elements=[
                {"type": "const_string", "value": "n: "},
                {"type": "regex", "pattern": "[0-9]+"},
                {"type": "or", "elements": [{"type": "tag", **TAG}, GBNF]},
                {"type": "any_text"},
            ],
        ),
        ['n: 12<t>{"a":1}</t>yes', "n: 1q"],
        ["n: q", "n: 1"],
    ),
    "text in a tag": (
        tagged(type="tag", begin="<t>", content={"type": "any_text"}, end="</t>"),
        ["<t>foo < <b></t>", "<t></t>"],
        ["<t>foo", "<t></t>x"],
    ),
    "text in a tag of two ends": (
        tagged(type="tag", begin="<t>", content={"type": "any_text"}, end=["</t>", "!"]),
        ["<t>foo</t>", "<t>foo!"],
        ["<t>foo! and"],
    ),
    "text without an end": (
        tagged(type="tag", begin="<t>", content={"type": "any_text"}, end=""),
        ["<t>foo !"],
        ["foo"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("kind", ["special", "added", "text"])
def test_structural_tags(name: str, kind: str, real_model: Path) -> None:
    """Also where what they are made of are tokens of their own."""
    tokens = () if kind == "text" else ("<t>", "</t>", "<f=", "[C")
    made = extended(real_model, tokens, kind == "special")
    outputs, good, bad = TAGS[name]
    for text in good:
        assert reaches(made, outputs, text), text
    for text in bad:
        assert not reaches(made, outputs, text), text


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"structural_tag": {"type": "x"}}, "type='x': must be structural_tag"),
    ({"structural_tag": {"type": "structural_tag"}}, "structures=None: must be a list"),
    (older({"begin": "<b", "schema": {}, "end": ""}, triggers=["<a"]), r"structures\[0\].begin='<b'"),
    (older({"begin": "<a", "schema": 5, "end": ""}, triggers=["<a"]), "json_schema=5: must be a JSON"),
    (older({"begin": "<a", "schema": {}}, triggers=["<a"]), r"structures\[0\].end=None"),
    (older({"begin": "<a", "schema": {}, "end": "", "x": 1}, triggers=["<a"]), r"\[0\].x=1: must be left"),
    (older({"begin": "<a", "schema": {}, "end": ""}, triggers=[""]), r"triggers=\[''\]"),
    (tagged(type="qwen_xml_parameter", json_schema={}), "format.type='qwen_xml_parameter'"),
    (tagged(type="any_text", excludes=["a"]), r"format.excludes=\['a'\]: must be left out"),
    (
        tagged(type="sequence", elements=[{"type": "any_text"}, {"type": "const_string", "value": "x"}]),
        r"format.elements\[0\] is text without an end of its own",
    ),
    (
        tagged(type="tag", begin="a", end="b", content={"type": "grammar", "grammar": "root ::= foo"}),
        "Rule 'foo' not found",
    ),
    (tagged(type="or", elements=[5]), r"format.elements\[0\].type=5"),
]  # fmt: skip


@pytest.mark.parametrize(("outputs", "words"), BROKEN, ids=lambda value: str(value)[:50])
def test_a_structural_tag_that_is_none_is_refused_with_where(outputs: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        grammar_of(StructuredOutputs(**outputs))
    assert caught.value.parameter == "structured_outputs"


def test_outputs_of_structural_tags_at_random(real_model: Path) -> None:
    sampler = sampler_of(real_model)
    grammar = grammar_of(StructuredOutputs(**TAGS["exactly one"][0]))
    for seed in range(5):
        text = sampler.text(sampler.sample(grammar, seed))
        assert set(json.loads(text.removeprefix("<t>").removesuffix("</t>"))) == {"a"}
