"""Where in a JSON schema it is that llguidance refuses it. It does not say so itself.

A schema's parts are compiled on their own: the innermost one that is refused, too, is where.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from tpworker.grammar.schemas import parts, pointed_at, with_refs

MAX_TRIED = 500  # parts
MAX_SECONDS = 0.5


def place_in_schemas(grammar: str, is_refused: Callable[[str], bool]) -> str:
    """The JSON pointer to what is refused of the schemas in a grammar's text; empty: it could not be found.

    Args:
        is_refused: whether a grammar's text cannot be compiled.
    """
    search = _Search(is_refused)
    for schema in schemas_in(grammar):
        if not isinstance(schema, dict):
            continue
        search.begin(schema)
        if search.is_refused(""):
            return search.innermost("")
    return ""


class _Search:
    def __init__(self, is_refused: Callable[[str], bool]) -> None:
        self._is_refused = is_refused
        self._until = time.monotonic() + MAX_SECONDS
        self._num_tried = 0

    def begin(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._moved = with_refs(schema, lambda ref: "#/$defs/all" + ref[1:] if ref[:1] == "#" else ref)
        self._seen: set[str] = set()

    def is_refused(self, pointer: str) -> bool:
        """Whether the part at a pointer is refused on its own, with all that it refers to."""
        self._num_tried += 1
        if self._num_tried > MAX_TRIED or time.monotonic() > self._until:
            return False
        alone = {"$ref": f"#/$defs/all{pointer}", "$defs": {"all": self._moved}}
        return self._is_refused(f"start: %json {json.dumps(alone)}")

    def innermost(self, pointer: str) -> str:
        self._seen.add(pointer)
        for part in self._below(pointer):
            if part not in self._seen and self.is_refused(part):
                return self.innermost(part)
        return f"#{pointer}"

    def _below(self, pointer: str) -> Iterator[str]:
        part = pointed_at(self._schema, pointer)
        if not isinstance(part, dict):
            return
        for below, one in parts(part):
            if one is not False:  # refused on its own, and mostly right where it stands
                yield pointer + below
        ref = part.get("$ref")
        if isinstance(ref, str) and ref[:1] == "#" and pointed_at(self._schema, ref[1:]) is not None:
            yield ref[1:]


def schemas_in(grammar: str) -> Iterator[Any]:
    """The schemas in a grammar's text, or in those that it consists of."""
    texts = [grammar]
    if grammar[:1] == "{":
        texts = [one.get("lark_grammar") or "" for one in json.loads(grammar)["grammars"]]
    decoder = json.JSONDecoder()
    for text in texts:
        for behind in text.split("%json")[1:]:
            try:
                schema, _ = decoder.raw_decode(behind.lstrip())
            except (ValueError, RecursionError):
                continue
            yield schema
