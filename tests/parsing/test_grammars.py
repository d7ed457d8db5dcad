"""Grammars of calls, as llguidance reads them: what they let through is calls, of the functions' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.parsing.streams import FAMILIES, MARKS, Call, Family, calls, content, parsed
from tpworker.parsing import TOOL_FORMATS, Function
from tpworker.parsing.lark import arguments_schema

EOS = 2
LONGEST = 400  # tokens
THINK = "<think>"

FUNCTIONS = (
    Function(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 0, "maximum": 9},
                "unit": {"enum": ["c", "f"]},
                "when": {"type": ["string", "null", "integer"]},
            },
            "required": ["city"],
        },
    ),
    Function("get"),
    Function(
        "look_up",
        {
            "type": "object",
            "properties": {
                "tags": {"type": "array", "items": {"$ref": "#/$defs/Tag"}, "maxItems": 2},
                "note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
                "kind": {"$ref": "#/$defs/Kind"},
                "deep": {
                    "type": "object",
                    "properties": {"x": {"type": "boolean"}},
                    "required": ["x"],
                    "additionalProperties": False,
                },
            },
            "required": ["deep", "kind"],
            "$defs": {
                "Tag": {"type": "string", "maxLength": 3},
                "Kind": {"enum": ["a", "b</c>", THINK, "<tool_call>", 3, None]},
            },
        },
    ),
    Function(
        "match",
        {
            "type": "object",
            "properties": {
                "id": {"type": "string", "pattern": "^[a-z]{2}/[0-9]{1,3}$"},
                "mix": {"oneOf": [{"type": "integer", "maximum": 5, "minimum": 0}, {"type": "string"}]},
                "all": {"allOf": [{"$ref": "#/$defs/Letters"}], "default": "ab"},
            },
            "required": ["id", "mix", "all"],
            "$defs": {"Letters": {"type": "string", "minLength": 2, "maxLength": 4, "pattern": "b"}},
        },
    ),
)


class Vocabulary(NamedTuple):
    """A tokenizer, and the ids of the tokens that were added to it, by name."""

    tokenizer: LLTokenizer
    plain: LLTokenizer
    """The one that none were added to."""
    added: Mapping[str, int]

    def tokens(self, text: str) -> list[int]:
        """Of a text: marks that were added are tokens, all else is spelt."""
        names = [name for name in self.added if name in MARKS]
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        ids = [[self.added[part]] if part in names else self.plain.tokenize_str(part) for part in parts]
        return [i for some in ids for i in some]

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokenizer.decode_bytes([i]) for i in ids).decode()


def vocabulary_of(folder: Path, added: Mapping[str, bool]) -> Vocabulary:
    """The default model's, with tokens that are special or not."""
    backend: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    ids = {name: len(backend["model"]["vocab"]) + number for number, name in enumerate(added)}
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    backend["added_tokens"] += [
        {"id": ids[name], "content": name, "special": is_special, **kind}
        for name, is_special in added.items()
    ]
    plain = LLTokenizer((folder / "tokenizer.json").read_text(), eos_token=EOS)
    return Vocabulary(LLTokenizer(json.dumps(backend), eos_token=EOS), plain, ids)


@pytest.fixture(scope="module")
def vocabularies(real_model: Path) -> dict[str, Vocabulary]:
    """With no mark as a token, with marks as tokens that are not special, and special ones."""
    return {
        "characters": vocabulary_of(real_model, {}),
        "tokens": vocabulary_of(real_model, dict.fromkeys([*MARKS, THINK], False)),
        "special tokens": vocabulary_of(real_model, dict.fromkeys([*MARKS, THINK], True)),
    }


def matcher_of(vocabulary: Vocabulary, grammar: str) -> LLMatcher:
    matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def allowed(matcher: LLMatcher) -> np.ndarray[Any, Any]:
    """A bool for each token."""
    mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(mask, bitorder="little").astype(bool)


def sample(
    matcher: LLMatcher, begun: list[int], likely: Sequence[list[int]], rng: np.random.Generator
) -> list[int] | None:
    """Any tokens that it allows, up to its end; None: it has come to none. Some in a row are likelier."""
    ids = list(begun)
    assert matcher.consume_tokens(ids), matcher.get_error()
    while len(ids) < LONGEST:
        mask = allowed(matcher)
        assert mask.any(), matcher.get_error()
        some = [row for row in likely if matcher.validate_tokens(row) == len(row)]
        if mask[EOS]:
            some = [[EOS], *some] if len(ids) < LONGEST // 2 else [[EOS]]
        is_likely = bool(some) and rng.random() < 0.5
        chosen = some[rng.integers(len(some))] if is_likely else [int(rng.choice(np.flatnonzero(mask)))]
        if chosen == [EOS]:
            return ids
        assert matcher.consume_tokens(chosen), matcher.get_error()
        ids += chosen
    return None


AGAIN = ("</parameter>\n", "\n<tool_call>", "; ")
TAGS = ("</parameter>\n", "<parameter=a>\n", ">\n1\n</parameter>\n", "</function>\n</tool_call>")
BEGINNINGS = {"llama3_json": "<|python_tag|>", "mistral": "Hi \n[TOOL_CALLS]"}


@pytest.mark.parametrize("is_parallel", [True, False], ids=["parallel", "one call"])
@pytest.mark.parametrize("is_required", [True, False], ids=["required", "auto"])
@pytest.mark.parametrize("marks", ["characters", "tokens", "special tokens"])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_what_a_grammar_lets_through_is_calls_of_the_schemas(
    vocabularies: dict[str, Vocabulary], name: str, marks: str, is_required: bool, is_parallel: bool
) -> None:
    vocabulary, tools = vocabularies[marks], TOOL_FORMATS[name]
    grammar = tools.grammar(
        FUNCTIONS, is_required=is_required, is_parallel=is_parallel, special_ids=vocabulary.added
    )
    assert grammar.startswith("start: ")
    tokenize = vocabulary.tokenizer.tokenize_str
    likely = [tokenize(text, parse_special=True) for text in (*'"}],1a', *MARKS, *AGAIN)]
    begun = [] if is_required else tokenize(BEGINNINGS.get(name, "Hi \n<tool_call>"), parse_special=True)
    rng = np.random.default_rng(14)
    num_samples = 0
    for _ in range(6):
        ids = sample(matcher_of(vocabulary, grammar), begun, likely, rng)
        if ids is None:
            continue
        num_samples += 1
        events = parsed([vocabulary.text(ids)], tools, FUNCTIONS)
        found = calls(events)
        assert found
        assert is_parallel or len(found) == 1
        assert not (is_required and content(events))
        for function_name, arguments in found:
            function = next(function for function in FUNCTIONS if function.name == function_name)
            jsonschema.validate(json.loads(arguments), arguments_schema(function.parameters))
            jsonschema.validate(json.loads(arguments), function.parameters)
    assert num_samples >= 4


@pytest.mark.parametrize("marks", ["characters", "tokens", "special tokens"])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_text_goes_on_as_it_likes_where_no_call_is_required(
    vocabularies: dict[str, Vocabulary], name: str, marks: str
) -> None:
    vocabulary = vocabularies[marks]
    for is_parallel in (True, False):
        grammar = TOOL_FORMATS[name].grammar(
            FUNCTIONS, is_required=False, is_parallel=is_parallel, special_ids=vocabulary.added
        )
        for text in ("", "Hi.", "a < b\n\n<tool>[TOOL] </x", " {" if name != "llama3_json" else "a {"):
            matcher = matcher_of(vocabulary, grammar)
            assert matcher.consume_tokens(vocabulary.tokenizer.tokenize_str(text))
            assert allowed(matcher)[EOS]


WRITTEN = [
    (family, marks)
    for family in FAMILIES
    for marks in ("characters", "tokens", "special tokens")
    if family.name not in ("glm47", "mistral_ids", "mistral", "mistral11")
    or family.name == ("mistral" if marks == "characters" else "mistral11")
]
"""As the grammar of a tokenizer has it: of Mistral's newer marks, if they are tokens."""


@pytest.mark.parametrize(("family", "marks"), WRITTEN, ids=lambda value: getattr(value, "name", value))
def test_calls_are_let_through_as_templates_write_them(
    vocabularies: dict[str, Vocabulary], family: Family, marks: str
) -> None:
    """Several of them only where they may be several."""
    vocabulary = vocabularies[marks]
    one: Call = ("get_weather", {"city": "Paris", "days": 3, "unit": "c", "when": "3 o'clock"})
    other: Call = ("look_up", {"tags": ["a", "b"], "note": None, "kind": THINK, "deep": {"x": True}})
    for is_required in (True, False):
        for is_parallel in (True, False):
            grammar = family.tools.grammar(
                FUNCTIONS, is_required=is_required, is_parallel=is_parallel, special_ids=vocabulary.added
            )
            for before, written, is_right in [
                ("", [one], True),
                ("", [one, other, one], is_parallel),
                ("Hi", [other], not is_required),
                ("", [("get", {"a": 1})], False),
                ("", [("get_weather", {"days": 1})], False),
                ("", [("look_down", {})], False),
                ("", [("match", {"id": "ab/1", "mix": 5, "all": "abc"})], True),
                ("", [("match", {"id": "ab/1", "mix": 9, "all": "abc"})], False),
            ]:
                text = family.write(before, written).replace(', "id": "a1b2c3d4e"', "")
                ids = vocabulary.tokens(text)
                matcher = matcher_of(vocabulary, grammar)
                is_taken = matcher.try_consume_tokens(ids) == len(ids) and bool(allowed(matcher)[EOS])
                assert is_taken == is_right, (grammar, text)


@pytest.mark.parametrize("marks", ["tokens", "special tokens"])
@pytest.mark.parametrize("name", ["hermes", "glm45", "mistral", "llama3_json"])
def test_text_does_not_spell_a_mark_that_is_a_token(
    vocabularies: dict[str, Vocabulary], name: str, marks: str
) -> None:
    """A parser of text would take that for a call, and nothing holds it to its schema."""
    mark = BEGINNINGS.get(name, "<tool_call>").removeprefix("Hi \n")
    vocabulary = vocabularies[marks]
    grammar = TOOL_FORMATS[name].grammar(
        FUNCTIONS, is_required=False, is_parallel=True, special_ids=vocabulary.added
    )
    matcher = matcher_of(vocabulary, grammar)
    assert not matcher.consume_tokens(vocabulary.plain.tokenize_str(f"a {mark}"))


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_only_the_functions_given_are_called(vocabularies: dict[str, Vocabulary], name: str) -> None:
    """A named choice of tools is one function, required, once."""
    vocabulary, tools = vocabularies["characters"], TOOL_FORMATS[name]
    grammar = tools.grammar(FUNCTIONS[1:2], is_required=True, is_parallel=False)
    rng = np.random.default_rng(14)
    for _ in range(4):
        ids = sample(matcher_of(vocabulary, grammar), [], [], rng)
        assert ids is not None
        assert calls(parsed([vocabulary.text(ids)], tools, FUNCTIONS)) == [("get", "{}")]


@pytest.mark.parametrize("marks", ["characters", "tokens", "special tokens"])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_schema_may_spell_tokens(vocabularies: dict[str, Vocabulary], name: str, marks: str) -> None:
    """They are offered where there is no other way to go on, and refused then, if that is not forbidden."""
    vocabulary, tools = vocabularies[marks], TOOL_FORMATS[name]
    key = "key" if name in ("glm45", "qwen3_coder") else THINK  # keys between tags have no `<`
    schema = {"type": "object", "properties": {key: {"const": "<tool_call>x"}}, "required": [key]}
    functions = (Function("f", schema),)
    grammar = tools.grammar(functions, is_required=True, is_parallel=False, special_ids=vocabulary.added)
    matcher = matcher_of(vocabulary, grammar)
    ids: list[int] = []
    while not (mask := allowed(matcher))[EOS]:
        ids.append(int(np.flatnonzero(mask)[-1]))  # the added ones are last
        assert matcher.consume_token(ids[-1]), matcher.get_error()
    [(_, arguments)] = calls(parsed([vocabulary.text(ids)], tools, functions))
    assert json.loads(arguments) == {key: "<tool_call>x"}


@pytest.mark.parametrize("name", ["glm45", "qwen3_coder"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object"},
        {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9}},
        {"$ref": "#/$defs/P", "$defs": {"P": {"properties": {"a": {"const": "x"}}, "required": ["a"]}}},
    ],
)
def test_parameters_that_are_not_named_or_elsewhere(
    vocabularies: dict[str, Vocabulary], name: str, parameters: dict[str, Any]
) -> None:
    vocabulary, tools = vocabularies["characters"], TOOL_FORMATS[name]
    functions = (Function("f", parameters),)
    grammar = tools.grammar(functions, is_required=True, is_parallel=False)
    likely = [vocabulary.tokenizer.tokenize_str(text) for text in (*MARKS, *TAGS)]
    rng = np.random.default_rng(14)
    found = [
        calls(parsed([vocabulary.text(ids)], tools, functions))
        for _ in range(8)
        if (ids := sample(matcher_of(vocabulary, grammar), [], likely, rng)) is not None
    ]
    assert len(found) >= 6
    for [(function, arguments)] in found:
        assert function == "f"
        jsonschema.validate(json.loads(arguments), parameters)


def test_a_function_takes_what_its_schema_names() -> None:
    named: dict[str, Any] = {"properties": {"a": {}}}
    assert arguments_schema({}) == {"type": "object", "properties": {}, "additionalProperties": False}
    assert arguments_schema(named) == {"type": "object", **named, "additionalProperties": False}
    for others in ({"additionalProperties": True}, {"anyOf": [{}]}, {"patternProperties": {"b": {}}}):
        assert arguments_schema({**named, **others}) == {"type": "object", **named, **others}
    assert arguments_schema({"type": "object"}) == {"type": "object"}
