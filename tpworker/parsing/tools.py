"""What a format of tool calls is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from tpworker.parsing.events import Event
from tpworker.parsing.functions import Function


class ToolParser(Protocol):
    """Takes the text behind the thinking, in pieces of any size."""

    num_calls: int

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class ToolFormat(ABC):
    """How a family of models writes calls of functions."""

    name: ClassVar[str]
    special: ClassVar[frozenset[str]] = frozenset()
    """Names of tokens that the parser needs in the text, though they are special in some tokenizers."""

    @abstractmethod
    def grammar(
        self,
        functions: Sequence[Function],
        *,
        is_required: bool,
        is_parallel: bool,
        special_ids: Mapping[str, int] | None = None,
    ) -> str:
        """What an output is held to, in Lark as llguidance has it; the root is `start`.

        Args:
            functions: those that may be called, one at least.
            is_required: the output is calls, one at least. Else it is any text, in which calls are held
                to their schemas wherever one begins.
            is_parallel: there may be several calls.
            special_ids: the tokenizer's special tokens, ids by name: a mark among them is written as that token.
        """

    @abstractmethod
    def parser(self, functions: Sequence[Function]) -> ToolParser:
        """For one output."""
