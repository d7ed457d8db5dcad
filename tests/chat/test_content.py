"""What a template wants of a message's content, read off its syntax tree."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chat import templates
from tpworker.chat.content import as_wanted, content_kind
from tpworker.chat.environment import chat_environment

LOOP = "{% for m in messages %}{}{% endfor %}"
TEXT = {"type": "text", "text": "Hi"}


def kind_of(body: str, before: str = "") -> str:
    return content_kind(chat_environment().parse(before + LOOP.replace("{}", body)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ChatML", "string"), ("Llama 3", "string"), ("Qwen3", "string"), ("Mistral", "string"),
        ("GLM-4.5", "as given"), ("parts", "parts"), ("odd", "string"),
    ],
)  # fmt: skip
def test_templates_that_models_come_with(name: str, kind: str) -> None:
    assert content_kind(chat_environment().parse(templates.ALL[name])) == kind


@pytest.mark.parametrize(
    "body",
    [
        "{% for c in m['content'] | selectattr('type','equalto','text') %}{{ c['text'] }}{% endfor %}",
        "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}",
        "{% for c in m.content if c.type == 'text' %}{{ c }}{% endfor %}",
        "{% for c in m.get('content') %}{{ c['text'] }}{% endfor %}",
        "{% for c in m.content[1:] %}{{ c['text'] }}{% endfor %}",
        "{% for c in m.content %}{% if c is mapping %}{{ c['text'] }}{% endif %}{% endfor %}",
        "{% for c in m.content %}{% if 'text' in c %}x{% endif %}{% endfor %}",
        "{% for i in range(2) %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
        "{% set content = m['content'] %}{% for c in content %}{{ c['text'] }}{% endfor %}",
        "{% set a = m.content %}{% set b = a or [] %}{% for c in b %}{{ c['text'] }}{% endfor %}",
        "{% set ns = namespace() %}{% set ns.x = m.content %}{% for c in ns.x %}{{ c.text }}{% endfor %}",
        "{% with p = m.content %}{% for c in p %}{{ c.text }}{% endfor %}{% endwith %}",
        "{{ m.content | map(attribute='text') | join('') }}",
        "{{ (m.content | selectattr('type', 'equalto', 'text') | first).text }}",
        "{{ m.content[0]['text'] }}",
        "{{ m['content'][-1].text }}",
        "{{ (m.content | first)['text'] }}",
        "{% for c in (m.content if m.content is not none else []) %}{{ c.text }}{% endfor %}",
        # A test that says nothing about strings guards nothing: one can be looped over too.
        "{% if m.content is iterable %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}",
        # One place that asks does not help the other that does not.
        "{% if m.content is string %}x{% endif %}{% for c in m.content %}{{ c.text }}{% endfor %}",
    ],
)  # fmt: skip
def test_parts(body: str) -> None:
    assert kind_of(body) == "parts"


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content }}",
        "{{ m['content'] | trim }}",
        "{{ m.content.split('</think>')[-1] }}",
        "{{ m.content[:10] }}{{ m.content[0] }}",
        "{% for line in m.content.split('\n') %}{{ line.strip() }}{% endfor %}",
        "{% for char in m.content %}{{ char }}{% endfor %}",
        "{% for t in m.tool_calls %}{{ t.function.name }}{% endfor %}{{ m.content }}",
        "{% if m.content is string %}{{ m.content }}{% endif %}",
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join }}",
        "{% set content %}{{ m.content }}{% endset %}{{ content }}",
    ],
)
def test_a_string(body: str) -> None:
    assert kind_of(body) == "string"


@pytest.mark.parametrize(
    "body",
    [
        "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{{ c.text }}"
        "{% endfor %}{% endif %}",
        "{% if m.content is not string %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}",
        "{% if m.role == 'x' %}{% elif m.content is string %}{{ m.content }}{% elif m.content is iterable %}"
        "{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}",
        "{{ m.content if m.content is string else m.content | map(attribute='text') | join }}",
        "{{ m.content if m.content is string else m.content[0]['text'] }}",
        "{% if m.content is string %}{% else %}{% set p = m.content %}{% endif %}"
        "{% for c in p %}{{ c.text }}{% endfor %}",
    ],
)
def test_both(body: str) -> None:
    assert kind_of(body) == "as given"


MACRO = "{% macro show(role, content) %}{% for c in content %}{{ c.text }}{% endfor %}{% endmacro %}"


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("{{ show(m.role, m.content) }}", "parts"),
        ("{{ show(content=m.content, role='x') }}", "parts"),
        ("{{ m.content if m.content is string else show('x', m.content) }}", "as given"),
        ("{{ show('x', m.pictures) }}{{ m.content }}", "string"),
    ],
)
def test_through_a_macro(call: str, kind: str) -> None:
    assert kind_of(call, before=MACRO) == kind
    assert kind_of(call + MACRO) == kind  # defined behind its use


@pytest.mark.parametrize(
    ("content", "kind", "wanted"),
    [
        ("Hi", "string", "Hi"),
        ("Hi", "as given", "Hi"),
        ("Hi", "parts", [TEXT]),
        ([TEXT, TEXT], "string", "Hi\nHi"),
        ([TEXT], "as given", [TEXT]),
        ([TEXT], "parts", [TEXT]),
        ([TEXT, {"type": "image"}], "string", [TEXT, {"type": "image"}]),
        ([], "string", ""),
        (None, "parts", None),
    ],
)
def test_content_is_brought_into_that_form(content: Any, kind: Any, wanted: Any) -> None:
    assert as_wanted(content, kind) == wanted
