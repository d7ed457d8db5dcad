"""What a model thinks, split from what it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tpworker.parsing.reader import SPACE, Marks, Reader, Reading, Sink
from tpworker.structured_outputs import Thinking

_LINE_BREAKS = re.compile(r"\n+")


@dataclass(frozen=True, kw_only=True)
class WrappedThinking(Thinking):
    """Thinking, behind which the answer may be between two more marks.

    Args:
        answer_start, answer_end: those marks.
    """

    answer_start: str
    answer_end: str


class Splitter:
    """Takes the text of an output, and hands on what it thinks and what it answers.

    Line breaks behind the first mark, and around the second, belong to neither.
    """

    def __init__(self, thinking: Thinking, reasoning: Sink, answer: Sink) -> None:
        self._thinking = thinking
        self._reasoning = reasoning
        self._answer = answer
        self._reader = Reader()
        self._reading = self._read()
        self._is_done = False
        next(self._reading, None)

    def feed(self, text: str) -> None:
        """More of it."""
        if self._is_done:
            self._answer(text)
            return
        self._reader.add(text)
        next(self._reading, None)

    def finish(self) -> None:
        """The text ends here."""
        self._reader.end()
        next(self._reading, None)

    def _read(self) -> Reading[None]:
        thinking, reader = self._thinking, self._reader
        reader.record()
        yield from reader.run(SPACE)
        has_begun = yield from reader.accept(thinking.start)
        before = reader.recorded()
        if has_begun or thinking.is_open:
            yield from self._read_reasoning("" if has_begun else before.lstrip("\n"))
            yield from reader.run(_LINE_BREAKS)
        else:
            self._answer(before)
        if isinstance(thinking, WrappedThinking):
            yield from self._read_wrapped(thinking.answer_start, thinking.answer_end)
        self._is_done = True
        self._answer(reader.rest())

    def _read_reasoning(self, before: str) -> Reading[None]:
        """Takes what is thought, and the mark behind it."""
        if not before:
            yield from self._reader.run(_LINE_BREAKS)
        lines = _Lines(self._reasoning, before)
        if not (yield from self._reader.through(Marks(self._thinking.end), lines.add)):
            lines.finish()

    def _read_wrapped(self, start: str, end: str) -> Reading[None]:
        """Takes the answer and the mark behind it, if it begins with the one before it."""
        if not (yield from self._reader.accept(start)):
            return
        yield from self._reader.run(_LINE_BREAKS)
        lines = _Lines(self._answer)
        if not (yield from self._reader.through(Marks(end), lines.add)):
            lines.finish()
        yield from self._reader.run(_LINE_BREAKS)


class _Lines:
    """Text whose line breaks at the end wait for what comes."""

    def __init__(self, sink: Sink, before: str = "") -> None:
        self._sink = sink
        self._waiting = [before]

    def add(self, text: str) -> None:
        """More of it."""
        body = text.rstrip("\n")
        if body:
            self._sink("".join(self._waiting) + body)
            self._waiting.clear()
        self._waiting.append(text[len(body) :])

    def finish(self) -> None:
        """No mark came: they are text."""
        self._sink("".join(self._waiting))
