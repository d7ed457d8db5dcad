"""From what users give to a grammar's text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from tpworker.errors import InvalidRequest
from tpworker.grammar.gbnf import is_gbnf, lark_of_gbnf
from tpworker.grammar.marks import Marks, literal
from tpworker.grammar.structural_tags import StructuralTags
from tpworker.grammar.supported import ANY_OBJECT, as_held
from tpworker.ipc.messages import MAX_GRAMMAR
from tpworker.structured_outputs import PARAMETER, StructuredOutputs, Thinking

_NO_TOKENS: Mapping[str, int] = {}
_NOT_FORCED = '%llguidance {"no_forcing": true}'


class _Grammars(NamedTuple):
    """Lark, and what it refers to by `@name`."""

    main: str
    others: Mapping[str, str] = {}

    def text(self) -> str:
        if not self.others:
            return self.main
        named = [{"name": name, "lark_grammar": lark} for name, lark in self.others.items()]
        return json.dumps({"grammars": [{"lark_grammar": self.main}, *named]}, ensure_ascii=False)


def grammar_of(outputs: StructuredOutputs, *, special_ids: Mapping[str, int] = _NO_TOKENS) -> str:
    """The text that llguidance reads: Lark in its dialect, or its JSON of several grammars.

    Args:
        special_ids: the ids of the tokenizer's added tokens by their names (`Tokenizer.added`). Needed where
            a mark, of thinking or of a structural tag, is one of them.

    Raises:
        InvalidRequest: it cannot be said in such a grammar, or not in a text of MAX_GRAMMAR characters.
    """
    marks = Marks(special_ids)
    grammars = _held(outputs, marks)
    if outputs.behind is not None:
        grammars = _behind(grammars, outputs.behind, marks)
    text = _spelling(grammars, special_ids).text()
    if len(text) > MAX_GRAMMAR:
        raise InvalidRequest(
            f"{PARAMETER}.{outputs.kinds[0]} makes a grammar of {len(text)} characters; the limit is "
            f"{MAX_GRAMMAR}: make it smaller",
            PARAMETER,
        )
    return text


def _spelling(grammars: _Grammars, special_ids: Mapping[str, int]) -> _Grammars:
    """Grammars as they are, unless they may spell the name of an added token. Where that text is the only one
    that may come, llguidance 1.9 allows the token alone, and then does not take it."""
    texts = [text.replace("\\", "") for text in (grammars.main, *grammars.others.values())]
    if not any(name in text for name in special_ids for text in texts):
        return grammars
    return grammars._replace(main=f"{grammars.main}\n{_NOT_FORCED}\n")


def _held(outputs: StructuredOutputs, marks: Marks) -> _Grammars:
    if outputs.json is not None:
        return _Grammars(f"start: %json {as_held(str(outputs.json))}\n")
    if outputs.json_object:
        return _Grammars(f"start: %json {as_held(ANY_OBJECT)}\n")
    if outputs.regex is not None:
        return _Grammars(f"start: {_regex(outputs.regex)}\n")
    if outputs.choice:
        return _Grammars(f"start: CHOICE\nCHOICE: {' | '.join(map(literal, outputs.choice))}\n")
    if outputs.grammar is not None:
        return _Grammars(_lark(outputs.grammar))
    assert isinstance(outputs.structural_tag, str), "it is kept as text"
    tags = StructuralTags(outputs.structural_tag, marks, _regex, _lark)
    return _Grammars(tags.rules, tags.grammars)


def _regex(regex: str) -> str:
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(regex, 'dws')}/"  # \d, \w and \s are ASCII's, as in a schema's pattern


def _lark(grammar: str) -> str:
    if is_gbnf(grammar):
        return lark_of_gbnf(grammar)
    if grammar.lstrip()[:1] in ("{", ""):
        what = "is JSON" if grammar.strip() else "is empty"
        raise InvalidRequest(
            f"{PARAMETER}.grammar {what}: give Lark, whose first rule is start, or GBNF; give a JSON schema "
            "as json",
            PARAMETER,
        )
    return grammar


def _behind(held: _Grammars, thinking: Thinking, marks: Marks) -> _Grammars:
    """Thinking, white space, and what is held: a grammar of its own, since its rules may have any name."""
    rules = marks.up_to("thought", thinking.end) + "SPACE: /[ \\t\\r\\n]+/\n"
    if thinking.is_open:
        rules += "start: thought SPACE? @held\n"
    else:
        rules += f"start: ({marks.spelled(thinking.start)} thought)? SPACE? @held\n"
    return _Grammars(rules, {"held": held.main, **held.others})
