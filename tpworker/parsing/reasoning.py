"""How families of models think before they answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tpworker.parsing.thinking import WrappedThinking
from tpworker.structured_outputs import Thinking

_TURN = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|\nAssistant:")
"""What chat templates write at the beginning of the assistant's turn: `<|im_start|>`, `<|assistant|>`, …"""


@dataclass(frozen=True)
class ReasoningFormat:
    """Which marks are around what a model thinks, and, in some families, around what it answers then.

    Args:
        name: as options have it.
        start, end: the marks around what it thinks.
        answer: those around the answer, which it may leave out.
    """

    name: str
    start: str = "<think>"
    end: str = "</think>"
    answer: tuple[str, str] | None = None

    @property
    def special(self) -> frozenset[str]:
        """The marks. A tokenizer may have them as tokens, special ones too: they must be part of the text."""
        return frozenset({self.start, self.end, *(self.answer or ())})

    def thinking(self, prompt: str) -> Thinking | None:
        """What the output begins with; None: this prompt leaves no thinking to come.

        Only what the prompt has of the assistant's turn counts: users write marks, too. Where no turn is
        found it is the very end that counts.

        Args:
            prompt: the text of the conversation, as the chat template has rendered it.
        """
        turns = list(_TURN.finditer(prompt))
        turn = prompt[turns[-1].end() :] if turns else prompt.rstrip()[-len(self.end) :]
        if self.end in turn:
            return None
        is_open = self.start in turn
        if self.answer is None:
            return Thinking(start=self.start, end=self.end, is_open=is_open)
        answer_start, answer_end = self.answer
        return WrappedThinking(
            start=self.start, end=self.end, is_open=is_open, answer_start=answer_start, answer_end=answer_end
        )
