"""GBNF, llama.cpp's notation of grammars, as Lark: llguidance's translation, within bounds."""

from __future__ import annotations

import re

from tpworker.errors import InvalidRequest, one_line
from tpworker.structured_outputs import PARAMETER

MAX_GBNF = 1 << 15  # characters
MAX_RULES = 500
"""The translation goes over all rules as often as they refer to each other in a row."""

_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_STAND_INS = 0xF0000
"""Characters that no text has stand for those of ASCII that are written as numbers: the translation does not
know what such an escape means, and to it a character of these would mean what it means in the notation."""


def is_gbnf(text: str) -> bool:
    """Whether a grammar's text is in this notation."""
    return _RULE.search(text) is not None


def lark_of_gbnf(text: str) -> str:
    """The same grammar in Lark, whose first rule is `start`.

    Raises:
        InvalidRequest: it is too large, or not right; says where.
    """
    from llguidance.gbnf_to_lark import gbnf_to_lark

    num_rules = len(_RULE.findall(text))
    if len(text) > MAX_GBNF or num_rules > MAX_RULES:
        raise _wrong(
            f"{len(text)} characters and {num_rules} rules of GBNF: at most {MAX_GBNF} and {MAX_RULES} are "
            "taken; write it in Lark"
        )
    try:
        lark: str = gbnf_to_lark(_ESCAPE.sub(_character, text))
    except RecursionError:
        raise _wrong("its parentheses are nested too deeply") from None
    except Exception as error:  # of no class of its own, where a rule is missing
        raise _wrong(one_line(str(error), 300)) from None
    return "".join(_written(character) for character in lark)


def _character(escape: re.Match[str]) -> str:
    """The character that an escape stands for; one of ASCII as its stand-in."""
    digits = escape[1] or escape[2] or escape[3]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    if code < 0x80:
        return chr(_STAND_INS + code)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise _wrong(f"{escape[0]} is no character")
    return chr(code)


def _written(character: str) -> str:
    code = ord(character) - _STAND_INS
    return f"\\u{code:04x}" if 0 <= code < 0x80 else character


def _wrong(what: str) -> InvalidRequest:
    return InvalidRequest(f"{PARAMETER}.grammar (GBNF): {what}", PARAMETER)
