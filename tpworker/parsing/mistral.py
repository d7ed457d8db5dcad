"""Mistral's calls: `[TOOL_CALLS]` and an array of objects, or, from its tokenizers of version 11 on, a mark
for each call, its name, `[ARGS]` and its arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from tpworker.parsing.functions import Function
from tpworker.parsing.json_call import Call, Outcome, read_object
from tpworker.parsing.json_text import raw_value
from tpworker.parsing.lark import Lark, arguments_schema
from tpworker.parsing.reader import SPACE, Marks, Reader, Reading
from tpworker.parsing.tools import ToolFormat
from tpworker.parsing.writer import Writer

_MARK, _ARGS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[^\s\[\]{}\"]+")
_CALL_ID = re.compile(r"[^\s\[\]{}]+")


class MistralFormat(ToolFormat):
    """Either is read by all. The grammar is the newer one's if the tokenizer has its marks."""

    name = "mistral"
    special = frozenset({_MARK, _ARGS, _ID})

    def read(self, reader: Reader, writer: Writer, functions: Sequence[Function]) -> Reading[None]:
        """Reads an output to its end."""
        marks = Marks(_MARK)
        known = {function.name for function in functions}
        while mark := (yield from reader.through(marks, writer.content)):
            reader.record(mark)
            yield from reader.run(SPACE)
            character = yield from reader.peek()
            if character == "[":
                outcome = yield from self._read_array(reader, writer, known)
            elif character == "{":
                outcome = yield from read_object(reader, writer, end=_MARK, known=known)
            else:
                outcome = yield from self._read_named(reader, writer)
            if outcome in (Outcome.NO_CALL, Outcome.BROKEN):
                writer.content(reader.recorded())

    def _read_array(self, reader: Reader, writer: Writer, known: set[str]) -> Reading[Outcome]:
        """Takes the objects of an array and its end; an array of none is text."""
        reader.take()
        is_call = False
        while True:
            yield from reader.run(SPACE)
            character = yield from reader.peek()
            if character == "{":
                outcome = yield from read_object(reader, writer, end=_MARK, known=known)
                if outcome is not Outcome.WHOLE:
                    return outcome
                is_call = True
                reader.record()
            elif character == "," and is_call:
                reader.take()
            elif character == "]" and is_call:
                reader.take()
                reader.recorded()
                return Outcome.WHOLE
            elif not character and is_call:
                return Outcome.CUT
            else:
                return Outcome.NO_CALL

    def _read_named(self, reader: Reader, writer: Writer) -> Reading[Outcome]:
        """Takes a name, what is between it and the arguments, and those."""
        call = Call(reader, writer)
        name = yield from reader.run(_NAME)
        call.set_name(name)
        if not name or not (yield from reader.peek()):
            return Outcome.NO_CALL
        yield from reader.run(SPACE)
        if (yield from reader.accept(_ID)):
            yield from reader.run(_CALL_ID)
        if not (yield from reader.accept(_ARGS)) and (yield from reader.peek()) != "{":
            return Outcome.NO_CALL
        call.begin()
        yield from reader.run(SPACE)
        if (yield from reader.peek()) == "{":
            is_whole = yield from raw_value(reader, call.argue, _MARK)
            return Outcome.WHOLE if is_whole else Outcome.BROKEN
        if not reader.is_ended:
            call.end()
        return Outcome.BROKEN

    def grammar(
        self,
        functions: Sequence[Function],
        *,
        is_required: bool,
        is_parallel: bool,
        special_ids: Mapping[str, int] | None = None,
    ) -> str:
        """See `ToolFormat.grammar`."""
        lark = Lark(special_ids)
        has_names = _ARGS in (special_ids or ())
        write = _named if has_names else _object
        call = lark.rule("call", " | ".join(write(lark, function) for function in functions))
        if not has_names:
            more = f'(", " {call})*' if is_parallel else ""
            call = lark.rule("calls", rf'/ ?\[/ {call} {more} "]"')
        one = f"{lark.text(_MARK)} {call}"
        if is_required:
            return lark.grammar(f"({one})+" if is_parallel and has_names else one)
        held = f"{lark.until(_MARK)} {call}"
        text = lark.text_behind(_MARK)
        return lark.grammar(f"({held})* {text}" if is_parallel else f"{text} | {held}")


def _object(lark: Lark, function: Function) -> str:
    before = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": '
    return f'{lark.text(before)} {lark.json(arguments_schema(function.parameters))} "}}"'


def _named(lark: Lark, function: Function) -> str:
    return f"{lark.text(function.name + _ARGS)} {lark.json(arguments_schema(function.parameters))}"
