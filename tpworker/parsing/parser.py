"""One output: what is thought, what is said, what is called."""

from __future__ import annotations

from collections.abc import Sequence

from tpworker.parsing.events import Content, Event
from tpworker.parsing.functions import Function
from tpworker.parsing.tools import ToolFormat
from tpworker.structured_outputs import Thinking


class OutputParser:
    """The text of one output, fed in pieces of any size, as events.

    Args:
        thinking: what `ReasoningFormat.thinking` gave; None: nothing is split off.
        tools: the format of calls; None: nothing is taken for a call.
        functions: those that may be called. Their schemas say which arguments are strings.
    """

    def __init__(
        self, thinking: Thinking | None, tools: ToolFormat | None, functions: Sequence[Function] = ()
    ) -> None:
        self._tools = None if tools is None else tools.parser(functions)

    @property
    def num_calls(self) -> int:
        """How many calls have begun."""
        return 0 if self._tools is None else self._tools.num_calls

    def feed(self, text: str) -> list[Event]:
        """What more text says. What may be the beginning of a mark is held back."""
        if self._tools is not None:
            return self._tools.feed(text)
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """What was held back: the text ends here."""
        return [] if self._tools is None else self._tools.finish()
