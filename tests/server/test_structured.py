"""What an output is held to: every way in which clients say it, and what is told of one that is wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pydantic
import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_refusals import CHAT, COMPLETIONS, USER, error_of
from tests.server.test_responses import RESPONSES
from tpworker.errors import InvalidRequest
from tpworker.server.requests.held import Held
from tpworker.structured_outputs import StructuredOutputs

Start = Callable[..., LiveServer]
BASES: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "a"}, CHAT: {"messages": [USER]}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TEXT = json.dumps(SCHEMA)
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}],
    "triggers": ["<a>"],
}


def json_schema(**more: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, **more}}


WAYS: list[tuple[dict[str, Any], StructuredOutputs]] = [
    ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True)),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, StructuredOutputs(json=SCHEMA)),
    ({"response_format": json_schema()}, StructuredOutputs(json=SCHEMA)),
    ({"response_format": json_schema(strict=False, description="b")}, StructuredOutputs(json=SCHEMA)),
    ({"response_format": TAG}, StructuredOutputs(structural_tag=TAG)),
    ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputs(json=SCHEMA)),
    ({"structured_outputs": {"json": TEXT, "regex": None}}, StructuredOutputs(json=SCHEMA)),
    ({"structured_outputs": {"json_object": True}}, StructuredOutputs(json_object=True)),
    ({"structured_outputs": {"regex": "a+"}}, StructuredOutputs(regex="a+")),
    ({"structured_outputs": {"choice": ["b", "a"]}}, StructuredOutputs(choice=["b", "a"])),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutputs(grammar='start: "a"')),
    ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, StructuredOutputs(structural_tag=TAG)),
    ({"guided_json": SCHEMA}, StructuredOutputs(json=SCHEMA)),
    ({"guided_json": TEXT, "guided_regex": None}, StructuredOutputs(json=SCHEMA)),
    ({"guided_regex": "a+"}, StructuredOutputs(regex="a+")),
    ({"guided_choice": ["a"]}, StructuredOutputs(choice=["a"])),
    ({"guided_grammar": 'root ::= "a"'}, StructuredOutputs(grammar='root ::= "a"')),
    ({"structural_tag": TAG}, StructuredOutputs(structural_tag=TAG)),
    ({"json_schema": TEXT}, StructuredOutputs(json=SCHEMA)),
    ({"regex": "a+"}, StructuredOutputs(regex="a+")),
    ({"ebnf": 'root ::= "a"'}, StructuredOutputs(grammar='root ::= "a"')),
    ({"grammar": 'root ::= "a"'}, StructuredOutputs(grammar='root ::= "a"')),
]


@pytest.mark.parametrize("path", BASES)
@pytest.mark.parametrize(("body", "outputs"), WAYS, ids=lambda value: str(value)[:60])
def test_all_ways_to_say_it(
    server: LiveServer, path: str, body: dict[str, Any], outputs: StructuredOutputs
) -> None:
    response = server.post(path, json=BASES[path] | body)
    assert response.status_code == 200, response.text
    assert "X-Ignored-Parameters" not in response.headers
    assert server.runtime.requests[-1][1].structured_outputs == outputs


@pytest.mark.parametrize("path", BASES)
@pytest.mark.parametrize(
    "body",
    [{}, {"response_format": None}, {"response_format": {"type": "text"}}, {"structured_outputs": None}],
)
def test_plain_text_is_held_to_nothing(server: LiveServer, path: str, body: dict[str, Any]) -> None:
    assert server.post(path, json=BASES[path] | body).status_code == 200
    assert server.runtime.requests[-1][1].structured_outputs is None


def test_the_clients_own_schemas(start: Start) -> None:
    class Point(pydantic.BaseModel):
        x: int

    server = start(FakeRuntime(reply=lambda prompt: '{"x": 5}'))
    done = server.openai.chat.completions.parse(
        model=MODEL,
        messages=[USER],  # type: ignore[list-item]
        response_format=Point,
    )
    assert done.choices[0].message.parsed == Point(x=5)
    held = server.runtime.requests[-1][1].structured_outputs
    assert held is not None
    assert held.json is not None
    assert json.loads(str(held.json))["properties"]["x"]["type"] == "integer"


@pytest.mark.parametrize("path", [*BASES, RESPONSES])
def test_a_large_schema_holds_nobody_up(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """It is gone through value by value: not by the thread that serves all others."""
    threads: list[threading.Thread] = []
    outputs_of = Held.outputs

    def outputs(held: Held, *behind: Any) -> StructuredOutputs:
        threads.append(threading.current_thread())
        return outputs_of(held, *behind)

    monkeypatch.setattr(Held, "outputs", outputs)
    loop = server.call(threading.current_thread)
    response = server.post(path, json=(BASES | {RESPONSES: {"input": "a"}})[path] | {"guided_json": SCHEMA})
    assert response.status_code == 200
    assert threads
    assert loop not in threads


def test_what_is_not_known_of_it_is_told(server: LiveServer) -> None:
    body = {"response_format": json_schema(news=1) | {"more": 1}}
    response = server.post(CHAT, json=BASES[CHAT] | body)
    assert response.headers["X-Ignored-Parameters"] == (
        "response_format.json_schema.news, response_format.more"
    )
    body = {"structured_outputs": {"regex": "a", "disable_fallback": True}}
    response = server.post(CHAT, json=BASES[CHAT] | body)
    assert response.headers["X-Ignored-Parameters"] == "structured_outputs.disable_fallback"


@pytest.mark.parametrize("path", BASES)
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "'json'"),
        ({"response_format": {}}, "response_format.type", "response_format.type=None: it should be one of"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "response_format.json_schema.schema is missing",
        ),
        (
            {"response_format": json_schema(schema=[1])},
            "response_format.json_schema.schema",
            "[1]: it should be a JSON object",
        ),
        (
            {"response_format": json_schema(schema={"a": [[[]]] and json.loads("[" * 200 + "]" * 200)})},
            "response_format.json_schema.schema",
            "response_format.json_schema.schema nests objects and lists deeper than 100 levels",
        ),
        (
            {"response_format": json_schema(strict="yes")},
            "response_format.json_schema.strict",
            "response_format.json_schema.strict='yes': it should be true or false",
        ),
        ({"response_format": json_schema(name=5)}, "response_format.json_schema.name", "a string"),
        ({"structured_outputs": {}}, "structured_outputs", "has none of them: give exactly one of json"),
        (
            {"structured_outputs": {"regex": "a", "json": {}}},
            "structured_outputs",
            "has regex and json: give exactly one",
        ),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "structured_outputs.regex=5"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 to 10000 strings"),
        ({"structured_outputs": [1]}, "structured_outputs", "[1]"),
        ({"guided_json": "{"}, "guided_json", "guided_json is not valid JSON"),
        ({"guided_json": 5}, "guided_json", "guided_json=5: it should be a JSON object, or JSON of one"),
        ({"guided_choice": [""]}, "guided_choice", "must be 1 to 10000 strings, none of them empty"),
        ({"guided_choice": "ab"}, "guided_choice", "'ab'"),
        ({"guided_regex": ""}, "guided_regex", "guided_regex='': must be a string of 1 to"),
        ({"guided_regex": "a", "ebnf": "b"}, "ebnf", "guided_regex and ebnf all say what"),
        (
            {"response_format": json_schema(), "regex": "b"},
            "regex",
            "response_format.json_schema.schema and regex all say",
        ),
        (
            {"guided_regex": "a", "bad_words": ["b"]},
            "bad_words",
            "left out with guided_regex",
        ),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "false with guided_regex"),
    ],
)  # fmt: skip
def test_what_cannot_be(server: LiveServer, path: str, body: dict[str, Any], param: str, words: str) -> None:
    response = server.post(path, json=BASES[path] | body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"response_format": json_schema()}, "response_format.json_schema.schema"),
        ({"guided_json": SCHEMA}, "guided_json"),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_runtime_finds_wrong_is_told_by_the_clients_name(
    start: Start, body: dict[str, Any], name: str, stream: bool
) -> None:
    async def refuse(position: int) -> None:
        raise InvalidRequest("structured_outputs.json: 'not' is not implemented", "structured_outputs")

    server = start(FakeRuntime(before=refuse))
    response = server.post(CHAT, json=BASES[CHAT] | body | {"stream": stream})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, name)
    assert error["message"] == f"{name}: 'not' is not implemented"


def test_a_model_without_a_tokenizer_is_held_to_nothing(start: Start) -> None:
    server = start(FakeRuntime(the_tokenizer=None))
    response = server.post(COMPLETIONS, json={"prompt": [1], "guided_regex": "a"})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "guided_regex")
    assert "no tokenizer: leave it out" in error["message"]
