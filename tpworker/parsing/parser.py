"""One output: what is thought, what is said, what is called."""

from __future__ import annotations

from collections.abc import Sequence

from tpworker.parsing.events import Content, Event, Reasoning
from tpworker.parsing.functions import Function
from tpworker.parsing.thinking import Splitter
from tpworker.parsing.tools import ToolFormat, ToolParser
from tpworker.structured_outputs import Thinking


class OutputParser:
    """The text of one output, fed in pieces of any size, as events.

        text ──► Splitter ──► Reasoning
                     └──────► ToolParser ──► Content, CallBegan, CallArguments

    Joined, the events are the same however the text is cut. What may be the beginning of a mark is held back,
    and, where calls may come, whitespace at the end of content; all else is told at once. Nothing is an
    error: what is no call is text, and what is wrong in the arguments of one is passed on.

    Args:
        thinking: what `ReasoningFormat.thinking` gave; None: nothing is split off.
        tools: the format of calls; None: nothing is taken for a call.
        functions: those that may be called. Their schemas say which arguments are strings.
    """

    def __init__(
        self, thinking: Thinking | None, tools: ToolFormat | None, functions: Sequence[Function] = ()
    ) -> None:
        self._events: list[Event] = []
        self._tools = None if tools is None else ToolParser(tools, functions)
        self._splitter = None if thinking is None else Splitter(thinking, self._think, self._answer)

    @property
    def num_calls(self) -> int:
        """How many calls have begun."""
        return 0 if self._tools is None else self._tools.num_calls

    def feed(self, text: str) -> list[Event]:
        """What more text says."""
        if self._splitter is None:
            self._answer(text)
        else:
            self._splitter.feed(text)
        return self._take()

    def finish(self) -> list[Event]:
        """What was held back: the text ends here. A call that it ends in stays as it is."""
        if self._splitter is not None:
            self._splitter.finish()
        if self._tools is not None:
            self._events += self._tools.finish()
        return self._take()

    def _think(self, text: str) -> None:
        if text:
            self._events.append(Reasoning(text))

    def _answer(self, text: str) -> None:
        if not text:
            return
        if self._tools is None:
            self._events.append(Content(text))
        else:
            self._events += self._tools.feed(text)

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events
