"""Calls whose arguments are between tags, strings without quotes: GLM-4.5's and Qwen3-Coder's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tpworker.parsing.argument_values import read_value
from tpworker.parsing.functions import Function
from tpworker.parsing.json_call import Call, Outcome, read_object
from tpworker.parsing.json_text import comes, raw_value
from tpworker.parsing.lark import Lark
from tpworker.parsing.marked import END, START, MarkedFormat
from tpworker.parsing.reader import SPACE, Marks, Reader, Reading
from tpworker.parsing.schemas import Schema, property_of, types_of
from tpworker.parsing.tagged_grammar import KEY, arguments_grammar
from tpworker.parsing.writer import Writer


@dataclass(frozen=True)
class Tags:
    """What is around the arguments of a call, each of which is a key and a value."""

    key: str
    """Before a key."""
    key_end: str
    value: str
    """Behind the end of a key, with spaces between; empty: the value follows at once."""
    value_end: str
    end: str
    """Behind the last argument."""
    has_lines: bool
    """A value is on lines of its own: the line breaks around it are not part of it."""

    @property
    def value_ends(self) -> Marks:
        """What ends a value."""
        return Marks("\n" + self.value_end, self.value_end) if self.has_lines else Marks(self.value_end)


GLM = Tags("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", END, has_lines=False)
QWEN_CODER = Tags("<parameter=", ">", "", "</parameter>", "</function>", has_lines=True)
_NAME = re.compile(r"[\w.\-]+")  # what is written about a mark is none
_FUNCTION = "<function="


class TaggedFormat(MarkedFormat):
    """Common to both. A call that is a JSON object is taken too: models fall back to it."""

    _tags: Tags

    def _read_arguments(
        self, reader: Reader, writer: Writer, call: Call, function: Function | None
    ) -> Reading[Outcome]:
        """Takes the arguments of a call that has begun."""
        tags, ends = self._tags, self._tags.value_ends
        schema: Schema = {} if function is None else function.parameters
        separator = "{"
        while True:
            reader.record()
            yield from reader.run(SPACE)
            if (yield from reader.accept(tags.key)):
                key = yield from reader.run(KEY)
                if not (yield from self._begin_value(reader)):
                    break
                reader.recorded()
                call.argue(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
                separator = ", "
                types = types_of(property_of(schema, key), schema)
                if not (yield from read_value(reader, call.argue, types, ends)):
                    return Outcome.CUT
            elif (yield from comes(reader, tags.end)) or (yield from comes(reader, END)):
                reader.recorded()
                call.argue("{}" if separator == "{" else "}")
                if tags.end != END:
                    yield from reader.accept(tags.end)
                return Outcome.WHOLE
            else:
                break
        if reader.is_cut_in(tags.key, tags.key_end, tags.value, tags.end, END):
            reader.rest()
            return Outcome.CUT
        call.argue("{}" if separator == "{" else "}")
        return Outcome.BROKEN

    def _begin_value(self, reader: Reader) -> Reading[bool]:
        """Takes what is between a key and its value. Returns whether it was there."""
        tags = self._tags
        if not (yield from reader.accept(tags.key_end)):
            return False
        if tags.value:
            yield from reader.run(SPACE)
            if not (yield from reader.accept(tags.value)):
                return False
        if tags.has_lines:
            yield from reader.accept("\n")
        return True


class GlmFormat(TaggedFormat):
    r"""GLM-4.5's: `<tool_call>name\n<arg_key>k</arg_key>\n<arg_value>v</arg_value>\n</tool_call>`."""

    name = "glm45"
    special = frozenset({START, END, GLM.key, GLM.key_end, GLM.value, GLM.value_end})
    _tags = GLM

    def _read_call(
        self, reader: Reader, writer: Writer, functions: Mapping[str, Function], mark: str
    ) -> Reading[Outcome]:
        yield from reader.run(SPACE)
        if (yield from reader.peek()) == "{":
            return (yield from read_object(reader, writer, end=END, known=functions))
        call = Call(reader, writer)
        name = yield from reader.run(_NAME)
        if not name:
            return Outcome.NO_CALL
        call.set_name(name)
        if (yield from reader.peek()) != "\n":
            yield from reader.run(SPACE)
            for way in ("{", GLM.key, END):
                if (yield from comes(reader, way)):
                    break
            else:
                return Outcome.NO_CALL
        call.begin()
        yield from reader.run(SPACE)
        if (yield from reader.peek()) == "{":
            is_whole = yield from raw_value(reader, call.argue, END)
            return Outcome.WHOLE if is_whole else Outcome.CUT if reader.is_ended else Outcome.BROKEN
        return (yield from self._read_arguments(reader, writer, call, functions.get(name)))

    def _call(self, lark: Lark, function: Function) -> str:
        arguments = arguments_grammar(
            lark,
            function.parameters,
            before_key=GLM.key,
            before_value=f"{GLM.key_end}\n{GLM.value}",
            before_end="",
            end=GLM.value_end,
            behind="\n",
        )
        before = function.name + "\n"
        return f"{lark.text(before)} {arguments} {lark.text(END)}"


class QwenCoderFormat(TaggedFormat):
    """Qwen3-Coder's: `<function=name>`, for each argument `<parameter=k>`, its lines and `</parameter>`, and
    `</function>`. The mark before it may be missing."""

    name = "qwen3_coder"
    _beginnings = (START, _FUNCTION)
    _tags = QWEN_CODER

    def _read_call(
        self, reader: Reader, writer: Writer, functions: Mapping[str, Function], mark: str
    ) -> Reading[Outcome]:
        if mark == START:
            yield from reader.run(SPACE)
            if (yield from reader.peek()) == "{":
                return (yield from read_object(reader, writer, end=END, known=functions))
            if not (yield from reader.accept(_FUNCTION)):
                return Outcome.NO_CALL
        call = Call(reader, writer)
        name = yield from reader.run(_NAME)
        if not name or not (yield from reader.accept(">")):
            return Outcome.NO_CALL
        call.set_name(name)
        call.begin()
        return (yield from self._read_arguments(reader, writer, call, functions.get(name)))

    def _call(self, lark: Lark, function: Function) -> str:
        arguments = arguments_grammar(
            lark,
            function.parameters,
            before_key=QWEN_CODER.key,
            before_value=">\n",
            before_end="\n",
            end=QWEN_CODER.value_end,
            behind="\n",
        )
        before, behind = f"\n{_FUNCTION}{function.name}>\n", f"{QWEN_CODER.end}\n{END}"
        return f"{lark.text(before)} {arguments} {lark.text(behind)}"
