"""What a format of tool calls is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from tpworker.parsing.events import Event
from tpworker.parsing.functions import Function
from tpworker.parsing.reader import Reader, Reading
from tpworker.parsing.writer import Writer


class ToolFormat(ABC):
    """How a family of models writes calls of functions: it reads them, and holds outputs to them."""

    name: str
    special: frozenset[str]
    """Its marks. A tokenizer may have them as tokens, special ones too: they must be part of the text."""

    @abstractmethod
    def read(self, reader: Reader, writer: Writer, functions: Sequence[Function]) -> Reading[None]:
        """Reads an output, behind what the model thinks, to its end."""

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
            special_ids: the ids of the tokenizer's added tokens by name, special or not. A mark among them
                is held to that token: llguidance takes no such token for its characters (lark.py).
        """


class ToolParser:
    """What an output says behind what the model thinks, text and calls, fed in pieces of any size."""

    def __init__(self, tools: ToolFormat, functions: Sequence[Function]) -> None:
        self._reader = Reader()
        self._writer = Writer()
        self._reading = tools.read(self._reader, self._writer, functions)
        next(self._reading, None)

    @property
    def num_calls(self) -> int:
        """How many calls have begun."""
        return self._writer.num_calls

    def feed(self, text: str) -> list[Event]:
        """What more text says."""
        self._reader.add(text)
        next(self._reading, None)
        return self._writer.take()

    def finish(self) -> list[Event]:
        """What was held back: the text ends here."""
        self._reader.end()
        next(self._reading, None)
        self._writer.finish()
        return self._writer.take()
