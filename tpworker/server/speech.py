"""How the output of one request is read: what of it is thinking, what is said, what is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tpworker.outputs import RequestOutput
from tpworker.parsing import (
    CallArguments,
    CallBegan,
    Content,
    Event,
    Function,
    OutputParser,
    Reasoning,
    ToolFormat,
)
from tpworker.server.call_ids import new_call_id
from tpworker.server.telling import Choice
from tpworker.structured_outputs import Thinking


@dataclass(frozen=True, kw_only=True)
class Speech:
    """What is to be found in an output, and what it is held to."""

    behind: Thinking | None = None
    """What the output may begin with, before anything that it is held to."""
    splits: bool = True
    """Whether that is split off; else it is content."""
    tells_thinking: bool = True
    """Whether what is split off is told; else it is dropped."""
    tools: ToolFormat | None = None
    """In which calls are looked for; None: nothing is one."""
    functions: Sequence[Function] = ()
    """Those that may be called."""
    most_calls: int | None = None
    """More are dropped; None: as many as there are."""
    id_length: int | None = None
    """Of the ids of calls; None: as OpenAI's API has them."""
    grammar: str | None = None
    """What the calls hold the output to."""
    shown: Sequence[str] = ()
    """Special tokens that are part of the output's text: its marks."""
    end_id: int | None = None
    """The token that ends thinking, if it is one; None: what is thought cannot be counted."""

    @property
    def thinking(self) -> Thinking | None:
        """What is split off."""
        return self.behind if self.splits else None

    @property
    def is_plain(self) -> bool:
        """Whether all of an output is what is said, as it comes."""
        return self.thinking is None and self.tools is None


PLAIN = Speech()
"""All of it is what is said."""


class Reader:
    """Reads one output, in pieces of any size. What it yields of one kind at once is one event."""

    def __init__(self, speech: Speech) -> None:
        self._speech = speech
        self._parser = OutputParser(speech.thinking, speech.tools, speech.functions)
        self.call_ids: list[str] = []
        """Of the calls that have begun, for clients to refer to."""
        self.has_thought = speech.thinking is not None and speech.thinking.is_open

    def feed(self, text: str) -> list[Event]:
        """What more text says."""
        return self._told(self._parser.feed(text)) if text else []

    def finish(self) -> list[Event]:
        """What was held back: the output ends here."""
        return self._told(self._parser.finish())

    def _told(self, events: Sequence[Event]) -> list[Event]:
        told: list[Event] = []
        for event in events:
            match event:
                case Reasoning():
                    self.has_thought = True
                    if not self._speech.tells_thinking:
                        continue
                case CallBegan(index=index) | CallArguments(index=index):
                    if self._speech.most_calls is not None and index >= self._speech.most_calls:
                        continue
                    if isinstance(event, CallBegan):
                        self.call_ids.append(new_call_id(self._speech.id_length))
            joined = _joined(told[-1], event) if told else None
            if joined is None:
                told.append(event)
            else:
                told[-1] = joined
        return told


def _joined(first: Event, second: Event) -> Event | None:
    """Two events as one; None: they are not of one kind."""
    match first, second:
        case Content(text=before), Content(text=behind):
            return Content(before + behind)
        case Reasoning(text=before), Reasoning(text=behind):
            return Reasoning(before + behind)
        case CallArguments(index=one, text=before), CallArguments(index=other, text=behind) if one == other:
            return CallArguments(one, before + behind)
    return None


@dataclass
class Call:
    """One call of a tool."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Said:
    """All that one output says."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)


def said_in(reader: Reader, text: str) -> Said:
    """What a whole output says."""
    said = Said()
    for event in [*reader.feed(text), *reader.finish()]:
        match event:
            case Reasoning():
                said.reasoning += event.text
            case Content():
                said.content += event.text
            case CallBegan():
                said.calls.append(Call(reader.call_ids[event.index], event.name))
            case CallArguments():
                said.calls[event.index].arguments += event.text
    return said


@dataclass(kw_only=True)
class ReadChoice(Choice):
    """One output that is read, and how many of its tokens are thinking, its marks included."""

    reader: Reader
    end_id: int | None = None
    num_until_end: int = 0
    """Tokens up to the one that ends thinking."""
    has_ended: bool = False

    def add(self, output: RequestOutput) -> None:
        super().add(output)
        if self.end_id is None or self.has_ended:
            return
        self.has_ended = self.end_id in output.token_ids
        self.num_until_end += (
            output.token_ids.index(self.end_id) + 1 if self.has_ended else len(output.token_ids)
        )

    @property
    def num_thought(self) -> int:
        """Tokens that are thinking."""
        return self.num_until_end if self.reader.has_thought else 0
