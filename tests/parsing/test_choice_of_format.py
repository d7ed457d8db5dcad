"""Which format a model has: what its template says of calls and of thinking."""

from __future__ import annotations

import pytest

from tpworker.parsing import REASONING_FORMATS, TOOL_FORMATS, formats_of

JSON_CALL = '<tool_call>\\n{"name": ' + "{{- tool_call.name }}"
GLM = "{{ '\\n<tool_call>' + tc.name }}<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>"
CODER = (
    "{{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}{{- '<parameter=' + args_name + '>\\n' }}"
)
MISTRAL = "{{- '[TOOL_CALLS] [' }}"
LLAMA = """{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}{{- arguments | tojson }}"""
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
THINKS = "{{- '<think>\\n' + reasoning_content }}"


@pytest.mark.parametrize(
    ("model_type", "template", "tools", "reasoning"),
    [
        ("qwen3", JSON_CALL + THINKS, "hermes", "qwen3"),
        ("qwen3_moe", JSON_CALL, "hermes", None),
        ("qwen3_moe", CODER, "qwen3_coder", None),
        ("qwen2", JSON_CALL, "hermes", None),
        ("glm4_moe", GLM + THINKS, "glm45", "glm45"),
        ("ernie4_5_moe", JSON_CALL + THINKS, "ernie45", "ernie45"),
        ("ernie4_5", PLAIN, "ernie45", None),
        ("llama", LLAMA, "llama3_json", None),
        ("llama", "<|python_tag|>", "llama3_json", None),
        ("llama", JSON_CALL, "hermes", None),
        ("llama", PLAIN, "hermes", None),
        ("mistral", MISTRAL, "mistral", None),
        ("ministral", MISTRAL + THINKS, "mistral", "qwen3"),
        ("mistral", PLAIN, "hermes", None),
        ("glm4_moe", PLAIN, "glm45", None),
        ("whatever", JSON_CALL, "hermes", None),
    ],
)
def test_the_template_decides(model_type: str, template: str, tools: str, reasoning: str | None) -> None:
    found_tools, found_reasoning = formats_of(model_type, template)
    assert found_tools is TOOL_FORMATS[tools]
    assert found_reasoning is (None if reasoning is None else REASONING_FORMATS[reasoning])


def test_a_model_without_a_template_has_no_format() -> None:
    assert formats_of("qwen3", None) == (None, None)


def test_formats_are_found_by_their_names() -> None:
    assert all(tools.name == name for name, tools in TOOL_FORMATS.items())
    assert all(reasoning.name == name for name, reasoning in REASONING_FORMATS.items())
