"""Whatever a client sends as a schema, an expression or a grammar: it is taken, or told what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.grammar.sampling import sampler_of
from tpworker import InvalidRequest, StructuredOutputs
from tpworker.grammar import GrammarError, grammar_of

KEYS = (
    "$defs", "$ref", "additionalProperties", "allOf", "anyOf", "begin", "const", "content", "default",
    "elements", "end", "enum", "exclusiveMinimum", "format", "items", "json_schema", "maxItems", "maxLength",
    "maximum", "maxProperties", "minItems", "minLength", "minimum", "minProperties", "multipleOf", "not",
    "oneOf", "pattern", "patternProperties", "prefixItems", "properties", "required", "structures", "tags",
    "triggers", "type", "uniqueItems", "x-guidance", "a", "b",
)  # fmt: skip
WORDS = (
    "#", "#/$defs/a", "#/properties/a", "a", "any_text", "array", "boolean", "const_string", "date",
    "integer", "json_schema", "null", "number", "object", "string", "tag", "triggered_tags", "uuid", "x",
    "[a-z]+", "(", "^a$", "\x00", "é",
)  # fmt: skip
PARTS_OF_LARK = (
    "start", "a", "A", "B", ":", "|", '"x"', "/y/", "/(/", "%json", "{", "}", '"type"', "\n", "*", "+", "(",
    ")", "<a>", "[lazy]", "~", "&", "@", "::=", "root", "[a-z]", "\\",
)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.sampled_from(KEYS) | st.text(max_size=3)
VALUES: st.SearchStrategy[Any] = st.recursive(
    LEAVES | st.sampled_from(WORDS) | st.text(max_size=5),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=5)
LARK = st.lists(st.sampled_from(PARTS_OF_LARK), min_size=1, max_size=14).map(" ".join)

small = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def take(folder: Path, **outputs: Any) -> None:
    """Compiles it and goes some steps. What is wrong is said in one line; nothing else is raised."""
    sampler = sampler_of(folder)
    said = "taken"
    try:
        sampler.compiler.try_out(grammar_of(StructuredOutputs(**outputs), special_ids=sampler.special_ids))
    except (InvalidRequest, GrammarError) as error:
        said = str(error)
    assert 0 < len(said) < 1000
    assert "\n" not in said
    assert "backtrace" not in said


@small
@given(schema=OBJECTS)
def test_any_small_json_as_a_schema(schema: dict[str, Any], real_model: Path) -> None:
    take(real_model, json=schema)


@small
@given(tag=OBJECTS, form=st.sampled_from(["format", "structures"]), inner=VALUES)
def test_any_small_json_as_a_structural_tag(
    tag: dict[str, Any], form: str, inner: Any, real_model: Path
) -> None:
    take(real_model, structural_tag={**tag, "type": "structural_tag", form: inner})


@small
@given(regex=st.text(min_size=1, max_size=12) | st.text("ab()[]{}*+?|\\^$.-,01/\n", min_size=1, max_size=12))
def test_any_short_expression(regex: str, real_model: Path) -> None:
    take(real_model, regex=regex)


@small
@given(grammar=LARK)
def test_any_small_grammar(grammar: str, real_model: Path) -> None:
    take(real_model, grammar=grammar)
    take(real_model, grammar=grammar, behind={"start": "<t>", "end": "</t>"})


@small
@given(choice=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=6))
def test_any_choices(choice: list[str], real_model: Path) -> None:
    """One of them is reached, if the model's tokens can write it: this one has no token for some bytes."""
    sampler = sampler_of(real_model)
    choice = [text for text in choice if sampler.text(sampler.tokenizer.encode(text).ids) == text]
    if choice:
        grammar = grammar_of(StructuredOutputs(choice=choice))
        assert sampler.text(sampler.sample(grammar, seed=len(choice))) in choice
