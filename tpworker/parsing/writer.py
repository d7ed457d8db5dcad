"""What a parser has found in an output, as events: few of them, and without the whitespace of the format."""

from __future__ import annotations

from tpworker.parsing.events import CallArguments, CallBegan, Content, Event


class Writer:
    """Collects content and calls.

    Whitespace before a call, between calls and behind them belongs to the format. So whitespace at the end of
    content waits for what comes: more content makes it content; a call, or the end behind one, drops it.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._has_content = False
        self._spaces: list[str] = []
        self._events: list[Event] = []
        self._kind: type[Content] | type[CallArguments] = Content
        self._parts: list[str] = []

    def content(self, text: str) -> None:
        """Text that is part of no call."""
        if self.num_calls and not self._has_content:
            text = text.lstrip()
        body = text.rstrip()
        if body:
            for part in (*self._spaces, body):
                self._add(Content, part)
            self._spaces.clear()
            self._has_content = True
        if len(body) < len(text):
            self._spaces.append(text[len(body) :])

    def call(self, name: str) -> None:
        """A call begins."""
        self._spaces.clear()
        self._flush()
        self._events.append(CallBegan(self.num_calls, name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that began last."""
        self._add(CallArguments, text)

    def take(self) -> list[Event]:
        """What has been found since the last time."""
        self._flush()
        events, self._events = self._events, []
        return events

    def finish(self) -> None:
        """Nothing more comes."""
        if not self.num_calls:
            for part in self._spaces:
                self._add(Content, part)
        self._spaces.clear()

    def _add(self, kind: type[Content] | type[CallArguments], text: str) -> None:
        if kind is not self._kind:
            self._flush()
            self._kind = kind
        if text:
            self._parts.append(text)

    def _flush(self) -> None:
        if self._parts:
            text = "".join(self._parts)
            self._parts = []
            is_content = self._kind is Content
            self._events.append(Content(text) if is_content else CallArguments(self.num_calls - 1, text))
