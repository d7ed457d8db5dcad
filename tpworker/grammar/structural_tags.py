"""Structural tags: text with parts that are held to something, in vLLM's older form and xgrammar's newer one.

    {"type": "structural_tag", "triggers": ["<f"], "structures": [
        {"begin": "<f=a>", "schema": {…}, "end": "</f>"}]}
    {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<f"], "tags": [
        {"begin": "<f=a>", "content": {"type": "json_schema", "json_schema": {…}}, "end": "</f>"}]}}

As soon as the text holds a trigger, one of the tags goes on from there. What has no end of its own, text and
triggered tags, can only come last; text may also be what a tag's end ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from tpworker.errors import InvalidRequest, shown
from tpworker.grammar.marks import ANY_TEXT, Marks
from tpworker.grammar.schemas import compact
from tpworker.grammar.supported import as_llguidance_takes_it
from tpworker.structured_outputs import PARAMETER


class StructuralTags:
    """The grammars that structural tags make.

    Attributes:
        rules: Lark, whose first rule is `start`.
        grammars: what it refers to by `@name`: Lark, too.

    Raises:
        InvalidRequest: it is something else, or of a kind that is not supported; says where.
    """

    def __init__(
        self, text: str, marks: Marks, regex: Callable[[str], str], lark: Callable[[str], str]
    ) -> None:
        """
        Args:
            regex: makes what matches a regular expression, for the right side of a rule.
            lark: makes Lark of a grammar that may be GBNF.
        """
        self._marks = marks
        self._regex = regex
        self._lark = lark
        self._num_rules = 0
        self.rules = ""
        self.grammars: dict[str, str] = {}
        tag = json.loads(text)
        if tag.get("type") != "structural_tag":
            self._refuse("type", tag.get("type"), "structural_tag")
        if "format" in tag:
            start = self._format(tag["format"], "format", is_last=True)
        else:
            tags = [
                self._older(one, f"structures[{i}]")
                for i, one in enumerate(self._list(tag, "", "structures"))
            ]
            start = self._triggered({"tags": tags, "triggers": tag.get("triggers")}, "", is_last=True)
        self.rules = f"start: {start}\n{self.rules}"

    # ----------------------------------------------------------------------------------- formats

    def _format(self, one: Any, path: str, is_last: bool) -> str:
        """What matches a format, for the right side of a rule."""
        made = {
            "const_string": self._const_string,
            "json_schema": self._json_schema,
            "regex": self._regular_expression,
            "grammar": self._grammar,
            "any_text": self._any_text,
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
        }
        kind = one.get("type") if isinstance(one, dict) else one
        if not isinstance(one, dict) or not isinstance(kind, str) or kind not in made:
            self._refuse(f"{path}.type", kind, f"one of {', '.join(made)}")
        return made[kind](one, path, is_last)

    def _const_string(self, one: dict[str, Any], path: str, is_last: bool) -> str:
        return self._marks.spelled(self._text(one, path, "value"))

    def _json_schema(self, one: dict[str, Any], path: str, is_last: bool) -> str:
        schema = one.get("json_schema")
        if not isinstance(schema, (dict, bool)):
            self._refuse(f"{path}.json_schema", schema, "a JSON schema")
        return self._rule(f"%json {compact(as_llguidance_takes_it(schema))}")

    def _regular_expression(self, one: dict[str, Any], path: str, is_last: bool) -> str:
        return self._regex(self._text(one, path, "pattern"))

    def _grammar(self, one: dict[str, Any], path: str, is_last: bool) -> str:
        name = f"grammar_{len(self.grammars)}"
        self.grammars[name] = self._lark(self._text(one, path, "grammar"))
        return f"@{name}"

    def _any_text(self, one: dict[str, Any], path: str, is_last: bool) -> str:
        self._nothing_else(one, path, "type")
        self._check_last(path, is_last)
        return self._terminal(ANY_TEXT)

    def _sequence(self, one: dict[str, Any], path: str, is_last: bool) -> str:
        elements = self._list(one, path, "elements")
        made = [
            self._format(part, f"{path}.elements[{i}]", is_last and i == len(elements) - 1)
            for i, part in enumerate(elements)
        ]
        return self._rule(" ".join(made))

    def _or(self, one: dict[str, Any], path: str, is_last: bool) -> str:
        elements = enumerate(self._list(one, path, "elements"))
        return self._rule(
            " | ".join(self._format(part, f"{path}.elements[{i}]", is_last) for i, part in elements)
        )

    def _tag(self, one: dict[str, Any], path: str, is_last: bool) -> str:
        begin, rest = self._marks.spelled(self._text(one, path, "begin")), self._rest(one, path, is_last)
        return self._rule(f"{begin} {rest}")

    def _triggered(self, one: dict[str, Any], path: str, is_last: bool) -> str:
        """Text up to a trigger, and what is left of one of its tags; again and again; and text."""
        self._nothing_else(one, path, "type", "tags", "triggers", "at_least_one", "stop_after_first")
        self._check_last(path, is_last)
        prefix = f"{path}." if path else ""
        tags = self._list(one, path, "tags")
        triggers = self._list(one, path, "triggers")
        if not all(isinstance(trigger, str) and trigger for trigger in triggers):
            self._refuse(f"{prefix}triggers", triggers, "texts, none of them empty")
        of: dict[str, list[str]] = {}
        for i, tag in enumerate(tags):
            where = f"{prefix}tags[{i}]" if path else f"structures[{i}]"
            begin = self._text(tag, where, "begin")
            trigger = next((t for t in triggers if begin.startswith(t)), None)
            if trigger is None:
                self._refuse(f"{where}.begin", begin, "a text that begins with a trigger")
            rest = f"{self._marks.spelled(begin[len(trigger) :])} {self._rest(tag, where, is_last=False)}"
            of.setdefault(trigger, []).append(self._rule(rest))
        parts = [f"{self._up_to(trigger)} ({' | '.join(rests)})" for trigger, rests in of.items()]
        at_once = [f"{self._marks.spelled(trigger)} ({' | '.join(rests)})" for trigger, rests in of.items()]
        part, first = self._rule(" | ".join(parts)), self._rule(" | ".join(at_once))
        any_text = self._terminal(ANY_TEXT)
        if one.get("at_least_one"):
            return first if one.get("stop_after_first") else self._rule(f"{first} {part}* {any_text}")
        return self._rule(f"{part} | {any_text}" if one.get("stop_after_first") else f"{part}* {any_text}")

    def _separated(self, one: dict[str, Any], path: str, is_last: bool) -> str:
        self._nothing_else(one, path, "type", "tags", "separator", "at_least_one", "stop_after_first")
        tags = enumerate(self._list(one, path, "tags"))
        tag = self._rule(" | ".join(self._tag(tag, f"{path}.tags[{i}]", is_last=False) for i, tag in tags))
        separator = self._marks.spelled(self._text(one, path, "separator", can_be_empty=True))
        some = tag if one.get("stop_after_first") else self._rule(f"{tag} ({separator} {tag})*")
        return some if one.get("at_least_one") else self._rule(f"{some}?")

    # ------------------------------------------------------------------------------------- parts

    def _rest(self, tag: Any, path: str, is_last: bool) -> str:
        """A tag's content and its end."""
        self._nothing_else(tag, path, "type", "begin", "content", "end")
        ends = tag.get("end")
        ends = [ends] if isinstance(ends, str) else ends
        if not isinstance(ends, list) or not ends or not all(isinstance(end, str) for end in ends):
            self._refuse(f"{path}.end", tag.get("end"), "a text, or a list of texts")
        content, where = tag.get("content"), f"{path}.content"
        if isinstance(content, Mapping) and content.get("type") == "any_text" and all(ends):
            self._nothing_else(content, where, "type")
            return self._rule(" | ".join(self._up_to(end) for end in ends))
        made = self._format(content, where, is_last and ends == [""])
        spelled = [self._marks.spelled(end) for end in ends]
        return f"{made} ({' | '.join(spelled)})" if any(spelled) else made

    def _older(self, one: Any, path: str) -> dict[str, Any]:
        """One of the older form's structures as a tag."""
        self._nothing_else(one, path, "begin", "schema", "end")
        schema = {"type": "json_schema", "json_schema": one.get("schema")}
        return {"begin": one.get("begin"), "content": schema, "end": one.get("end")}

    def _rule(self, right: str) -> str:
        name = self._name()
        self.rules += f"{name}: {right}\n"
        return name

    def _terminal(self, right: str) -> str:
        name = self._name().upper()
        self.rules += f"{name}: {right}\n"
        return name

    def _up_to(self, mark: str) -> str:
        name = self._name()
        self.rules += self._marks.up_to(name, mark)
        return name

    def _name(self) -> str:
        self._num_rules += 1
        return f"part_{self._num_rules}"

    # ------------------------------------------------------------------------------------ checks

    def _list(self, one: dict[str, Any], path: str, name: str) -> list[Any]:
        value = one.get(name)
        if not isinstance(value, list) or not value:
            self._refuse(f"{path}.{name}".lstrip("."), value, "a list, not an empty one")
        return value

    def _text(self, one: Any, path: str, name: str, can_be_empty: bool = False) -> str:
        value = one.get(name) if isinstance(one, Mapping) else None
        if not isinstance(value, str) or not (value or can_be_empty):
            self._refuse(f"{path}.{name}", value, "a text" if can_be_empty else "a text, not an empty one")
        return value

    def _nothing_else(self, one: Any, path: str, *known: str) -> None:
        if not isinstance(one, Mapping):
            self._refuse(path, one, f"an object with {', '.join(known)}")
        for name, value in one.items():
            if name not in known and value not in (None, [], False):
                self._refuse(
                    f"{path}.{name}".lstrip("."), value, f"left out: supported are {', '.join(known)}"
                )

    def _check_last(self, path: str, is_last: bool) -> None:
        if not is_last:
            raise InvalidRequest(
                f"{PARAMETER}.structural_tag: {path or 'triggers'} is text without an end of its own: it can "
                "only come last; or, as any_text, be a tag's content",
                PARAMETER,
            )

    def _refuse(self, path: str, value: object, limit: str) -> NoReturn:
        raise InvalidRequest(f"{PARAMETER}.structural_tag: {path}={shown(value)}: must be {limit}", PARAMETER)
