"""What schemas say of parameters, whatever a client writes there."""

from __future__ import annotations

from typing import Any

import pytest

from tpworker.errors import InvalidRequest
from tpworker.parsing import TOOL_FORMATS, CallArguments, Function, OutputParser
from tpworker.parsing.argument_values import as_json
from tpworker.parsing.schemas import branches, types_of

A = {"$ref": "#/$defs/A"}
TAGGED = ["glm45", "qwen3_coder"]


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
    written = {
        "glm45": "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
        "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
    }
    parser = OutputParser(None, TOOL_FORMATS[name], [Function("f", root(a))])
    *_, arguments = [*parser.feed(written[name]), *parser.finish()]
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
@pytest.mark.parametrize("schema", [{"allOf": 5}, {"type": "string", "anyOf": 5}, 5, None, [], {"enum": 5}])
def test_what_is_no_schema_says_nothing(name: str, schema: Any) -> None:
    function = Function("f", {"type": "object", "properties": {"x": schema}})
    assert TOOL_FORMATS[name].grammar([function], is_required=True, is_parallel=True)


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
