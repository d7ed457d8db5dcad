"""What schemas say of parameters, whatever a client writes there."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpworker.errors import InvalidRequest
from tpworker.parsing import TOOL_FORMATS, CallArguments, CallBegan, Function, OutputParser
from tpworker.parsing.argument_values import as_json
from tpworker.parsing.schemas import branches, types_of

A = {"$ref": "#/$defs/A"}
WRITTEN = {
    "glm45": "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
}
TAGGED = tuple(WRITTEN)


def root(a: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": A}, "$defs": {"A": a}}


@pytest.mark.parametrize(
    ("a", "types"),
    [
        ({"anyOf": [A] * 9}, set()),
        ({"type": "string", "anyOf": [A] * 9}, set()),
        ({"anyOf": [A, {"type": "string"}, {"oneOf": [A, A, {"type": "null"}]}, A]}, {"string", "null"}),
        ({"allOf": [A] * 9}, set()),
        ({"allOf": [{"anyOf": [A] * 9}, *[A] * 9, {"type": "string"}]}, {"string"}),
        ({"anyOf": [{"allOf": [{"$ref": "#/$defs/A"}]}, {"type": "string"}]}, set()),
        ({"anyOf": [{"const": i} for i in range(256)]}, {"integer"}),
        ({"anyOf": [{"const": i} for i in range(257)]}, set()),
        (A, set()),
    ],
)  # fmt: skip
def test_what_is_within_itself_is_looked_at_once(a: Any, types: set[str]) -> None:
    schema = root(a)
    assert types_of(A, schema) == types
    assert len(list(branches(A, schema))) <= 257


def test_long_ways_have_an_end() -> None:
    chain = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(3000)}
    schema = {"$defs": {**chain, "d3000": {"type": "integer"}}}
    assert types_of({"$ref": "#/$defs/d0"}, schema) == {"integer"}
    parts = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(3000)}
    assert types_of({"$ref": "#/$defs/d0"}, {"$defs": parts}) == set()


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize("a", [{"anyOf": [A] * 9}, {"type": "string", "anyOf": [A] * 9}, {"allOf": [A] * 9}])
def test_calls_with_such_schemas_are_read(name: str, a: Any) -> None:
    parser = OutputParser(None, TOOL_FORMATS[name], [Function("f", root(a))])
    *_, arguments = [*parser.feed(WRITTEN[name]), *parser.finish()]
    assert arguments == CallArguments(0, '{"x": 1}')


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": {}}, "type={}"),
        ({"type": []}, r"type=\[\]"),
        ({"type": "str"}, "type='str'"),
        ({"type": ["string", "str"]}, "type='str'"),
        ({"enum": []}, "it allows no value"),
        ({"type": "string", "const": 3}, "it allows no value"),
        ({"anyOf": [A] * 9}, "it allows no value"),
    ],
)
def test_what_has_no_value_is_refused(name: str, schema: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as refused:
        TOOL_FORMATS[name].grammar([Function("f", root(schema))], is_required=True, is_parallel=True)
    assert refused.value.parameter == "tools"


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize("key", ["", "a<b", "a>", "a\nb"])
def test_a_name_that_could_not_be_read_back_is_refused(name: str, key: str) -> None:
    function = Function("f", {"type": "object", "properties": {key: {}}})
    with pytest.raises(InvalidRequest, match="a parameter is named") as refused:
        TOOL_FORMATS[name].grammar([function], is_required=True, is_parallel=True)
    assert refused.value.parameter == "tools"


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize("schema", [{"allOf": 5}, {"type": "string", "anyOf": 5}, 5, None, [], {"enum": 5}])
def test_what_is_no_schema_says_nothing(name: str, schema: Any) -> None:
    function = Function("f", {"type": "object", "properties": {"x": schema}})
    assert TOOL_FORMATS[name].grammar([function], is_required=True, is_parallel=True)


SCALARS = st.sampled_from(
    [None, True, 0, -1, 1.5, "", "string", "object", "integer", "#", "#/$defs/A", "#/x"]
)
WORDS = (
    "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "A", "x", "properties", "required",
    "additionalProperties", "items", "pattern", "minLength", "maxLength",
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(TAGGED), st.dictionaries(st.sampled_from(WORDS), ANYTHING, max_size=4), st.booleans())
def test_no_schema_is_a_bug(name: str, parameters: dict[str, Any], is_parameter: bool) -> None:
    if is_parameter:
        parameters = {"properties": {"x": parameters}, "$defs": {"A": parameters}}
    function = Function("f", parameters)
    with suppress(InvalidRequest):
        assert TOOL_FORMATS[name].grammar([function], is_required=True, is_parallel=True)
    parser = OutputParser(None, TOOL_FORMATS[name], [function])
    began, *_ = [*parser.feed(WRITTEN[name]), *parser.finish()]
    assert began == CallBegan(0, "f")


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("true", {"string", "number"}, '"true"'),
        ("true", {"string", "integer"}, '"true"'),
        ("true", {"string", "boolean"}, "true"),
        ("1", {"string", "boolean"}, '"1"'),
        ("1", {"string", "number"}, "1"),
        ("1.0", {"string", "integer"}, "1.0"),
    ],
)
def test_a_value_of_several_types(text: str, types: set[str], value: str) -> None:
    assert as_json(text, frozenset(types)) == value
