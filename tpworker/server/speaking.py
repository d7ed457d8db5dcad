"""How the output of a request about a conversation is to be read, in the model's dialect."""

from __future__ import annotations

from dataclasses import replace

from tpworker.errors import InvalidRequest
from tpworker.grammar.supported import ANY_OBJECT, as_held, supported
from tpworker.parsing import ToolFormat
from tpworker.parsing.lark import check_length
from tpworker.server.dialect import Dialect
from tpworker.server.requests.held import Held
from tpworker.server.requests.spoken import SpokenRequest
from tpworker.server.speech import Speech

_BEGIN_AS_JSON = frozenset({"llama3_json"})
"""Formats whose calls have no mark before them. llguidance's lexer takes the longest it can: what begins as a
call could not become an answer any more."""


def speech_for(asked: SpokenRequest, dialect: Dialect, prompt: str) -> Speech:
    """How the output is read, and what its calls hold it to. Takes its time: not for the event loop.

    Args:
        prompt: the text of the conversation.

    Raises:
        InvalidRequest: tools are not taken, or what the answer is held to is wrong.
    """
    behind = None if dialect.reasoning is None else dialect.reasoning.thinking(prompt)
    marks: set[str] = set()
    if dialect.reasoning is not None and behind is not None:
        marks |= dialect.reasoning.special
    choice, tools = asked.choice, None
    grammar = None
    if choice.mode != "none":
        tools = dialect.check_tools()
        marks |= tools.special
        grammar = _grammar(asked, tools, dialect)
    return Speech(
        behind=behind,
        splits=asked.separate_reasoning is not False,
        tells_thinking=asked.include_reasoning is not False,
        tools=tools,
        functions=asked.functions if tools is not None else (),
        most_calls=None if _is_parallel(asked, dialect) else 1,
        id_length=dialect.id_length,
        grammar=grammar,
        shown=tuple(sorted(marks & dialect.special)),
        end_id=None if behind is None else dialect.added.get(behind.end),
    )


def _grammar(asked: SpokenRequest, tools: ToolFormat, dialect: Dialect) -> str | None:
    """What calls hold the output to; None: it is free.

    Raises:
        InvalidRequest: that cannot be said, or only at too great a length.
    """
    choice, functions, held = asked.choice, asked.functions, asked.held
    is_required = choice.mode == "required"
    if not (is_required or held or choice.names or any(function.is_strict for function in functions)):
        return None
    if held is not None and tools.name in _BEGIN_AS_JSON:
        raise InvalidRequest(
            f"{held.name}: calls in the format {tools.name} begin as JSON does, so that an output "
            "cannot be held to either: leave it out, or give tool_choice none",
            held.name,
        )
    grammar = tools.grammar(
        [replace(function, parameters=supported(dict(function.parameters))) for function in functions],
        is_required=is_required or held is not None,
        is_parallel=_is_parallel(asked, dialect),
        special_ids=dialect.added,
    )
    if held is not None:
        grammar = _calls_or_answer(grammar, held)
    check_length(len(grammar))
    return grammar


def _is_parallel(asked: SpokenRequest, dialect: Dialect) -> bool:
    """Whether there may be several calls."""
    is_free = asked.parallel_tool_calls is not False and not asked.choice.is_named
    return is_free and not dialect.takes_one_call


def _calls_or_answer(calls: str, held: Held) -> str:
    """A grammar of calls, or of an answer that is held to a schema.

    Args:
        calls: a grammar, of which the first line is `start: …`.
        held: JSON, of a schema or any.
    """
    start, colon, rules = calls.partition(":")
    assert start + colon == "start:", calls
    schema = as_held(str(held.outputs(None).json or ANY_OBJECT))
    return f"start: calls | answer\ncalls:{rules}answer: %json {schema}\n"
