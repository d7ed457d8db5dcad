"""Numbers of schemas that outputs could not be held to are refused, with where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tpworker.grammar import Compiler, GrammarError, grammar_of
from tpworker.grammar.exactness import inexact
from tpworker.structured_outputs import StructuredOutputs

FLOAT = 1 << 53


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"minimum": FLOAT + 1}, "minimum=9007199254740993: "),
        ({"minimum": 1 << 63}, "minimum="),
        ({"minimum": 1e30}, "minimum="),
        ({"exclusiveMaximum": FLOAT + 3}, "exclusiveMaximum="),
        ({"maximum": -FLOAT - 1}, "maximum="),
        ({"minimum": 10**400}, "minimum="),
        ({"const": FLOAT + 1}, "const="),
        ({"enum": ["a", {"b": [-(10**30)]}]}, "enum="),
        ({"properties": {"p": {"anyOf": [{}, {"const": 1 << 64}]}}}, "at #/properties/p/anyOf/1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_would_be_rounded_to_more_is_told(schema: dict[str, Any], where: str) -> None:
    told = inexact(schema)
    assert where in told
    assert "2^53" in told


@pytest.mark.parametrize(
    "schema",
    [
        {"minimum": -(1 << 63), "maximum": (1 << 63) - 1},
        {"minimum": 0, "maximum": (1 << 64) - 1},
        {"maximum": FLOAT + 1, "minimum": FLOAT + 3},
        {"const": FLOAT, "enum": [True, 1e300, "9007199254740993"]},
        {"properties": {"const": {"minimum": 1}, "minimum": {}}, "default": 1 << 70},
        True,
        {"minimum": True, "maximum": "x"},
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_held_to_exactly_or_more_narrowly_is_taken(schema: Any) -> None:
    assert inexact(schema) == ""


@pytest.mark.parametrize(
    "outputs",
    [
        {"json": {"items": {"const": FLOAT + 1}}},
        {"grammar": 'start: "a" %json {"items": {"const": 9007199254740993}}'},
    ],
    ids=["schema", "grammar"],
)
def test_it_is_refused_wherever_a_schema_stands(outputs: dict[str, Any], real_model: Path) -> None:
    compiler = Compiler((real_model / "tokenizer.json").read_text(), 49152, [2])
    with pytest.raises(GrammarError, match=r"const=9007199254740993: .*, at #/items$"):
        compiler.try_out(grammar_of(StructuredOutputs(**outputs)))


def test_bounds_of_64_bits_are_taken(real_model: Path) -> None:
    compiler = Compiler((real_model / "tokenizer.json").read_text(), 49152, [2])
    for bounds in (
        {"minimum": -(1 << 63), "maximum": (1 << 63) - 1},
        {"minimum": 0, "maximum": (1 << 64) - 1},
    ):
        compiler.try_out(grammar_of(StructuredOutputs(json={"items": {"type": "integer", **bounds}})))
