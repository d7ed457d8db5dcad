"""Chat templates with what is particular about those that models come with."""

from __future__ import annotations

#: ChatML, as SmolLM2 has it: newlines and blanks of statements go, those of strings stay.
CHATML = """{% for m in messages %}
    {% if loop.first and m['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}
    {% endif %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""

#: Llama 3: special tokens, today's date, tools as JSON, slices, 'is iterable' of what is a string.
LLAMA3 = """{{- bos_token }}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set day = strftime_now("%d %b %Y") if strftime_now is defined else 'some day' %}
{%- if messages[0].role == 'system' %}
    {%- set system, messages = messages[0]['content'] | trim, messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
<|header|>system<|/header|>

{% if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{{ "Today: " ~ day ~ "\\n" + system + "<|eot|>" }}
{%- for m in messages if 'tool_calls' not in m %}
    {%- if m.role == 'tool' and (m.content is mapping or m.content is iterable) %}
        {{- m.content | tojson }}
    {%- else %}
        {{- '<|header|>' ~ m.role ~ '<|/header|>\\n\\n' + m['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|header|>assistant<|/header|>\\n\\n' if add_generation_prompt }}
"""

#: Qwen3: a namespace written in a loop that goes backwards, methods of strings, thoughts cut off.
QWEN3 = """{%- set seen = namespace(last=messages | length - 1, is_open=true) %}
{%- for m in messages[::-1] %}
    {%- if seen.is_open and m.role == "user" and m.content is string and not m.content.endswith('/end') %}
        {%- set seen.is_open = false %}
        {%- set seen.last = messages | length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- set thoughts = '' %}
    {%- if m.role == 'assistant' and m.reasoning_content is string %}
        {%- set thoughts = m.reasoning_content.strip('\\n') %}
    {%- elif m.role == 'assistant' and '</think>' in content %}
        {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if thoughts and loop.index0 > seen.last %}{{- '<think>' + thoughts + '</think>\\n\\n' }}{% endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>' }}{% endif %}
{%- endif %}
"""

#: Mistral: refuses turns that do not alternate; the system's words come with the last question.
MISTRAL = """{%- set turns = messages[1:] if messages[0]["role"] == "system" else messages %}
{{- bos_token }}
{%- for m in turns %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate: 'user', 'assistant', \\u2026") }}
    {%- endif %}
    {%- if m["role"] == "user" %}
        {{- "[INST] " }}
        {%- if loop.last and turns | length < messages | length %}
            {{- messages[0]["content"] + "\\n\\n" }}
        {%- endif %}
        {{- m["content"] + "[/INST]" }}
    {%- else %}
        {{- " " + m["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

#: GLM-4.5: a macro that takes content in any form.
GLM = """[gMASK]<sop>
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content if part is mapping -%}{{- part.text }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{% for m in messages %}
<|{{ m.role }}|>
{% set content = text_of(m.content) %}
{%- if m.role == 'assistant' -%}
{{ '\\n<think>' ~ (m.reasoning_content or '').strip() ~ '</think>' }}
{{ content.strip() if content.strip() }}
{%- else -%}
{{ content }}{{ '/nothink' if m.role == 'user' and enable_thinking is defined and not enable_thinking }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>
{%- endif -%}
"""

PARTS = """{% for m in messages %}<|{{ m['role'] }}|>
{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}
{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}
{% generation %}{{ c['text'] }}{% endgeneration %}
{% endfor %}
<end>
{% endfor %}"""

ODD = """{% set d = dict(a=1) %}{{ d | tojson }}{{ dict.fromkeys(['x'], '<&>') | tojson(sort_keys=true) }}
{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}
  {% set x = 1 %}  {# a comment #}
{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}{{ tools }}{{ documents }}{{ undefined_name }}
{{ messages[0].content | length }}{{ messages | map(attribute='role') | join(',') }}{{ messages[0] | tojson }}
{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ messages[-1].thinking }}
"""

ALL = {
    "ChatML": CHATML, "Llama 3": LLAMA3, "Qwen3": QWEN3, "Mistral": MISTRAL, "GLM-4.5": GLM, "parts": PARTS,
    "odd": ODD,
}  # fmt: skip
