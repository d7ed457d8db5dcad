"""What a user may say of what outputs are held to; what it means is tested in tests/grammar."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from tpworker import InvalidRequest, SamplingParams, StructuredOutputs, Thinking
from tpworker.structured_outputs import (
    KINDS,
    MAX_GRAMMAR_TEXT,
    MAX_REGEX,
    MAX_SCHEMA,
    MAX_SCHEMA_DEPTH,
    MAX_STRINGS,
    MAX_STRINGS_TOTAL,
)

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": [1, 0.5, None, "é"]}}}
GOOD: dict[str, Any] = {
    "json": SCHEMA,
    "json_object": True,
    "regex": "a+",
    "choice": ["yes", "no"],
    "grammar": 'start: "a"',
    "structural_tag": {"type": "structural_tag"},
}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(kind: str) -> None:
    outputs = StructuredOutputs(**{kind: GOOD[kind]})
    assert outputs.kinds == (kind,)
    others = dict.fromkeys(set(KINDS) - {kind})  # what is None is not given
    assert StructuredOutputs(**{kind: GOOD[kind]}, **others) == outputs


def test_exactly_one_kind() -> None:
    with pytest.raises(InvalidRequest, match="has none of them: give exactly one of json, json_object"):
        StructuredOutputs()
    with pytest.raises(InvalidRequest, match="has json_object, regex: give exactly one of") as caught:
        StructuredOutputs(regex="a", json_object=True)
    assert caught.value.parameter == "structured_outputs"


def test_a_schema_is_kept_as_text_in_its_order() -> None:
    text = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"enum":[1,0.5,null,"é"]}}}'
    for given in (SCHEMA, OrderedDict(SCHEMA), json.dumps(SCHEMA, indent=4)):
        assert StructuredOutputs(json=given).json == text


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("json", "{", "json is not valid JSON"),
        ("json", "[1]", "must be a JSON object"),
        ("json", True, "must be a JSON object"),
        ("json", {"a": {1: 2}}, "a key of json.a is 1"),
        ("json", {"a": [float("nan")]}, r"json.a\[0\] is nan"),
        ("json", '{"a": Infinity}', "json.a is inf"),
        ("json", {"a": {"b": {1, 2}}}, "json.a.b is {1, 2}"),
        ("json", {"a": 10**400}, "json.a is 1000"),
        ("json", '{"a": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("json", {"a": "\ud800"}, "json.a is "),
        ("json", '{"\\ud800": 1}', "a key of json is "),
        ("json", nested(MAX_SCHEMA_DEPTH + 1), f"deeper than {MAX_SCHEMA_DEPTH} levels"),
        ("json", '{"a":' * 100_000, "deeper than|not valid JSON|has .* characters"),
        ("json", {"a": "x" * MAX_SCHEMA}, f"of {MAX_SCHEMA} characters at most"),
        ("json_object", 1, "json_object=1: must be true"),
        ("json_object", "yes", "json_object='yes': must be true"),
        ("regex", 5, "regex=5: must be a string"),
        ("regex", "", "regex='': must be a string of 1 to"),
        ("regex", "a" * (MAX_REGEX + 1), f"of 1 to {MAX_REGEX} characters"),
        ("regex", "\udc80", "in UTF-8"),
        ("grammar", "x" * (MAX_GRAMMAR_TEXT + 1), f"of 1 to {MAX_GRAMMAR_TEXT} characters"),
        ("grammar", {}, "grammar={}: must be a string"),
        ("choice", "yes", "choice='yes': must be 1 to"),
        ("choice", [], "choice=.*: must be 1 to"),
        ("choice", ["a", ""], "none of them empty"),
        ("choice", ["a", 1], "must be 1 to"),
        ("choice", [["a"]], "must be 1 to"),
        ("choice", 5, "choice=5: must be"),
        ("choice", [str(i) for i in range(MAX_STRINGS + 1)], f"must be 1 to {MAX_STRINGS} strings"),
        ("choice", ["x" * MAX_STRINGS_TOTAL, "y"], f"with {MAX_STRINGS_TOTAL} characters at most"),
        ("structural_tag", "5", "must be a JSON object"),
        ("behind", 5, "behind=5: must be a Thinking"),
        ("behind", {"start": "<t>"}, "must be a Thinking"),
        ("behind", {"start": "<t>", "end": "x", "begin": 1}, "behind has 'begin', which is not known"),
        ("behind", {"start": "<t>", "end": ""}, "behind.end='': must be a string of 1 to 256"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_refused_by_name(field: str, value: Any, words: str) -> None:
    others = {"regex": "a"} if field == "behind" else {}
    with pytest.raises(InvalidRequest, match=words) as caught:
        StructuredOutputs(**{field: value}, **others)
    assert caught.value.parameter == "structured_outputs"
    assert str(caught.value).startswith("structured_outputs")
    assert len(str(caught.value)) < 600


def test_the_limits_themselves_are_taken() -> None:
    assert StructuredOutputs(json=nested(MAX_SCHEMA_DEPTH)).json
    assert StructuredOutputs(json={"a": "x" * (MAX_SCHEMA - 8)}).json
    assert StructuredOutputs(regex="a" * MAX_REGEX)
    assert StructuredOutputs(grammar="a" * MAX_GRAMMAR_TEXT)
    assert len(StructuredOutputs(choice=[str(i) for i in range(MAX_STRINGS)]).choice) == MAX_STRINGS


def test_what_holds_itself_or_is_held_many_times_ends() -> None:
    loop: dict[str, Any] = {}
    loop["items"] = loop
    with pytest.raises(InvalidRequest, match="deeper than"):
        StructuredOutputs(json=loop)
    many: list[Any] = []
    for _ in range(40):
        many = [many, many]
    with pytest.raises(InvalidRequest, match=f"more than {MAX_SCHEMA} values"):
        StructuredOutputs(json={"enum": many})


def test_choices_are_each_there_once() -> None:
    assert StructuredOutputs(choice=["a", "b", "a"]).choice == ("a", "b")
    assert StructuredOutputs(choice=(c for c in "ab")).choice == ("a", "b")  # type: ignore[arg-type]


def test_values_of_other_libraries_are_pythons_own() -> None:
    schema = {"maximum": np.int64(5), "minimum": np.float32(0.5), "default": np.bool_(True)}
    assert StructuredOutputs(json=schema).json == '{"maximum":5,"minimum":0.5,"default":true}'
    assert StructuredOutputs(json_object=np.bool_(True)) == StructuredOutputs(json_object=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_they_can_be_copied_and_compared_and_have_a_hash(kind: str) -> None:
    outputs = StructuredOutputs(**{kind: GOOD[kind]}, behind=Thinking(start="<t>", end="</t>"))
    params = SamplingParams(structured_outputs=outputs)
    for same in (
        copy.deepcopy(params),
        dataclasses.replace(params),
        SamplingParams(**dataclasses.asdict(params)),
        SamplingParams(structured_outputs={kind: GOOD[kind], "behind": {"start": "<t>", "end": "</t>"}}),  # type: ignore[arg-type]
    ):
        assert same == params
        assert hash(same) == hash(params)
    assert dataclasses.replace(outputs, behind=None) != outputs
    with pytest.raises(dataclasses.FrozenInstanceError):
        outputs.behind = None  # type: ignore[misc]


def test_they_keep_nothing_of_who_made_them() -> None:
    given = copy.deepcopy(SCHEMA)
    outputs = StructuredOutputs(json=given)
    given["properties"].clear()  # type: ignore[attr-defined]
    assert outputs == StructuredOutputs(json=SCHEMA)


# ------------------------------------------------------------------------------- SamplingParams


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{}", "must be a StructuredOutputs, or a mapping with one of json, json_object"),
        ([], "must be a StructuredOutputs"),
        ({}, "has none of them"),
        ({"regexp": "a"}, "has 'regexp', which is not known: its fields are json, json_object, regex"),
        ({1: "a"}, "has 1, which is not known"),
    ],
)
def test_what_stands_for_them_in_sampling_params(value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        SamplingParams(structured_outputs=value)
    assert caught.value.parameter == "structured_outputs"


@pytest.mark.parametrize(
    ("field", "value"), [("allowed_token_ids", [1, 2]), ("bad_words", ["a"]), ("ignore_eos", True)]
)
def test_what_does_not_go_with_them_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{field}=.*with structured_outputs") as caught:
        SamplingParams(structured_outputs=StructuredOutputs(json_object=True), **{field: value})
    assert caught.value.parameter == field
    assert SamplingParams(**{field: value})


def test_what_goes_with_them() -> None:
    params = SamplingParams(
        structured_outputs=StructuredOutputs(json_object=True), min_tokens=5, stop=["x"], stop_token_ids=[3],
        n=2, logit_bias={5: -10}, presence_penalty=1, repetition_penalty=1.1, logprobs=2, seed=1,
    )  # fmt: skip
    assert params.of_choice(1).structured_outputs == params.structured_outputs
