"""Llama 3's calls: the output is JSON objects `{"name": …, "parameters": {…}}`, several with `;` between."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tpworker.parsing.functions import Function
from tpworker.parsing.json_call import Outcome, read_object
from tpworker.parsing.lark import Lark, arguments_schema
from tpworker.parsing.reader import SPACE, Marks, Reader, Reading
from tpworker.parsing.tools import ToolFormat
from tpworker.parsing.writer import Writer

_TAG = "<|python_tag|>"
_NO_OBJECT = r"/\s*([^\s{](.|\n)*)?/"


class LlamaFormat(ToolFormat):
    """An object at the very beginning is a call if its keys are a call's, and its name is a function's or it
    has arguments; so is one behind the tag, whatever its name."""

    name = "llama3_json"
    special = frozenset({_TAG})

    def read(self, reader: Reader, writer: Writer, functions: Sequence[Function]) -> Reading[None]:
        """Reads an output to its end."""
        known = {function.name for function in functions}
        reader.record()
        yield from reader.run(SPACE)
        if (yield from reader.peek()) == "{":
            yield from self._read_calls(reader, writer, known, is_bare=True)
        else:
            writer.content(reader.recorded())
        marks = Marks(_TAG)
        while mark := (yield from reader.through(marks, writer.content)):
            reader.record(mark)
            yield from reader.run(SPACE)
            if (yield from reader.peek()) == "{":
                yield from self._read_calls(reader, writer, known, is_bare=False)
            else:
                writer.content(reader.recorded())

    def _read_calls(self, reader: Reader, writer: Writer, known: set[str], *, is_bare: bool) -> Reading[None]:
        """Takes objects for as long as they are calls. The first comes next; the reader is recording."""
        while True:
            outcome = yield from read_object(reader, writer, end=None, known=known, is_bare=is_bare)
            if outcome is Outcome.CUT:
                return
            if outcome is not Outcome.WHOLE:
                break
            reader.record()
            yield from reader.run(SPACE)
            if (yield from reader.accept(";")):
                yield from reader.run(SPACE)
            character = yield from reader.peek()
            if not character:
                return
            if character != "{":
                break
        writer.content(reader.recorded())

    def grammar(
        self,
        functions: Sequence[Function],
        *,
        is_required: bool,
        is_parallel: bool,
        special_ids: Mapping[str, int] | None = None,
    ) -> str:
        """See `ToolFormat.grammar`. Text that is not a call does not begin with an object."""
        lark = Lark(special_ids)
        call = lark.rule("call", " | ".join(_call(lark, function) for function in functions))
        calls = lark.rule("calls", f'{call} ("; " {call})*' if is_parallel else call)
        if is_required:
            return lark.grammar(calls)
        text = lark.without(_TAG, _NO_OBJECT)
        return lark.grammar(f"{text} | {lark.until(_TAG, _NO_OBJECT)} {calls} | {calls}")


def _call(lark: Lark, function: Function) -> str:
    before = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "parameters": '
    return f'{lark.text(before)} {lark.json(arguments_schema(function.parameters))} "}}"'
