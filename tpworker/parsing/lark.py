"""Grammars of tool calls, in Lark as llguidance has it.

**Marks.** llguidance takes a token that tokenizer.json lists as added for a symbol of its own if it is
special, or if its name is like `<…>` (Qwen3's `<tool_call>`, which is not special, too): it is then no way to
write those characters, and a grammar that asks for them cannot be met by it. So a mark that is an added token
is written `<[id]>`, which holds for any token, and a mark that is none as its characters.

**Names of added tokens in schemas** are characters. Where there is one way to go on only, llguidance 1.9
offers the token, and refuses it then: nothing is left to choose. `no_forcing` keeps it from looking there.

**Text** up to such a token never spells the mark with other tokens: a parser of text takes that for the mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tpworker.errors import InvalidRequest
from tpworker.parsing.schemas import Schema
from tpworker.structured_outputs import MAX_GRAMMAR_TEXT

ANY = r"/(.|\n)*/"
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""That of `tojson` in chat templates, which models have learnt. There is one way to write a value, so none is
an endless run of spaces."""
_OPEN = frozenset({"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"})


class Lark:
    """A grammar while it is put together.

    Args:
        special_ids: the ids of the tokenizer's added tokens, by name.
    """

    def __init__(self, special_ids: Mapping[str, int] | None) -> None:
        self._ids = special_ids or {}
        self._lines: list[str] = []
        self._num_chars = 0  # of schemas, in rules or not yet
        self._spells_tokens = False

    def text(self, text: str) -> str:
        """An expression for text of the format. Names of added tokens in it stand for them."""
        names = sorted(self._names_in(text), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        return " ".join(
            f"<[{self._ids[part]}]>" if part in self._ids else literal(part) for part in parts if part
        )

    def characters(self, text: str) -> str:
        """An expression for text of a schema, whatever it spells."""
        self._spells_tokens = self._spells_tokens or bool(self._names_in(text))
        return literal(text)

    def json(self, schema: Schema) -> str:
        """An expression for a value of a schema.

        Raises:
            InvalidRequest: with those before it that is too much. They may share definitions, which each of
                them has anew, so a few of them are more than what a client has sent.
        """
        text = "%json " + json.dumps({**schema, "x-guidance": _LAYOUT})
        self._num_chars += len(text)
        check_length(self._num_chars)
        self._spells_tokens = self._spells_tokens or bool(
            self._names_in(json.dumps(schema, ensure_ascii=False))
        )
        return text

    def _names_in(self, text: str) -> list[str]:
        return [name for name in self._ids if name and name in text]

    def rule(self, name: str, body: str, options: str = "") -> str:
        """Another rule, or terminal. Its name, with its number behind it."""
        name = f"{name}_{len(self._lines)}"
        self._lines.append(f"{name}{options}: {body}")
        return name

    def until(self, mark: str, text: str = ANY, before: str = "") -> str:
        """An expression for text up to a mark, and the mark.

        Args:
            text: a terminal expression; text that spells the mark is taken out of it.
            before: what is written between them.
        """
        if mark in self._ids:
            terminal = self.without(mark, text)
            if before:
                terminal = self.rule("TEXT", f"{terminal} {literal(before)}")
            return f"{terminal} {self.text(mark)}"
        if text == ANY and not before:
            return self.rule("until", f"{self.rule('ANY', ANY)} {literal(mark)}", "[lazy]")
        return self.rule("UNTIL", f"{self.without(mark, text)} {literal(before + mark)}")

    def without(self, mark: str, text: str = ANY) -> str:
        """A terminal for text that does not spell a mark."""
        spelt = re.escape(mark).replace("/", r"\/")
        return self.rule("TEXT", rf"{text} & ~/(.|\n)*{spelt}(.|\n)*/")

    def text_behind(self, mark: str) -> str:
        """A terminal for the text behind what `until(mark)` has taken, or instead of it.

        Characters of a mark that is no token are taken by `until` wherever both could take them.
        """
        return self.without(mark) if mark in self._ids else self.rule("ANY", ANY)

    def grammar(self, start: str) -> str:
        """The whole of it. Its first line is the rule `start`."""
        options = ['%llguidance {"no_forcing": true}'] if self._spells_tokens else []
        return "\n".join([f"start: {start}", *self._lines, *options]) + "\n"


def check_length(num_chars: int) -> None:
    """Raises InvalidRequest if a grammar of calls has more characters than it may."""
    if num_chars > MAX_GRAMMAR_TEXT:
        raise InvalidRequest(
            f"the tools make a grammar of more than {MAX_GRAMMAR_TEXT} characters, the limit: make their "
            "schemas smaller, or give fewer of them",
            "tools",
        )


def literal(text: str) -> str:
    """Characters, in Lark."""
    return json.dumps(text, ensure_ascii=False)


def arguments_schema(parameters: Schema) -> dict[str, Any]:
    """The schema that the arguments of a call are held to.

    That of the function's parameters, but an object in any case, and one without others where it names some:
    what a function does not know it cannot take. No schema at all is no parameters, as OpenAI's API has it.
    """
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema = {"type": "object", **parameters}
    if "properties" in schema and not _OPEN & schema.keys():
        schema["additionalProperties"] = False
    return schema
