"""From what users give to a grammar's text."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tpworker.errors import InvalidRequest
from tpworker.grammar.marks import literal, mark_rule, text_up_to_rules
from tpworker.ipc.messages import MAX_GRAMMAR
from tpworker.structured_outputs import PARAMETER, StructuredOutputs, Thinking

_NO_TOKENS: Mapping[str, int] = {}


def grammar_of(outputs: StructuredOutputs, *, special_ids: Mapping[str, int] = _NO_TOKENS) -> str:
    """The text that llguidance reads: Lark in its dialect, or its JSON of several grammars.

    Args:
        special_ids: the ids of the tokenizer's added tokens by their names, see `added_tokens`. Needed where
            a mark, of thinking or of a structural tag, is one of them.

    Raises:
        InvalidRequest: it cannot be said in such a grammar, or not in a text of MAX_GRAMMAR characters.
    """
    text = _held(outputs, special_ids)
    if outputs.behind is not None:
        text = _behind(text, outputs.behind, special_ids)
    if len(text) > MAX_GRAMMAR:
        raise InvalidRequest(
            f"{PARAMETER}.{outputs.kinds[0]} makes a grammar of {len(text)} characters; the limit is "
            f"{MAX_GRAMMAR}: make it smaller",
            PARAMETER,
        )
    return text


def _held(outputs: StructuredOutputs, special_ids: Mapping[str, int]) -> str:
    if outputs.json is not None:
        return f"start: %json {outputs.json}\n"
    if outputs.json_object:
        return 'start: %json {"type":"object"}\n'
    if outputs.regex is not None:
        from llguidance import regex_to_lark

        return f"start: /{regex_to_lark(outputs.regex)}/\n"
    if outputs.choice:
        return f"start: CHOICE\nCHOICE: {' | '.join(map(literal, outputs.choice))}\n"
    if outputs.grammar is not None:
        return outputs.grammar
    raise InvalidRequest(f"{PARAMETER}.structural_tag is not supported yet", PARAMETER)


def _behind(held: str, thinking: Thinking, special_ids: Mapping[str, int]) -> str:
    """Thinking, white space, and what is held: a grammar of its own, since its rules may have any name."""
    rules = text_up_to_rules("thought", thinking.end, special_ids)
    if thinking.is_open:
        rules += "start: thought SPACE? @held\n"
    else:
        rules += "start: (opening thought)? SPACE? @held\n" + mark_rule(
            "opening", thinking.start, special_ids
        )
    rules += "SPACE: /[ \\t\\r\\n]+/\n"
    grammars = [{"lark_grammar": rules}, {"name": "held", "lark_grammar": held}]
    return json.dumps({"grammars": grammars}, ensure_ascii=False)
