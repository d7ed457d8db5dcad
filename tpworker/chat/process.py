"""The process that renders chat templates: a template is a program, and gets no more than its share.

bounded/child.py bounds its memory and the time of one rendering; the text's length is bounded here, by
counting while it grows.

    {template, special_tokens, max_chars}  ──►  ready, content kind, or not, and why
    {messages, context, variables}, …      ──►  [TEXT, it], [REFUSED, the template's words], [FAILED, why]
                                                or [TOO_LONG, '']
"""

from __future__ import annotations

from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError

from tpworker.bounded import child
from tpworker.chat.answers import FAILED, REFUSED, TEXT, TOO_LONG
from tpworker.chat.content import ContentKind, as_wanted, content_kind
from tpworker.chat.environment import Refused, chat_environment, message_for_template

NAME = "tpworker-template"


def main() -> NoReturn:
    """Serves the parent until it is gone."""
    child.serve(NAME, _prepare)


def _prepare(start: Any) -> tuple[str, child.Work | None]:
    compiled = _compile(start["template"])
    if isinstance(compiled, str):
        return compiled, None
    template, kind = compiled

    def render(request: Any) -> list[str]:
        return _render(template, _variables(request, kind, start["special_tokens"]), start["max_chars"])

    return kind, render


def _compile(source: str) -> tuple[Template, ContentKind] | str:
    """The template and what it wants of content; or what is wrong with it."""
    environment = chat_environment()
    try:
        return environment.from_string(source), content_kind(environment.parse(source))
    except MemoryError:
        raise
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {(error.message or '').rstrip('.')}"
    except Exception as error:  # nested too deeply for Python's compiler, say
        return _name(error)


def _variables(request: Any, kind: ContentKind, special_tokens: dict[str, str]) -> dict[str, Any]:
    messages = [message_for_template(message) for message in request["messages"]]
    for message in messages:
        if "content" in message:
            message["content"] = as_wanted(message["content"], kind)
    return {**special_tokens, **request["variables"], **request["context"], "messages": messages}


def _render(template: Template, variables: dict[str, Any], max_chars: int) -> list[str]:
    parts: list[str] = []
    num_chars = 0
    try:
        for part in template.generate(variables):
            num_chars += len(part)
            if num_chars > max_chars:
                return [TOO_LONG, ""]
            parts.append(part)
        return [TEXT, "".join(parts)]
    except MemoryError:
        raise
    except Refused as error:
        return [REFUSED, str(error)]
    except TemplateError as error:
        return [FAILED, str(error) or _name(error)]
    except Exception as error:
        return [FAILED, _name(error)]


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
