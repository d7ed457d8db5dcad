"""Fifty schemas of the kinds that public suites have: they compile, and what is written under their masks
parses and validates, whatever tokens are chosen. jsonschema is who judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.grammar.sampling import sampler_of
from tpworker import StructuredOutputs
from tpworker.grammar import grammar_of

SUITE: list[dict[str, Any]] = json.loads((Path(__file__).parent / "schemas.json").read_text())
NUM_OUTPUTS = 4
CHECKED_FORMATS = ("ipv4", "ipv6", "email", "uuid")
"""Of dates and times Python knows fewer than RFC 3339 has: no year 0, and no leap second."""


def check(schema: dict[str, Any], text: str) -> None:
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    validator(schema, format_checker=jsonschema.FormatChecker(CHECKED_FORMATS)).validate(json.loads(text))


def test_there_are_fifty_of_them() -> None:
    assert len({entry["name"] for entry in SUITE}) == len(SUITE) == 50


@pytest.mark.parametrize("entry", SUITE, ids=lambda entry: entry["name"])
def test_outputs_at_random_validate(entry: dict[str, Any], real_model: Path) -> None:
    sampler = sampler_of(real_model)
    grammar = grammar_of(StructuredOutputs(json=entry["schema"]))
    sampler.compiler.try_out(grammar)
    texts = {sampler.text(sampler.sample(grammar, seed)) for seed in range(NUM_OUTPUTS)}
    assert len(texts) > 1, "all outputs are the same: nothing was chosen"
    for text in texts:
        check(entry["schema"], text)


@pytest.mark.parametrize("entry", SUITE, ids=lambda entry: entry["name"])
def test_a_schema_is_the_same_as_text(entry: dict[str, Any]) -> None:
    as_mapping, as_text = entry["schema"], json.dumps(entry["schema"], indent=2)
    assert StructuredOutputs(json=as_mapping) == StructuredOutputs(json=as_text)


def test_what_the_judge_refuses_is_seen() -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(SUITE[0]["schema"], '{"name": "x", "age": 151, "is_member": true}')


def test_any_object_is_one(real_model: Path) -> None:
    sampler = sampler_of(real_model)
    grammar = grammar_of(StructuredOutputs(json_object=True))
    for seed in range(NUM_OUTPUTS):
        assert isinstance(json.loads(sampler.text(sampler.sample(grammar, seed))), dict)
