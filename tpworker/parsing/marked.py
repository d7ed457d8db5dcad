"""Calls between `<tool_call>` and `</tool_call>`, and those of the formats that have JSON between them."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from tpworker.parsing.functions import Function
from tpworker.parsing.json_call import Outcome, read_object
from tpworker.parsing.lark import Lark, arguments_schema
from tpworker.parsing.reader import SPACE, Marks, Reader, Reading
from tpworker.parsing.tools import ToolFormat
from tpworker.parsing.writer import Writer

START, END = "<tool_call>", "</tool_call>"
_BEHIND = "}\n" + END
_BETWEEN = re.compile(r"[\s}\],;]+")
_CLOSERS = re.compile(r"[}\],;]+")


class MarkedFormat(ToolFormat):
    """Calls between the two marks. Several objects between two of them are as many calls.

    What is between them and has no name is text, marks included. Text behind a call that was not closed is
    text, and the mark that closes it late is dropped.
    """

    special = frozenset({START, END})
    _beginnings: ClassVar[tuple[str, ...]] = (START,)

    def read(self, reader: Reader, writer: Writer, functions: Sequence[Function]) -> Reading[None]:
        """Reads an output to its end."""
        marks = Marks(*self._beginnings, END)
        by_name = {function.name: function for function in functions}
        is_owed = False  # the mark behind a call
        while mark := (yield from reader.through(marks, writer.content)):
            if mark != END:
                reader.record(mark)
                is_owed = yield from self._read_calls(reader, writer, by_name, mark)
            elif is_owed:
                is_owed = False
            else:
                writer.content(mark)

    def _read_calls(
        self, reader: Reader, writer: Writer, functions: Mapping[str, Function], mark: str
    ) -> Reading[bool]:
        """Takes what is behind a mark. Returns whether the mark behind it is still to come."""
        outcome = yield from self._read_call(reader, writer, functions, mark)
        if outcome is Outcome.NO_CALL:
            writer.content(reader.recorded())
            return False
        while outcome is not Outcome.CUT:
            if outcome is Outcome.BROKEN:
                writer.content(reader.recorded())
            between = yield from reader.run(_BETWEEN)
            if (yield from reader.accept(END)):
                return False
            if reader.is_cut_in(END):
                reader.rest()
                break
            spaces = _CLOSERS.sub("", between)
            if outcome is Outcome.BROKEN or (yield from reader.peek()) != "{":
                writer.content(spaces)
                break
            reader.record(spaces)
            outcome = yield from read_object(reader, writer, end=END, known=functions)
            if outcome is Outcome.NO_CALL:
                writer.content(reader.recorded())
                break
        return True

    @abstractmethod
    def _read_call(
        self, reader: Reader, writer: Writer, functions: Mapping[str, Function], mark: str
    ) -> Reading[Outcome]:
        """Takes a call behind its mark, not the mark that closes it. The reader is recording."""

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
        call = lark.rule("call", " | ".join(self._call(lark, function) for function in functions))
        if is_required:
            one = f"{lark.text(START)} {call}"
            more = rf' ("\n" {one})*' if is_parallel else ""
            return lark.grammar(rf'/\n{{1,2}}/? {one}{more} "\n"?')
        held = f"{lark.until(START)} {call}"
        text = lark.text_behind(START)
        return lark.grammar(f"({held})* {text}" if is_parallel else f"{text} | {held}")

    @abstractmethod
    def _call(self, lark: Lark, function: Function) -> str:
        """An expression for a call behind its mark, with the mark that closes it."""


class JsonFormat(MarkedFormat):
    r"""Hermes', Qwen3's and ERNIE 4.5's: `<tool_call>\n{"name": …, "arguments": …}\n</tool_call>`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _read_call(
        self, reader: Reader, writer: Writer, functions: Collection[str], mark: str
    ) -> Reading[Outcome]:
        yield from reader.run(SPACE)
        if (yield from reader.peek()) != "{":
            return Outcome.NO_CALL
        return (yield from read_object(reader, writer, end=END, known=functions))

    def _call(self, lark: Lark, function: Function) -> str:
        before = f'\n{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": '
        value = lark.json(arguments_schema(function.parameters))
        return f"{lark.text(before)} {value} {lark.text(_BEHIND)}"
