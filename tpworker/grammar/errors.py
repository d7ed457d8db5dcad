"""What is wrong with a grammar, in words for who wrote it."""

from __future__ import annotations

import re

from tpworker.errors import one_line, shown

LONGEST = 400  # characters of a message

_FOR_DEVELOPERS = ("<state>", "<non-verbose/>", "<backtrace>", "Stack backtrace", "stack backtrace")
_QUOTED_LINE = re.compile(r"^\s*(\d+ \||\^+\s*$)")
_POSITION = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
_REGEX = re.compile(
    r"regex parse error:\n(?:    (?P<regex>.*)\n    (?P<indent> *)\^+\n)?(?:.*\n)*?error: (?P<what>.*)"
)
_UNSUPPORTED = re.compile(r"Unimplemented keys: \[(.*)\]")

_OURS = re.compile(r"^at 1\(8\): (failed to compile JSON schema|invalid regex)")
"""What users give as a schema or an expression stands there: in a line that is not theirs."""

_MEANINGS = (
    ("NoExtension", "no output can match it, or none that the model's tokens can write"),
    ("too many expressions constructed", "it is too complex: make its repetitions and patterns smaller"),
    ("lexer precomputation failed", "it is too complex: make its repetitions and patterns smaller"),
    ("checking relevance of lexemes", "it is too large: make it smaller, or its repetitions and patterns"),
    ("initial lexer configuration", "it is too large: make it smaller, or its repetitions and patterns"),
    ("Unable to determine if regex is empty", "its patterns together are too complex: give one"),
    ("Regex is empty", "no string can have its pattern, its format and its length together"),
    ("oneOf constraints", "oneOf is supported where no two of its schemas can match alike: write anyOf"),
    ("retrieving it failed", "a $ref, or $schema, names another document: put its parts into $defs"),
    ("forced bytes", "no output can match it, or none that the model's tokens can write"),
    ("panic: ", "llguidance fails on it"),
)
_TOO_MANY = re.compile(r"(\d+) items; max is (\d+)")


class GrammarError(Exception):
    """A grammar cannot be compiled, or goes beyond its bounds. The message says what is wrong, and where."""


def cleaned(text: str) -> str:
    """What llguidance says of a grammar in one line, without what is for its developers: its state, the
    grammar, a backtrace."""
    for begin in _FOR_DEVELOPERS:
        text = text.partition(begin)[0]
    if (many := _TOO_MANY.search(text)) is not None:
        return f"it allows too much at one place ({many[1]} ways to go on, the limit is {many[2]})"
    for sign, meaning in _MEANINGS:
        if sign in text:
            return meaning
    position = None if _OURS.match(text) else _POSITION.match(text)
    where = f"line {position[1]}, column {position[2]}: " if position else ""
    if (regex := _REGEX.search(text)) is not None:
        at = "" if regex["regex"] is None else f" at character {len(regex['indent']) + 1}"
        of = "" if regex["regex"] is None else f" of {shown(regex['regex'])}"
        return f"{where}in a regular expression{at}{of}: {one_line(regex['what'], LONGEST)}"
    text = " ".join(line for line in text.splitlines() if not _QUOTED_LINE.match(line))
    text = _POSITION.sub("", text).replace("failed to compile JSON schema: ", "")
    text = _UNSUPPORTED.sub(lambda keys: f"not supported: {keys[1].replace(chr(34), '')}", text)
    text = re.sub(r"; following (special tokens )?are available: .*", "", text)
    return where + one_line(text, LONGEST)
