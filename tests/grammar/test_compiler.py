from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.grammar.sampling import allowed_ids, refused, sampler_of
from tests.grammar.tokenizers_of_tests import EOS_IDS, Extended
from tpworker import StructuredOutputs, Thinking
from tpworker.grammar import Compiler, GrammarError, compiler, grammar_of
from tpworker.grammar.errors import cleaned

OBJECT = {"type": "object"}


@pytest.fixture
def compile_it(real_model: Path) -> Compiler:
    return sampler_of(real_model).compiler


def of(**outputs: Any) -> str:
    return grammar_of(StructuredOutputs(**outputs))


# ------------------------------------------------------------------------------ what is refused

REFUSED_SCHEMAS: list[tuple[dict[str, Any], str]] = [
    ({"properties": {"a": {"not": {"type": "string"}}}}, "not supported: not, at #/properties/a"),
    ({"items": {"type": "array", "uniqueItems": True}}, "not supported: uniqueItems, at #/items"),
    ({"anyOf": [{}, {"if": {}, "then": {}}]}, "not supported: if, then, at #/anyOf/1"),
    ({"properties": {"a/b~c": {"contains": {}}}}, "not supported: contains, at #/properties/a~1b~0c"),
    (
        {
            "$ref": "#/$defs/A",
            "$defs": {"A": {"properties": {"b": {"$ref": "#/$defs/B"}}}, "B": {"type": "x"}},
        },
        "Invalid type: x, at #/$defs/B",
    ),
    (
        {"properties": {"p": {"$ref": "#/$defs/none"}}},
        "Pointer '/$defs/none' does not exist, at #/properties/p",
    ),
    (
        {"properties": {"p": {"$ref": "https://x.org/y"}}},
        "names another document: put its parts into $defs, at #/pr",
    ),
    (
        {"items": {"type": "string", "pattern": "(?=a)b"}},
        "look-around, including look-ahead and look-behind, is not",
    ),
    (
        {"properties": {"p": {"type": "string", "pattern": "a(b"}}},
        "in a regular expression at character 2 of 'a(b': unclosed group, at #/properties/p",
    ),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength (5) is greater than maxLength (2), at #"),
    (
        {"type": "string", "format": "uuid", "maxLength": 5},
        "no string can have its pattern, its format and its",
    ),
    ({"oneOf": [{"type": "string"}, {"pattern": "a"}]}, "oneOf is supported where no two of its schemas"),
    ({"$ref": "#"}, "no output can match it"),
]


@pytest.mark.parametrize(("schema", "words"), REFUSED_SCHEMAS, ids=lambda value: str(value)[:40])
def test_a_schema_is_refused_by_name_and_with_where(
    schema: dict[str, Any], words: str, compile_it: Compiler
) -> None:
    with pytest.raises(GrammarError) as caught:
        compile_it.try_out(of(json=schema))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "line 1" not in str(caught.value), "the user has no such line"


REFUSED_GRAMMARS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "a(b"}, "in a regular expression at character 2 of 'a(b': unclosed group"),
    ({"regex": r"(a)\1"}, "backreferences are not supported"),
    ({"regex": r"a\bc"}, "lookarounds not supported"),
    ({"grammar": 'begin: "a"'}, "no start rule found"),
    ({"grammar": 'start: b\n\nb: "x" foo'}, 'line 3, column 4: unknown name: "foo"'),
    ({"grammar": "start: <nope>"}, 'line 1, column 8: unknown special token: "<nope>"'),
    ({"grammar": 'start: "a" |\n  %% b'}, "line 2, column 4: lexer error"),
    ({"grammar": "start: start"}, "no output can match it"),
    ({"grammar": 'start: a "b"\na[lazy]: /.*/'}, "llguidance fails on it"),
    ({"grammar": 'start: x %json {"items": {"type": "bogus"}}\nx: "a"'}, "Invalid type: bogus, at #/items"),
]


@pytest.mark.parametrize(("outputs", "words"), REFUSED_GRAMMARS, ids=lambda value: str(value)[:40])
def test_a_grammar_is_refused_with_where(outputs: dict[str, Any], words: str, compile_it: Compiler) -> None:
    with pytest.raises(GrammarError) as caught:
        compile_it.try_out(of(**outputs))
    assert words in str(caught.value)


def test_where_is_the_same_behind_thinking(compile_it: Compiler) -> None:
    thinking = {"start": "<t>", "end": "</t>"}
    with pytest.raises(GrammarError, match=r'^line 3, column 4: unknown name: "foo"$'):
        compile_it.matcher(of(grammar='start: b\n\nb: "x" foo', behind=thinking))
    with pytest.raises(GrammarError, match=r"^not supported: not, at #/items$"):
        compile_it.matcher(of(json={"items": {"not": {}}}, behind=thinking))


EXPLOSIVE = {
    "repetitions": {"regex": "(a{1000}){1000}"},
    "patterns": {"json": {"allOf": [{"type": "string", "pattern": f".*a{{{i}}}b.*"} for i in range(1, 10)]}},
    "optional properties": {
        "json": {"type": "object", "properties": {f"p_{i}": {"type": "integer"} for i in range(4000)}}
    },
    "recursion to the left": {"grammar": 'start: a\na: "b" a'},
}


@pytest.mark.parametrize("name", EXPLOSIVE)
def test_what_is_explosive_is_refused(name: str, compile_it: Compiler) -> None:
    words = {
        "repetitions": "too complex",
        "patterns": "patterns together are too complex",
        "optional properties": "too ",
        "recursion to the left": "Too many items",
    }
    with pytest.raises(GrammarError, match=words[name]) as caught:
        compile_it.try_out(of(**EXPLOSIVE[name]))
    assert len(str(caught.value)) < 700


def test_a_part_that_is_false_is_not_what_is_wrong(compile_it: Compiler) -> None:
    with pytest.raises(GrammarError, match=r"^not supported: unevaluatedProperties, at #/items$"):
        compile_it.matcher(of(json={"items": {"unevaluatedProperties": False}}))


@pytest.mark.parametrize("regex", ["\U00040000", "a[\U00040000-\U000bffff]"], ids=ascii)
def test_what_the_models_tokens_cannot_write_is_refused(regex: str, compile_it: Compiler) -> None:
    """The default model has no token for two of the bytes that characters begin with in UTF-8."""
    with pytest.raises(GrammarError, match="none that the model's tokens can write"):
        compile_it.try_out(of(regex=regex))


UNCLOSED = "in a regular expression at character 2 of 'a(b': unclosed group"
TOO_COMPLEX = "it is too complex: make its repetitions and patterns smaller"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Parser Error: so\n<state>\nTokens: [secret]\n</state>", "Parser Error: so"),
        ("so it is\n<backtrace>\n   0: main\n", "so it is"),
        ("so\n\nStack backtrace:\n   0: main", "so"),
        ('at 3(7): unknown name: "x"\n   3 | a: x\n          ^\n', 'line 3, column 7: unknown name: "x"'),
        ("at 1(8): invalid regex: regex parse error:\n    a(b\n     ^\nerror: unclosed group", UNCLOSED),
        ("lexer error: too many expressions constructed\n<non-verbose/>", TOO_COMPLEX),
        ("x" * 1000, "x" * 400 + "…"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_what_llguidance_says_is_told_in_a_line(said: str, told: str) -> None:
    assert cleaned(said) == told


def test_keywords_that_say_nothing_are_passed_over(compile_it: Compiler) -> None:
    lists = {"type": "array", "items": {"type": "integer"}, "uniqueItems": False}
    compile_it.try_out(of(json={"properties": {"uniqueItems": lists}, "unevaluatedProperties": True}))
    tag = {"begin": "<t>", "schema": lists, "end": "</t>"}
    compile_it.try_out(
        of(structural_tag={"type": "structural_tag", "structures": [tag], "triggers": ["<t>"]})
    )
    with pytest.raises(GrammarError, match="not supported: uniqueItems"):
        compile_it.try_out(of(json={**lists, "uniqueItems": True}))
    compile_it.try_out(of(json={"enum": [{"uniqueItems": False}]}))
    assert '"uniqueItems":false' in of(json={"enum": [{"uniqueItems": False}]})


def test_a_thousand_optional_properties_are_not_too_many(compile_it: Compiler) -> None:
    """llguidance's own limit ends at 500, and at the second token."""
    compile_it.try_out(of(json={"type": "object", "properties": {f"p_{i}": {} for i in range(1000)}}))


def test_long_chains_do_not_end_the_process(compile_it: Compiler) -> None:
    """With the usual stack of 8 MiB half of these would."""
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(8000))
    compile_it.try_out(of(grammar=f'start: r0\n{rules}\nr8000: "a"'))
    links: dict[str, Any] = {
        f"d{i}": {"properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1500)
    }
    compile_it.try_out(of(json={"$ref": "#/$defs/d0", "$defs": {**links, "d1500": OBJECT}}))


def test_the_stack_of_other_threads_stays_as_it_is(compile_it: Compiler) -> None:
    usual = threading.stack_size()
    compile_it.matcher(of(regex="new [0-9]"))
    assert threading.stack_size() == usual
    with pytest.raises(ZeroDivisionError):
        compiler.with_stack(1 << 20, lambda: 1 // 0)
    assert threading.stack_size() == usual


# ------------------------------------------------------------------------------------- matchers


def test_matchers_of_one_grammar_know_nothing_of_each_other(compile_it: Compiler) -> None:
    grammar = of(choice=["yes", "no"])
    one, other = compile_it.matcher(grammar), compile_it.matcher(grammar)
    before = allowed_ids(other, compile_it.vocab_size)
    assert one.consume_token(int(before[0]))
    assert list(allowed_ids(other, compile_it.vocab_size)) == list(before)
    assert list(allowed_ids(compile_it.matcher(grammar), compile_it.vocab_size)) == list(before)


def test_it_ends_with_any_of_the_ends_and_with_nothing_beyond_the_tokenizer(real_model: Path) -> None:
    made = Extended(real_model, (), False, num_wider=300)
    everything = made.compiler.matcher(of(regex="(?s:.)*"))
    allowed = allowed_ids(everything, made.vocab_size)
    assert set(EOS_IDS) <= set(allowed)
    assert allowed.max() < made.vocab_size - 300
    done = made.compiler.matcher(of(choice=["yes"]))
    assert refused(done, made.vocab_size, made.ids("yes")) is None
    assert set(allowed_ids(done, made.vocab_size)) == set(EOS_IDS)
    assert done.consume_token(EOS_IDS[1])
    assert done.is_stopped()


def test_special_tokens_are_no_text(real_model: Path) -> None:
    sampler = sampler_of(real_model)
    matcher = sampler.compiler.matcher(of(regex="(?s:.)*"))
    special = set(sampler.special_ids.values())
    assert special & set(allowed_ids(matcher, sampler.vocab_size)) == set(EOS_IDS)


def compiled_by(made: Compiler, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What it compiles from now on, each time."""
    compiled: list[str] = []
    compile_new = made._compile

    def counted(grammar: str) -> Any:
        compiled.append(grammar)
        return compile_new(grammar)

    monkeypatch.setattr(made, "_compile", counted)
    return compiled


def test_what_was_compiled_lately_is_kept_within_bounds(
    real_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_of_test = Extended(real_model, (), False).compiler
    compiled = compiled_by(compiler_of_test, monkeypatch)
    monkeypatch.setattr(compiler, "MAX_COMPILED", 3)
    a, b, c, d = (of(regex=letter) for letter in "abcd")
    for grammar in (a, b, c, a, d, a, b):  # with d, b has to go; a was asked for since
        compiler_of_test.matcher(grammar)
    assert compiled == [a, b, c, d, b]
    monkeypatch.setattr(compiler, "MAX_COMPILED_TEXT", len(a) + 20)
    compiler_of_test.matcher(c + "\n" * 18)
    compiled.clear()
    compiler_of_test.matcher(b)
    assert compiled == [b]
    with pytest.raises(GrammarError):
        compiler_of_test.matcher("nothing")


def test_a_grammar_may_have_several_originals_unless_it_takes_long(
    real_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(real_model)
    source = (real_model / "tokenizer.json").read_text()
    made = Compiler(source, sampler.vocab_size, EOS_IDS, num_originals=3)
    compiled = compiled_by(made, monkeypatch)
    monkeypatch.setattr(compiler, "QUICK_SECONDS", 1e9)
    quick, slow = of(regex="a"), of(regex="b")
    matchers = [made.matcher(quick) for _ in range(5)]
    assert compiled == [quick] * 3
    monkeypatch.setattr(compiler, "QUICK_SECONDS", 0.0)
    matchers += [made.matcher(slow) for _ in range(5)]
    assert compiled == [quick] * 3 + [slow]
    assert all(len(allowed_ids(matcher, sampler.vocab_size)) for matcher in matchers)


def test_each_original_counts_for_what_is_kept(real_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (real_model / "tokenizer.json").read_text()
    made = Compiler(source, sampler_of(real_model).vocab_size, EOS_IDS, num_originals=3)
    monkeypatch.setattr(compiler, "QUICK_SECONDS", 1e9)
    a, b = of(regex="a"), of(regex="b")
    monkeypatch.setattr(compiler, "MAX_COMPILED_TEXT", 3 * len(a))
    for _ in range(4):
        made.matcher(a)
    assert list(made._compiled) == [a]
    made.matcher(b)
    assert list(made._compiled) == [b]
    assert made._num_characters == len(b)


def test_many_threads_get_matchers(compile_it: Compiler) -> None:
    grammars = [
        of(json={"type": "object", "properties": {f"key{i % 5}": {"type": "integer"}}}) for i in range(40)
    ]
    with ThreadPoolExecutor(8) as threads:
        matchers = list(threads.map(compile_it.matcher, grammars))
    firsts = {len(allowed_ids(matcher, compile_it.vocab_size)) for matcher in matchers}
    assert len(set(map(id, matchers))) == 40
    assert len(firsts) == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", json.dumps({"added_tokens": None, "model": {}})])
def test_a_tokenizer_that_cannot_be_read(text: str) -> None:
    with pytest.raises(GrammarError, match="cannot read the model's tokenizer"):
        Compiler(text, 100, [0])


@pytest.mark.parametrize(
    "held", [{"json": {"required": ["a"], "properties": {"a": {"const": 1}}}}, {"json_object": True}]
)
def test_white_space_comes_to_an_end(real_model: Path, held: dict[str, Any]) -> None:
    """A model that would write nothing else has to go on."""
    sampler = sampler_of(real_model)
    matcher = sampler.compiler.matcher(of(**held))
    (space,), (brace,) = (sampler.tokenizer.encode(text).ids for text in " {")
    assert matcher.consume_token(brace)
    spaces = 0
    while space in allowed_ids(matcher, sampler.vocab_size):
        assert matcher.consume_token(space)
        spaces += 1
        assert spaces <= 64
    assert spaces == 64


@pytest.mark.parametrize(
    "held",
    [
        {"json": {"enum": ["<|im_start|>"]}},
        {"json": {"required": ["<|im_end|>"], "properties": {"<|im_end|>": {"type": "integer"}}}},
        {"choice": ["<|im_start|>a"]},
        {"regex": r"<\|im_start\|>b"},
        {"grammar": 'start: "<|im_start|>"'},
        {
            "json": {"const": "<|im_end|>"},
            "behind": {"start": "<|im_start|>", "end": "<|im_end|>", "is_open": True},
        },
    ],
)
def test_what_is_held_may_spell_a_special_token(real_model: Path, held: dict[str, Any]) -> None:
    """It is written in other tokens."""
    sampler = sampler_of(real_model)
    if isinstance(behind := held.get("behind"), dict):
        held = held | {"behind": Thinking(**behind)}
    grammar = grammar_of(StructuredOutputs(**held), special_ids=sampler.special_ids)
    for seed in range(5):
        tokens = sampler.sample(grammar, seed)
        if "behind" not in held:
            assert not set(tokens) & set(sampler.special_ids.values())


def test_a_format_that_is_not_known_is_a_note(real_model: Path) -> None:
    sampler = sampler_of(real_model)
    for name in ("password", "int32", "bogus"):
        matcher = sampler.compiler.matcher(
            of(json={"items": {"type": "string", "format": name}, "minItems": 1})
        )
        assert matcher.consume_tokens(sampler.tokenizer.encode('["any thing"]').ids)


def test_classes_of_characters_are_ascii(real_model: Path) -> None:
    sampler = sampler_of(real_model)
    grammar = of(regex=r"\d{3}\w\s")
    for seed in range(10):
        text = sampler.tokenizer.decode(sampler.sample(grammar, seed))
        assert text.isascii(), text
        assert text[:3].isdigit(), text
